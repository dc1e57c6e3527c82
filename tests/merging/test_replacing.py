"""A new merge over a complete one: whenever it ends, one of the two is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Forker, run
from tiny import seen

from lowmem_adamms import make_plan, merge
from lowmem_adamms.errors import MergeError, OutputError, RecipeError
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging.journal import find_complete
from lowmem_adamms.merging.verify import verify

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def plan(pair: Pair) -> Plan:
    return make_plan(*pair)


@pytest.fixture(scope="module")
def originals(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """What is written at two alphas. Read only."""
    root = tmp_path_factory.mktemp("originals")
    return {alpha: merge(plan, alpha, root / str(alpha)) for alpha in (0.2, 0.6)}


@pytest.fixture
def out(originals: dict[float, Path], tmp_path: Path) -> Path:
    """A complete merge at 0.2, alone in its folder."""
    shutil.copytree(originals[0.2], tmp_path / "here" / "out")
    return tmp_path / "here" / "out"


def overwrite(plan: Plan, out: Path, **options: Any) -> None:
    merge(plan, 0.6, out, overwrite=True, **options)


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_the_new_merge_takes_the_place_of_the_old(
    plan: Plan, out: Path, originals: dict[float, Path]
) -> None:
    with pytest.raises(OutputError, match="`overwrite=True`"):
        merge(plan, 0.6, out)
    overwrite(plan, out)
    assert seen(out) == seen(originals[0.6])
    assert beside(out) == ["out"]
    verify(out)


def test_files_that_the_new_merge_has_not_are_gone(
    plan: Plan, out: Path, originals: dict[float, Path]
) -> None:
    (out / "report.html").write_text("of a search")
    overwrite(plan, out, max_shard_size=10**9)
    assert "model.safetensors" in seen(out)
    assert not [name for name in seen(out) if "-of-" in name or name == "report.html"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/")])
def test_what_is_not_of_the_merge_is_not_deleted(plan: Plan, out: Path, make: Any) -> None:
    make(out / "results")
    if (out / "results").is_dir() and not (out / "results").is_symlink():
        (out / "results" / "mmmu.json").touch()
    before = seen(out)
    with pytest.raises(OutputError, match=r"results.* is not of the merge .* move it away"):
        overwrite(plan, out)
    assert seen(out) == before
    assert beside(out) == ["out"]


def test_a_file_that_comes_meanwhile_is_not_deleted(plan: Plan, out: Path) -> None:
    with pytest.raises(OutputError, match=r"late\.txt is not of the merge"):
        overwrite(plan, out, progress=lambda _: (out / "late.txt").touch())
    assert (out / "late.txt").exists() and find_complete(out)
    (out / "late.txt").unlink()
    overwrite(plan, out)
    assert beside(out) == ["out"]


def test_an_input_is_never_overwritten(plan: Plan, pair: Pair, out: Path) -> None:
    before = seen(out)
    for base, donor in ((out, pair[1]), (pair[0], out)):
        with pytest.raises(OutputError, match="is the input"):
            overwrite(make_plan(base, donor), out)
    assert seen(out) == before


def test_it_does_not_go_with_an_upload(plan: Plan, out: Path) -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        overwrite(plan, out, push_to_hub="a/b")


@pytest.mark.parametrize("content", [{}, {"a.txt": "x"}])
def test_without_a_complete_merge_it_changes_nothing(
    plan: Plan, tmp_path: Path, content: dict[str, str], originals: dict[float, Path]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    if content:
        with pytest.raises(OutputError, match="is not empty"):
            overwrite(plan, out)
        assert sorted(seen(out)) == sorted(content)
    else:
        overwrite(plan, out)
        assert seen(out) == seen(originals[0.6])


def test_killed_while_it_writes_the_old_one_stays_and_the_same_command_resumes(
    pair: Pair, forker: Forker, out: Path, originals: dict[float, Path]
) -> None:
    before = seen(out)
    words = [*pair, "-o", out, "--alpha", "0.6", "--overwrite"]
    forker.run_until_killed(words)
    assert seen(out) == before
    assert beside(out) == [".out.new", "out"]
    assert run(*words) == 0
    assert seen(out) == seen(originals[0.6])
    assert beside(out) == ["out"]
    assert run(*words) == 0, "and once more it is done"
    assert beside(out) == ["out"]


@pytest.mark.parametrize("step", range(3))
def test_killed_while_they_change_places_the_same_call_ends_it(
    plan: Plan, out: Path, originals: dict[float, Path], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before either is moved, between the two, and before the old one is deleted."""

    class KilledError(BaseException):
        pass

    calls = 0
    rename, remove = Path.rename, shutil.rmtree

    def dying(what: Any) -> Any:
        def call(path: Path, *rest: Any, **options: Any) -> Any:
            nonlocal calls
            if ".partial" in str(path):
                return what(path, *rest, **options)
            calls += what is rename or (step == 2 and calls == 2)
            if calls > step:
                raise KilledError
            return what(path, *rest, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(rename))
        patch.setattr(shutil, "rmtree", dying(remove))
        with pytest.raises(KilledError):
            overwrite(plan, out)
    whole = [path for path in out.parent.iterdir() if find_complete(path)]
    assert len(whole) == 2
    overwrite(plan, out)
    assert seen(out) == seen(originals[0.6])
    assert beside(out) == ["out"]


def test_a_folder_of_somebody_else_is_not_deleted(plan: Plan, out: Path) -> None:
    (out.parent / ".out.old").mkdir()
    (out.parent / ".out.old" / "mine").touch()
    with pytest.raises(OutputError, match=r"cannot be replaced \(Directory not empty\)"):
        overwrite(plan, out)
    assert (out.parent / ".out.old" / "mine").exists() and find_complete(out)


def test_a_folder_that_cannot_be_moved_is_one_line(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point, which is busy."""
    before = seen(out)

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(MergeError, match=r"cannot be replaced \(Device .* is complete in .*\.new"):
        overwrite(plan, out)
    assert seen(out) == before
