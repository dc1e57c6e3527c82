"""What is measured of RAM, cgroups and cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lowmem_adamms.live import free_memory
from lowmem_adamms.live.free_memory import Memory, available_ram, measure_memory

Put = Callable[[str, object], None]
Smi = Callable[[str], Path]

MIB, GB = 1 << 20, 10**9
AVAILABLE = 8 * GB
V1 = "sys/fs/cgroup/memory"


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes one of the system's small files under a root of our own."""
    system = SimpleNamespace(available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)

    def write(name: str, content: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")

    return write


def test_without_a_limit_all_that_the_system_has_is_available(put: Put, tmp_path: Path) -> None:
    assert available_ram(tmp_path) == AVAILABLE
    put("proc/self/cgroup", "0::/user/job\nno line of a cgroup")
    put("sys/fs/cgroup/user/job/memory.max", "max")
    put("sys/fs/cgroup/user/job/memory.current", GB)
    assert available_ram(tmp_path) == AVAILABLE


@pytest.mark.parametrize("folder", ["user/job", "user", "."])
def test_the_tightest_cgroup_around_the_process_bounds_it(
    put: Put, tmp_path: Path, folder: str
) -> None:
    put("proc/self/cgroup", "0::/user/job")
    for other in ("user/job", "user", "."):
        put(f"sys/fs/cgroup/{other}/memory.max", 7 * GB if other == folder else 9 * GB)
        put(f"sys/fs/cgroup/{other}/memory.current", 2 * GB)
    assert available_ram(tmp_path) == 5 * GB


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param(
            "0::/",
            {
                "sys/fs/cgroup/memory.max": 6 * GB,
                "sys/fs/cgroup/memory.current": 5 * GB,
                "sys/fs/cgroup/memory.stat": f"anon 1\nactive_file {GB}\ninactive_file {2 * GB}",
            },
            4 * GB,
            id="cached files make way",
        ),
        pytest.param(
            "0::/",
            {"sys/fs/cgroup/memory.max": GB, "sys/fs/cgroup/memory.current": 2 * GB},
            0,
            id="overdrawn",
        ),
        pytest.param(  # in a container /docker/x is not there: the mount is it
            "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/",
            {
                f"{V1}/memory.limit_in_bytes": 3 * GB,
                f"{V1}/memory.usage_in_bytes": 2 * GB,
                f"{V1}/memory.stat": f"active_file 99\ntotal_active_file {GB}",
            },
            2 * GB,
            id="version 1",
        ),
        pytest.param(
            "0::/../outside",
            {
                "sys/fs/cgroup/memory.max": 3 * GB,
                "sys/fs/cgroup/memory.current": GB,
                "sys/fs/outside/memory.max": 2 * GB,
                "sys/fs/outside/memory.current": GB,
            },
            2 * GB,
            id="no file outside the mount is read",
        ),
    ],
)
def test_cgroups_of_all_kinds(
    put: Put, tmp_path: Path, cgroup: str, files: dict[str, object], expected: int
) -> None:
    put("proc/self/cgroup", cgroup)
    for name, content in files.items():
        put(name, content)
    assert available_ram(tmp_path) == expected


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi of the given shell lines on an otherwise empty PATH; returns its log."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(script: str) -> Path:
        program = folder / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
        program.chmod(0o755)
        return log

    return install


CARD = "echo 'NVIDIA GeForce RTX 4090, 23028'"


def test_what_is_given_is_used(smi: Smi) -> None:
    assert measure_memory(ram=5, vram=7) == Memory(5, 7, None)
    assert measure_memory(ram=5) == Memory(5, None, None)
    log = smi(CARD)
    assert measure_memory(ram=5, vram=7) == Memory(5, 7, "NVIDIA GeForce RTX 4090")
    log.unlink()
    assert measure_memory(ram=5, vram=0) == Memory(5, None, None)
    assert not log.exists()  # no card is wanted: none is looked for
    assert 0 < measure_memory(vram=0).ram_bytes < 1 << 50


@pytest.mark.parametrize(
    ("visible", "asked"),
    [(None, "0"), ("2,0", "2"), (" 1", "1"), ("GPU-8932f937,1", "GPU-8932f937")],
)
def test_the_first_visible_card_is_asked_for(
    smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str
) -> None:
    log = smi(CARD)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure_memory(ram=5) == Memory(5, 23028 * MIB, "NVIDIA GeForce RTX 4090")
    options = ["--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    assert log.read_text().split() == [f"--id={asked}", *options]


@pytest.mark.parametrize("visible", ["", "-1,0"])
def test_a_hidden_card_is_no_card(smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    log = smi(CARD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure_memory(ram=5) == Memory(5, None, None)
    assert not log.exists()


@pytest.mark.parametrize(
    "script",
    [
        f"{CARD}; exit 6",
        "",
        "echo 'No devices were found'",
        "echo 'NVIDIA GB10, [N/A]'",
        "printf '\\377\\376, 12'",
        f"/bin/sleep 2; {CARD}",
    ],
)
def test_an_nvidia_smi_that_fails_means_no_card(
    smi: Smi, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(free_memory, "NVIDIA_SMI_SECONDS", 0.5)
    smi(script)
    assert measure_memory(ram=5) == Memory(5, None, None)
