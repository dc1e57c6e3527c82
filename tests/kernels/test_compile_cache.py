"""The cache of compiled code: where it cannot be kept or is damaged, the kernel works as well.

Each run is a process of its own with a home and a temporary folder that the test made. A folder
that cannot be written is one whose place a file takes: permissions would not stop root.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import Forker

KERNELS = Path(__file__).parents[2] / "kernels"
START = """
import os, sys, tempfile, warnings
warnings.simplefilter("error")
os.environ.update({env})
os.chdir({root!r})
sys.path.insert(0, {root!r})
tempfile.tempdir = None
"""
SOURCE = """
from numba import njit
from kernels.compile_cache import keep_compiled

@keep_compiled
@njit
def double(value):
    return 2 * value

@keep_compiled
@njit
def negate(value):
    return -value

print(double(21), negate(7), double(0.5))
print(sum(sum(each.stats.cache_hits.values()) for each in (double, negate)))
"""


@dataclass(frozen=True)
class Place:
    """A folder with a copy of the kernels, a home and a temporary folder."""

    root: Path
    forker: Forker

    def run(self, code: str) -> list[str]:
        """Each line that Python prints; nothing may go to stderr."""
        places = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/.cache"}
        env = {name: str(self.root / place) for name, place in places.items()}
        done = self.forker.run((), setup=START.format(env=env, root=str(self.root)) + code)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def hits(self) -> int:
        """Run two functions of three signatures; how many were found compiled."""
        answer, hits = self.run("import doubling")
        assert answer == "42 -7 1.0"
        return int(hits)

    def files(self, folder: str) -> list[Path]:
        return sorted((self.root / folder).rglob("*.nb[ci]"))

    @property
    def private(self) -> Path:
        return self.root / "tmp" / f"lowmem-adamms-{os.geteuid()}"


@pytest.fixture
def place(tmp_path: Path, forker: Forker) -> Place:
    """Nothing can be written but the temporary folder."""
    (tmp_path / "kernels").mkdir()
    for path in KERNELS.glob("*.py"):
        shutil.copy(path, tmp_path / "kernels")
    (tmp_path / "doubling.py").write_text(SOURCE)
    (tmp_path / "tmp").mkdir()
    for blocked in ("__pycache__", "kernels/__pycache__", "home"):
        (tmp_path / blocked).touch()
    return Place(tmp_path, forker)


def test_a_folder_of_its_own_is_used_where_no_other_can_be_written(place: Place) -> None:
    assert [place.hits(), place.hits()] == [0, 3]
    assert place.private.stat().st_mode & 0o777 == 0o700


def test_the_usual_place_is_used_where_it_can_be(place: Place) -> None:
    (place.root / "__pycache__").unlink()
    assert [place.hits(), place.hits()] == [0, 3]
    assert len(place.files("__pycache__")) == 5
    assert not place.private.exists()


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_others_may_have_made_is_not_trusted(place: Place, kind: str) -> None:
    """What lies there is code that would be run."""
    other = place.root / "other"
    other.mkdir(mode=0o700)
    if kind == "link":
        place.private.symlink_to(other)
    elif kind == "file":
        place.private.touch()
    else:
        place.private.mkdir()
        place.private.chmod(0o720)
    assert place.hits() == 0
    assert place.files("tmp") == place.files("other") == []


def test_damaged_files_are_dropped_and_made_anew(place: Place) -> None:
    place.hits()
    for suffix, how in (
        (".nbi", "empty"),
        (".nbi", "one bit"),
        (".nbc", "cut"),
        (".nbc", "one bit"),
    ):
        damaged = [path for path in place.files("tmp") if path.suffix == suffix]
        assert damaged
        for path in damaged:
            whole, half = path.read_bytes(), path.stat().st_size // 2
            changed = (
                whole[:half]
                + bytes(byte ^ 16 for byte in whole[half : half + 1])
                + whole[half + 1 :]
            )
            path.write_bytes({"empty": b"", "cut": whole[:half], "one bit": changed}[how])
        # One bit of an index may leave some of its entries as they were
        assert place.hits() <= (1 if how == "one bit" and suffix == ".nbi" else 0), (suffix, how)
    assert place.hits() == 3


def test_code_of_another_signature_is_not_run(place: Place) -> None:
    """As where one bit of an index has changed, which names the file of each signature."""
    place.hits()
    of_double = [path for path in place.files("tmp") if "double" in path.name]
    _, first, second = sorted(of_double, key=lambda path: path.suffix == ".nbc")
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    place.hits()
    assert place.hits() == 3


def test_a_full_disk_is_no_error(place: Place) -> None:
    code = """
import errno, os
def fail(*_): raise OSError(errno.ENOSPC, "No space left on device")
import numba
os.replace = fail
import doubling
"""
    assert place.run(code) == ["42 -7 1.0", "0"]


def test_the_kernel_itself_runs_where_nothing_can_be_written(place: Place) -> None:
    (place.root / "tmp").rmdir()
    code = """
import tempfile
tempfile.tempdir = "/dev/null"
import numpy as np
from kernels import select
kernel, why = select.select_kernel([("F32",) * 3])
base, donor, out = np.ones(3, np.float32), np.full(3, 5, np.float32), np.zeros(3, np.float32)
kernel([tuple(each.view(np.uint8) for each in (base, donor, out))], ("F32",) * 3, 0.25)
print(why, *out)
"""
    assert place.run(code) == ["numba: compiled, parallel 2.0 2.0 2.0"]
