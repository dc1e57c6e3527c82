"""`verify` accepts what a merge wrote and names what was changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_pair
import tiny
import torch
from blake3 import blake3
from safetensors.torch import save_file

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header, read_header
from lowmem_adamms.cli import main
from lowmem_adamms.errors import FormatError
from lowmem_adamms.merging.journal import JOURNAL, WORK
from lowmem_adamms.merging.verify import verify

FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Models = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("made")
    base, donor = random_pair.make_pair(folder)
    return base, donor, merge(make_plan(base, donor), 0.3, folder / "out")


@pytest.fixture
def out(made: Models, tmp_path: Path) -> Path:
    """A copy of the merged folder, to be spoilt, beside its inputs."""
    for side in made[:2]:
        (tmp_path / side.name).symlink_to(side)
    return shutil.copytree(made[2], tmp_path / "out")


@pytest.fixture
def movable(made: Models, tmp_path: Path) -> Models:
    """A merge of copies of the inputs, so that these can be spoilt as well."""
    base, donor = (shutil.copytree(side, tmp_path / side.name) for side in made[:2])
    return base, donor, merge(make_plan(base, donor), 0.3, tmp_path / "out")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(change(document) or document))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def fix_digests(out: Path) -> None:
    """Make adamms.json agree with the shards again."""

    def change(recipe: Any) -> None:
        for item in recipe["outputs"]:
            content = (out / item["file"]).read_bytes()
            item.update(size=len(content), blake3=blake3(content).hexdigest())

    edit(out / "adamms.json", change)


def place_of(out: Path, name: str) -> tuple[Path, int]:
    """The shard and the first byte of a tensor."""
    for shard in out.glob("*.safetensors"):
        for info in read_header(shard).tensors:
            if info.name == name:
                return shard, info.start
    raise KeyError(name)


def test_a_fresh_merge_is_ok(made: Models) -> None:
    out = made[2]
    shallow, deep = verify(out), verify(out, deep=True)
    tensors = tiny.load(out)
    assert shallow.tensors == deep.tensors == len(tensors)
    assert shallow.shards == deep.shards == len(list(out.glob("*.safetensors")))
    assert shallow.bytes == deep.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert shallow.rows is None
    assert deep.rows is not None
    assert deep.rows >= len(tensors)


@pytest.mark.parametrize("dtype", [None, "F16", "F32"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_every_kind_of_merge_is_ok(
    made: Models, alpha: float, dtype: str | None, tmp_path: Path
) -> None:
    plan = make_plan(
        *made[:2], dtype=DTYPES[dtype] if dtype else None, embeddings="keep" if alpha else "merge"
    )
    out = merge(plan, alpha, tmp_path / "out", max_shard_size=150_000)
    assert verify(out, deep=True, base=made[0], donor=made[1]).rows


def test_progress_names_every_shard_and_tensor(made: Models) -> None:
    said: list[str] = []
    verify(made[2], deep=True, progress=said.append)
    for name in [*tiny.load(made[2]), *(path.name for path in made[2].glob("*.safetensors"))]:
        assert any(name in line for line in said)


# Spoilt without need of --deep


def lose_metadata(out: Path) -> None:
    """Rewrite one shard without the format transformers asks for."""
    shard = min(out.glob("*.safetensors"))
    info = read_header(shard)
    head = build_header([(t.name, t.dtype, t.shape) for t in info.tensors], {})
    shard.write_bytes(head + shard.read_bytes()[info.data_start :])
    edit(
        out / "adamms.json",
        lambda recipe: (
            [item.update(size=(out / item["file"]).stat().st_size) for item in recipe["outputs"]]
            and None
        ),
    )


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def list_elsewhere(index: Any) -> None:
    files = index["weight_map"]
    other = next(file for file in files.values() if file != files["model.norm.weight"])
    files["model.norm.weight"] = other


def recipe(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda out: edit(out / "adamms.json", change)


def index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda out: edit(out / INDEX, change)


def unfinish(out: Path) -> None:
    (out / WORK).mkdir()
    (out / WORK / JOURNAL).write_text("{}\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: shards(out)[1].unlink(), "model-00002-of-00003.safetensors is missing"),
        (lambda out: cut_short(shards(out)[1]), "truncated"),
        (index(lambda index: index["metadata"].update(total_size=12)), "total_size is 12"),
        (index(lambda index: index.pop("metadata") and None), "total_size is None"),
        (index(lambda index: index.update(metadata=None)), "total_size|metadata"),
        (
            index(lambda index: index["weight_map"].pop("model.norm.weight") and None),
            "does not list model.norm.weight",
        ),
        (index(list_elsewhere), "model.norm.weight"),
        (index(lambda index: index["weight_map"].update(ghost=FIRST)), "ghost"),
        (lambda out: (out / "adamms.json").unlink(), "was not written by lowmem-adamms"),
        (lambda out: (out / "adamms.json").write_text("{"), "not a recipe"),
        (lambda out: (out / "adamms.json").write_text('["alpha"]'), "not a recipe"),
        (recipe(lambda recipe: recipe.pop("outputs") and None), "not a recipe"),
        (recipe(lambda recipe: recipe["outputs"].pop() and None), "adamms.json"),
        (recipe(lambda recipe: recipe.update(outputs=[])), "adamms.json"),
        (recipe(lambda recipe: recipe.update(outputs=["x"])), "not a recipe"),
        (recipe(lambda recipe: recipe["outputs"][0].update(size=1)), "adamms.json says 1"),
        (unfinish, "unfinished merge"),
        (lose_metadata, "format"),
    ],
)
def test_spoilt_structure_is_found(out: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(out)
    with pytest.raises(FormatError, match=words):
        verify(out)


def test_folders_that_are_not_ours_are_refused(made: Models, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="was not written by lowmem-adamms"):
        verify(made[0])
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        verify(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "nowhere")


# Spoilt bytes


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_by_the_digest(out: Path, where: str) -> None:
    shard = min(out.glob("*.safetensors"))
    flip(shard, -1 if where == "last" else read_header(shard).data_start)
    verify(out)  # its structure is sound
    with pytest.raises(FormatError, match=rf"{shard.name}: BLAKE3 is .*, adamms.json says"):
        verify(out, deep=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_flipped_bit_with_a_mended_digest_is_found_in_its_rows(out: Path, name: str) -> None:
    flip(*place_of(out, name))
    fix_digests(out)
    with pytest.raises(FormatError, match=f"{name} differs from its recipe in elements 0 to"):
        verify(out, deep=True)


def test_two_tensors_in_each_others_place_are_found(out: Path) -> None:
    """All bytes are there, and equal in size."""
    (shard, a), (other, b) = (
        place_of(out, f"model.layers.0.mlp.{role}_proj.weight") for role in ("gate", "up")
    )
    size = 128 * 64 * 2
    first, second = shard.read_bytes()[a : a + size], other.read_bytes()[b : b + size]
    for path, at, content in ((shard, a, second), (other, b, first)):
        whole = bytearray(path.read_bytes())
        whole[at : at + size] = content
        path.write_bytes(whole)
    fix_digests(out)
    with pytest.raises(FormatError, match="differs from its recipe"):
        verify(out, deep=True)


def test_a_tensor_that_the_plan_does_not_have_is_found(made: Models, tmp_path: Path) -> None:
    out = merge(make_plan(*made[:2]), 0.3, tmp_path / "out", max_shard_size=1 << 40)
    tensors = tiny.load(out) | {"ghost": torch.zeros(1)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    fix_digests(out)
    verify(out)
    with pytest.raises(FormatError, match="ghost is in only one of the output and its plan"):
        verify(out, deep=True, base=made[0], donor=made[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 0.31}, "differs from its recipe"),
        ({"options": {"embeddings": "keep", "dtype": None}}, "differs from its recipe"),
        ({"options": {"embeddings": "merge", "dtype": "F32"}}, "expected F32"),
        ({"donor": "/nowhere"}, "no such folder"),
        ({"alpha": "much"}, "adamms.json"),
        ({"options": {}}, "adamms.json"),
        ({"options": {"embeddings": "merge", "dtype": "F7"}}, "adamms.json"),
        ({"inputs": {"base": []}}, "adamms.json|not the file"),
    ],
    ids=str,
)
def test_an_edited_recipe_is_found(out: Path, change: dict[str, Any], words: str) -> None:
    edit(out / "adamms.json", lambda recipe: recipe.update(change))
    with pytest.raises(FormatError, match=words):
        verify(out, deep=True)


# Inputs that are no longer what was merged


@pytest.mark.parametrize("side", [0, 1])
def test_a_replaced_input_is_found(movable: Models, side: int) -> None:
    flip(min(movable[side].glob("*.safetensors")), -1)
    with pytest.raises(FormatError, match="not the file that was merged"):
        verify(movable[2], deep=True)
    verify(movable[2])


def test_an_input_with_other_shards_is_found(movable: Models, tmp_path: Path) -> None:
    donor = movable[1]
    tensors = tiny.load(donor)
    for path in (*donor.glob("*.safetensors"), donor / INDEX):
        path.unlink()
    tiny._save_tensors(tensors, donor, max_shard_size="1GB")
    with pytest.raises(FormatError, match=r"not the file|shards"):
        verify(movable[2], deep=True)


def test_a_lost_input_is_found(movable: Models) -> None:
    shutil.rmtree(movable[1])
    with pytest.raises(
        FormatError, match=r"its donor, called donor, does not lie beside it; .* as `donor`"
    ):
        verify(movable[2], deep=True)
    verify(movable[2])


def test_inputs_elsewhere_can_be_pointed_at(movable: Models, tmp_path: Path) -> None:
    base, donor, out = movable
    (tmp_path / "moved").mkdir()
    base.rename(tmp_path / "moved" / "b")
    donor.rename(tmp_path / "moved" / "d")
    base, donor = tmp_path / "moved" / "b", tmp_path / "moved" / "d"
    assert verify(out, deep=True, base=base, donor=donor).rows
    with pytest.raises(FormatError, match="not the file that was merged"):
        verify(out, deep=True, base=donor, donor=donor)
    words = ["--base", str(base), "--donor", str(donor)]
    assert main(["verify", str(out), "--deep", *words]) == 0
    assert main(["verify", str(out), *words]) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_sidecar_that_was_lost_or_edited_is_found(out: Path, name: str, lost: bool) -> None:
    if lost and name == "tokenizer.json":
        (out / name).unlink()
    else:
        (out / name).write_text((out / name).read_text() + " ")
    verify(out)
    with pytest.raises(FormatError, match=f"{name}: (missing, adamms.json lists|BLAKE3 is)"):
        verify(out, deep=True)


def test_nan_in_the_output_is_compared_by_its_bits(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    folders = []
    for seed, name in enumerate(("base", "donor")):
        folder = tiny.make("qwen2", tmp_path / name, ancestor=parent, seed=seed)
        tensors = tiny.load(folder)
        tensors["model.norm.weight"][seed] = torch.nan
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            path.unlink()
        tiny._save_tensors(tensors, folder)
        folders.append(folder)
    out = merge(make_plan(*folders), 0.3, tmp_path / "out", allow_nonfinite=True)
    assert verify(out, deep=True).rows
