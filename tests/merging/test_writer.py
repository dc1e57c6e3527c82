"""What a merge leaves on disk: the output folder, refusals, and whatever a kill leaves behind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_pair
import tiny
import torch
from blake3 import blake3
from command import NUMPY_KERNEL, Done, Forker
from huggingface_hub import ModelCard
from lowmem_adamms.kernels import reference
from safetensors.torch import save_file
from tiny import seen

from lowmem_adamms import __version__, make_plan
from lowmem_adamms.api import prepare_merge
from lowmem_adamms.checkpoints import mapped_files as stream
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import read_header
from lowmem_adamms.cli import main
from lowmem_adamms.errors import FormatError, MappingError, OutputError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.kinship import Kinship
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging import disk_sink as sink
from lowmem_adamms.merging import loop, writer
from lowmem_adamms.merging.journal import ANSWERS, JOURNAL, WORK
from lowmem_adamms.merging.model_card import digest_inputs
from lowmem_adamms.merging.shard_file import ShardFile
from lowmem_adamms.merging.shard_layout import lay_out_shards
from lowmem_adamms.merging.verify import verify

INDEX = "model.safetensors.index.json"
PAPERS = {"README.md", "adamms.json", INDEX}
Pair = tuple[Path, Path]
Files = dict[str, bytes]
Drive = Callable[..., Done]

LICENCE = (
    "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\ntags:\n- x\n---\n# Base\n"
)
EXTRAS = {
    "README.md": LICENCE,
    "LICENSE": "Do as you like.\n",
    "modeling_tiny.py": "CODE = 1\n",
    "nested/deeper/thing.json": "{}\n",
    "chat_template.json": '{"chat_template": "x"}\n',
}
NOT_CARRIED = {
    ".gitattributes": "*.bin lfs\n",
    ".cache/huggingface/x.metadata": "1\n",
    "__pycache__/modeling_tiny.pyc": "x",
    "flax_model.msgpack": "x",
    "adamms.json": "{}",
    "pytorch_model.bin.index.json": "{}",
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL loses nothing that was written: what fsync guards against cannot be tried here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None, raising=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The demo's pair, its base with files of every other kind."""
    base, donor = random_pair.make_pair(tmp_path_factory.mktemp("pair"))
    for name, text in (EXTRAS | NOT_CARRIED).items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    (donor / "donors_own.json").write_text("{}")
    return base, donor


@pytest.fixture(scope="module")
def merged(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted merge."""
    return merge(make_plan(*pair), 0.3, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="module")
def whole(merged: Path) -> Files:
    return seen(merged)


def merge(plan: Plan, alpha: float, out: Path, *, size: int | None = None, **options: Any) -> Path:
    """What the writer makes, by way of nothing else."""
    return writer.write(writer.prepare(plan, out, max_shard_size=size), alpha, **options)


# What lies in the folder


def test_the_base_shards_are_kept(pair: Pair, merged: Path) -> None:
    shards = sorted(path.name for path in pair[0].glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    for shard in shards:
        ours, theirs = (read_header(folder / shard) for folder in (merged, pair[0]))
        assert dict(ours.metadata) == {"format": "pt"}
        assert [(i.name, i.dtype, i.shape) for i in ours.tensors] == [
            (i.name, i.dtype, i.shape) for i in theirs.tensors
        ]


def test_the_index_lists_every_tensor_and_their_size(pair: Pair, merged: Path) -> None:
    index, before = (json.loads((folder / INDEX).read_bytes()) for folder in (merged, pair[0]))
    assert index["weight_map"] == before["weight_map"]
    tensors = tiny.load(merged)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_sidecars_are_the_bases_and_only_the_bases(pair: Pair, merged: Path) -> None:
    base, donor = pair
    sidecars = {
        str(path.relative_to(base))
        for path in base.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }
    sidecars -= set(NOT_CARRIED) | PAPERS
    assert {"tokenizer.json", "config.json", "preprocessor_config.json"} <= sidecars
    assert {"nested/deeper/thing.json", "modeling_tiny.py", "chat_template.jinja"} <= sidecars
    found = {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()}
    assert found == sidecars | PAPERS | {path.name for path in base.glob("*.safetensors")}
    for name in sidecars:
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert (donor / "donors_own.json").exists()


def test_the_model_card_has_the_hubs_front_matter(merged: Path) -> None:
    data = ModelCard.load(merged / "README.md").data.to_dict()
    assert data["base_model"] == ["base", "donor"]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert {"merge", "adamms"} <= set(data["tags"])
    assert "x" not in data["tags"]
    assert data["license"] == "other"
    assert data["license_name"] == "tiny"
    assert data["license_link"] == "LICENSE"


def test_a_base_with_a_connector_but_no_tower_is_tagged_as_multimodal(tmp_path: Path) -> None:
    """As LLaVA-1.5 of its authors and ShareGPT4V are."""
    made = tiny.make("llava", tmp_path / "llava", ancestor=tiny.ancestor("llama"))
    base = tiny.respell(made, tiny.llava_original_towerless, tmp_path / "base")
    out = merge(make_plan(base, made), 0.3, tmp_path / "out")
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text"


def test_a_text_base_is_tagged_so_and_without_licence_gets_none(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    base, donor = (
        tiny.make("qwen2", tmp_path / name, ancestor=parent, seed=seed)
        for seed, name in enumerate(("base", "donor"))
    )
    out = merge(make_plan(base, donor), 0.3, tmp_path / "out")
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert "license" not in data


@pytest.mark.parametrize(("place", "taken"), [("base", True), ("elsewhere", False)])
def test_a_licence_is_not_read_through_a_link_out_of_the_folder(
    tmp_path: Path, place: str, taken: bool
) -> None:
    parent = tiny.ancestor("qwen2")
    base, donor = (tiny.make("qwen2", tmp_path / n, ancestor=parent) for n in ("base", "donor"))
    (tmp_path / place / "docs").mkdir(parents=True)
    (tmp_path / place / "docs" / "card.md").write_text(LICENCE)
    (base / "README.md").symlink_to(tmp_path / place / "docs" / "card.md")
    out = merge(make_plan(base, donor), 0.3, tmp_path / "out")
    assert ("license: other" in (out / "README.md").read_text()) == taken


def test_only_the_beginning_of_the_bases_card_is_read(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    base, donor = (tiny.make("qwen2", tmp_path / n, ancestor=parent) for n in ("base", "donor"))
    (base / "README.md").write_text(f"---\nx: {'y' * (1 << 20)}\nlicense: mit\n---\n")
    out = merge(make_plan(base, donor), 0.3, tmp_path / "out")
    assert "license" not in (out / "README.md").read_text().split("# ")[0]


def test_adamms_json_holds_recipe_versions_and_digests(pair: Pair, merged: Path) -> None:
    recipe = json.loads((merged / "adamms.json").read_bytes())
    assert recipe["alpha"] == 0.3
    assert (recipe["base"], recipe["donor"]) == ("base", "donor")
    assert recipe["sidecars"] == {
        name: blake3(content).hexdigest()
        for name, content in seen(merged).items()
        if name not in PAPERS and content != b"(folder)" and not name.endswith(".safetensors")
    }
    assert recipe["version"] == __version__
    assert recipe["options"] == {
        "embeddings": "merge",
        "dtype": None,
        "unmatched": "stop",
        "rounding": "stochastic",
    }
    for side, folder in zip(("base", "donor"), pair, strict=True):
        assert {item["file"]: item["size"] for item in recipe["inputs"][side]} == {
            path.name: path.stat().st_size for path in folder.glob("*.safetensors")
        }
        for item in recipe["inputs"][side]:
            content = (folder / item["file"]).read_bytes()
            starts = [(len(content) - 4096) * i // 63 for i in range(64)]
            sample = str(len(content)).encode() + b"".join(content[i : i + 4096] for i in starts)
            assert item["sample_sha256"] == hashlib.sha256(sample).hexdigest()
    assert {item["file"]: (item["size"], item["blake3"]) for item in recipe["outputs"]} == {
        path.name: (path.stat().st_size, blake3(path.read_bytes()).hexdigest())
        for path in merged.glob("*.safetensors")
    }


def test_the_same_merge_elsewhere_gives_the_same_files(
    pair: Pair, whole: Files, tmp_path: Path
) -> None:
    assert seen(merge(make_plan(*pair), 0.3, tmp_path / "deep" / "out")) == whole


def test_rounding_to_nearest_is_another_merge_and_stays_with_it(
    pair: Pair, whole: Files, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(make_plan(*pair, rounding="nearest"), 0.3, out)
    with pytest.raises(OutputError, match="another"):
        merge(make_plan(*pair), 0.3, out)
    base, donor = (tiny.load(side) for side in pair)
    name = "model.layers.0.mlp.up_proj.weight"
    sides = base[name], donor[f"language_model.{name}"]
    bits = (side.view(torch.int16).numpy().view(np.uint16) for side in sides)
    assert tensor_bytes(out)[name] == reference.blend(*bits, ("BF16",) * 3, 0.3).tobytes()
    assert whole != seen(out)
    recipe = json.loads((out / "adamms.json").read_bytes())
    assert recipe["options"]["rounding"] == "nearest"
    assert verify(out, deep=True, base=pair[0], donor=pair[1]).rows
    del recipe["options"]["rounding"]  # as versions wrote it that knew no other rounding
    (out / "adamms.json").write_text(json.dumps(recipe))
    assert verify(out, deep=True, base=pair[0], donor=pair[1]).rows


def tensor_bytes(folder: Path) -> Files:
    found: Files = {}
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        for info in read_header(shard).tensors:
            found[info.name] = content[info.start : info.stop]
    return found


@pytest.mark.parametrize("size", [100_000, 1, 10**9])
def test_max_shard_size_regroups(pair: Pair, merged: Path, size: int, tmp_path: Path) -> None:
    out = merge(make_plan(*pair), 0.3, tmp_path / "out", size=size)
    shards = sorted(out.glob("*.safetensors"))
    if size == 10**9:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        assert not (out / INDEX).exists()
    else:
        total = len(shards)
        assert total > 3
        expected = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        assert [shard.name for shard in shards] == expected
        for shard in shards:
            info = read_header(shard)
            assert len(info.tensors) == 1 or info.tensors[-1].stop - info.data_start <= size
        index = json.loads((out / INDEX).read_bytes())
        assert set(index["weight_map"].values()) == set(expected)
    assert tensor_bytes(out) == tensor_bytes(merged)
    tiny.load_model(out)


def test_a_shard_may_be_filled_to_its_last_byte(pair: Pair) -> None:
    plan = make_plan(*pair)
    first, *_ = lay_out_shards(plan, plan.steps[0].nbytes + plan.steps[1].nbytes)
    assert list(first.offsets) == [step.name for step in plan.steps[:2]]


def plain(folder: Path, out: Path) -> Path:
    """The same checkpoint without folders inside."""
    return shutil.copytree(folder, out, ignore=shutil.ignore_patterns(".c*", "__*", "nested"))


def single(folder: Path, out: Path) -> Path:
    """The same checkpoint in one file."""
    plain(folder, out)
    for path in (*out.glob("*.safetensors"), out / INDEX):
        path.unlink()
    save_file(tiny.load(folder), out / "model.safetensors", {"format": "pt"})
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    return out


def test_a_single_file_stays_one_without_index(pair: Pair, merged: Path, tmp_path: Path) -> None:
    base = single(pair[0], tmp_path / "base")
    out = merge(make_plan(base, pair[1]), 0.3, tmp_path / "out")
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert tensor_bytes(out) == tensor_bytes(merged)
    tiny.load_model(out)


def test_a_single_file_gets_its_name_last(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the tokenizer's files it would load as a model without them."""
    named: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        named.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    merge(make_plan(*pair), 0.3, tmp_path / "out", size=10**9)
    assert "tokenizer_config.json" in named[:-1]
    assert named[-1] == "model.safetensors"


def test_a_bare_file_may_lie_beside_the_output(pair: Pair, tmp_path: Path) -> None:
    file = single(pair[0], tmp_path / "x") / "model.safetensors"
    base = tmp_path / "here" / "base.safetensors"
    base.parent.mkdir()
    file.rename(base)
    out = merge(make_plan(base, pair[1]), 0.3, tmp_path / "here" / "out")
    assert set(seen(out)) == {"model.safetensors", "README.md", "adamms.json"}


def test_a_bin_base_becomes_safetensors(pair: Pair, merged: Path, tmp_path: Path) -> None:
    base = tiny.to_bin(plain(pair[0], tmp_path / "plain"), tmp_path / "base")
    out = merge(make_plan(base, pair[1]), 0.3, tmp_path / "out")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    total = len(list(base.glob("*.bin")))
    assert shards == [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    assert not list(out.glob("*.bin*"))
    assert tensor_bytes(out) == tensor_bytes(merged)
    tiny.load_model(out)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_the_config_announces_the_outputs_dtype(pair: Pair, dtype: str, tmp_path: Path) -> None:
    spoken = DTYPES[dtype].torch
    out = merge(make_plan(*pair, dtype=DTYPES[dtype]), 0.3, tmp_path / "out")
    config = json.loads((out / "config.json").read_bytes())
    levels = [config, *(level for level in config.values() if isinstance(level, dict))]
    said = [level[key] for level in levels for key in ("dtype", "torch_dtype") if key in level]
    assert set(said) == {spoken}
    assert str(tiny.load_model(out).dtype) == f"torch.{spoken}"
    before = json.loads((pair[0] / "config.json").read_bytes())
    assert set(before) - {"dtype", "torch_dtype"} == set(config) - {"dtype", "torch_dtype"}


# What a search adds


FOUND: dict[str, Any] = {
    "alpha": 0.3,
    "measure": "joint",
    "prompts": 12,
    "candidates": [{"alpha": 0.0}, {"alpha": 0.3}, {"alpha": 0.6}],
    "notes": ["Only 12 prompts."],
}


def test_a_search_adds_its_document_and_its_files(pair: Pair, whole: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(make_plan(*pair), 0.3, out, search=FOUND, extra_files={"report.html": b"<p>found</p>"})
    files = seen(out)
    changed = {"adamms.json", "README.md"}
    assert {name for name in files if files[name] != whole.get(name)} == changed | {"report.html"}
    assert files["report.html"] == b"<p>found</p>"
    before, after = (json.loads(files["adamms.json"]) for files in (whole, files))
    assert after == before | FOUND


def test_the_card_says_how_alpha_was_chosen_only_if_it_was(
    pair: Pair, merged: Path, tmp_path: Path
) -> None:
    out = merge(make_plan(*pair), 0.3, tmp_path / "out", search=FOUND)
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (merged, out)]
    sentence = "Alpha was chosen without labels, by the answers to 12 prompts"
    assert [sentence in card for card in cards] == [False, True]
    assert "at the alphas 0, 0.3, 0.6 (measure: joint)" in cards[1]
    assert ModelCard.load(out / "README.md").data.to_dict()["base_model"] == ["base", "donor"]


def test_the_recipe_tells_what_was_done_whatever_the_search_says(
    pair: Pair, tmp_path: Path
) -> None:
    lies = FOUND | {"alpha": 0.6, "base": "x", "options": {}, "outputs": []}
    out = merge(make_plan(*pair), 0.3, tmp_path / "out", search=lies)
    recipe = json.loads((out / "adamms.json").read_bytes())
    assert recipe["alpha"] == 0.3
    assert recipe["base"] == "base"
    assert recipe["options"] and recipe["outputs"]


def test_a_search_of_the_base_is_not_taken_for_its_own(pair: Pair, tmp_path: Path) -> None:
    """A merged model may be merged again; its answers and report stay with it."""
    first = merge(
        make_plan(*pair),
        0.3,
        tmp_path / "first",
        search=FOUND,
        extra_files={"report.html": b"first"},
    )
    (first / ANSWERS).write_bytes(b"{}\n")
    plain = merge(make_plan(first, pair[1]), 0.1, tmp_path / "plain")
    assert not {ANSWERS, "report.html"} & set(seen(plain))
    assert "candidates" not in json.loads((plain / "adamms.json").read_bytes())
    second = merge(
        make_plan(first, pair[1]), 0.1, tmp_path / "second", extra_files={"report.html": b"second"}
    )
    assert (second / "report.html").read_bytes() == b"second"


def test_answers_of_an_unfinished_search_may_lie_in_the_output(
    pair: Pair, whole: Files, tmp_path: Path
) -> None:
    """And nothing else may."""
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / ANSWERS).write_bytes(b"{}\n")
    (work / "other").write_text("mine")
    assert_refused(pair, tmp_path / "out", "not empty")
    (work / "other").unlink()
    plan = make_plan(*pair)
    output = writer.prepare(plan, tmp_path / "out")
    output.check()
    assert [file.name for file in output.shards] == sorted(
        name for name in whole if name.endswith(".safetensors")
    )
    merge(plan, 0.3, tmp_path / "out")
    assert seen(tmp_path / "out") == whole | {ANSWERS: b"{}\n"}


def test_a_folder_that_was_filled_since_it_was_looked_at_is_left_alone(
    pair: Pair, tmp_path: Path
) -> None:
    """A search lies between the two, which may take hours."""
    out = tmp_path / "out"
    output = writer.prepare(make_plan(*pair), out)
    output.check()
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        writer.write(output, 0.3)
    assert [path.name for path in out.rglob("*")] == ["mine"]


# Refusals


def assert_refused(
    pair: Pair,
    out: Path,
    words: str,
    *,
    error: type[Exception] = OutputError,
    alpha: float = 0.3,
) -> None:
    """The merge is refused with these words, and neither output nor inputs change."""
    places = [out.parent, *(side.parent for side in pair)]
    before = [seen(place) for place in places]
    plan = make_plan(*pair)
    with pytest.raises(error, match=words):
        merge(plan, alpha, out)
    assert [seen(place) for place in places] == before


@pytest.mark.parametrize("where", ["base", "donor", "base/inside", "donor/in/side", "base/../base"])
def test_an_output_in_an_input_is_refused(pair: Pair, where: str) -> None:
    assert_refused(pair, pair[0].parent / where, "is the input .* or inside it")


@pytest.mark.parametrize(
    ("mine", "out", "words"),
    [
        ("out", "out", "is a file"),
        ("file", "file/out", "is a file"),
        ("out/x", "out", "not empty"),
        ("out/.hidden", "out", "not empty"),
        ("out/sub/x", "out", "not empty"),
    ],
)
def test_what_is_somebodys_own_is_left_alone(
    pair: Pair, mine: str, out: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    assert_refused(pair, tmp_path / out, words)


def test_an_output_in_an_input_is_refused_through_links(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pair[1])
    assert_refused(pair, tmp_path / "link" / "out", "is the input .* or inside it")


def test_a_finished_output_is_not_overwritten(pair: Pair, merged: Path) -> None:
    assert_refused(pair, merged, "is not empty: it holds a merge of other .*options;", alpha=0.4)


def test_the_same_merge_again_is_done_and_says_so(
    pair: Pair, merged: Path, whole: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    (merged / WORK).mkdir()
    times = {path: path.stat().st_mtime_ns for path in merged.glob("*")}
    assert main([*map(str, pair), "-o", str(merged), "--alpha", "0.3"]) == 0
    assert "holds this merge already, complete: nothing was written" in capsys.readouterr().err
    assert seen(merged) == whole
    assert {path: path.stat().st_mtime_ns for path in merged.glob("*")}.items() <= times.items()


def test_no_search_begins_where_a_merge_at_a_given_alpha_is_complete(
    pair: Pair, merged: Path
) -> None:
    with (
        prepare_merge(make_plan(*pair), merged) as job,
        pytest.raises(OutputError, match="holds a merge at a given alpha; choose another `out`"),
    ):
        _ = job.answers


def test_a_finished_output_that_has_lost_a_file_is_not_taken_for_done(
    pair: Pair, merged: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    min(out.glob("*.safetensors")).unlink()
    assert_refused(pair, out, "is missing", error=FormatError)


def test_an_empty_folder_will_do(pair: Pair, whole: Files, tmp_path: Path) -> None:
    assert seen(merge(make_plan(*pair), 0.3, tmp_path)) == whole


def test_a_small_disk_is_found_before_starting(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(pair, tmp_path / "a" / "out", "67.1 MB free, the output needs 67")


def test_a_resumed_merge_needs_space_for_what_is_missing_only(
    pair: Pair, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards in the work folder hold their space already, as do those with a final name."""
    output = writer.prepare(make_plan(*pair), tmp_path / "out")
    output.work.mkdir(parents=True)
    (output.work / JOURNAL).touch()
    published, begun, missing = sorted(merged.glob("*.safetensors"))
    shutil.copy(published, output.folder)
    shutil.copy(begun, output.work)
    begun_bytes = (output.work / begun.name).stat().st_blocks * 512
    needed = begun.stat().st_size - begun_bytes + missing.stat().st_size + (64 << 20)
    needed += sum(make_plan(*pair).base.sidecars().values())
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with nullcontext() if fits else pytest.raises(OutputError, match="free, the output needs"):
            output.check()


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("strangers")
    base = tiny.make("qwen2_vl", folder / "base", ancestor=tiny.ancestor("qwen2", 0))
    donor = tiny.make("qwen2", folder / "donor", ancestor=tiny.ancestor("qwen2", 1))
    return base, donor


def test_strangers_are_refused_unless_forced(strangers: Pair, tmp_path: Path) -> None:
    assert_refused(strangers, tmp_path / "out", "look unrelated", error=MappingError)
    notes: list[str] = []
    out = merge(make_plan(*strangers), 0.3, tmp_path / "out", force=True, note=notes.append)
    tiny.load_model(out)
    assert_noted("look unrelated .cosine similarity of .* because of `force=True`", notes, out)


def assert_noted(words: str, notes: list[str], out: Path) -> None:
    """Said once, and written down."""
    assert [bool(re.search(words, line)) for line in notes] == [True]
    assert re.search(words, json.loads((out / "adamms.json").read_bytes())["notes"][-1])


def test_a_model_merged_with_itself_is_noted(pair: Pair, tmp_path: Path) -> None:
    notes: list[str] = []
    copied = shutil.copytree(pair[0], tmp_path / "copy")
    out = merge(make_plan(pair[0], copied), 0.3, tmp_path / "out", note=notes.append)
    assert_noted("base and donor hold the same weights", notes, out)


# Unfinished merges


class StopError(Exception):
    """What the tests break a merge with from inside."""


def small_steps(monkeypatch: pytest.MonkeyPatch, durable: int = 50_000) -> None:
    monkeypatch.setattr(loop, "WINDOW", 4096)
    monkeypatch.setattr(sink, "WINDOW", 4096)
    monkeypatch.setattr(sink, "DURABLE", durable)


def break_off(pair: Pair, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a merge unfinished after so many windows."""
    calls = iter(range(after))

    def progress(_: int) -> None:
        if next(calls, None) is None:
            raise StopError

    with monkeypatch.context() as patch:
        small_steps(patch)
        with pytest.raises(StopError):
            merge(make_plan(*pair), 0.3, out, progress=progress)
    assert list(out.iterdir()) == [out / WORK]


def test_another_merge_does_not_touch_an_unfinished_one(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    break_off(pair, out, 50, monkeypatch)
    assert_refused(pair, out, "unfinished merge of other", alpha=0.4)
    assert seen(merge(make_plan(*pair), 0.3, out)) == whole


def test_a_running_merge_is_left_alone(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    break_off(pair, out, 50, monkeypatch)
    with (out / WORK / JOURNAL).open("rb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        for alpha in (0.3, 0.4):  # the other's is not to be deleted
            assert_refused(pair, out, "another run is writing there now", alpha=alpha)
    assert seen(merge(make_plan(*pair), 0.3, out)) == whole


def test_a_result_that_another_run_has_just_put_there_is_left_alone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not there when the folder was looked at, and holds no lock any more."""
    out, check = tmp_path / "out", kinship.check

    def overtaken(plan: Plan) -> Kinship:
        monkeypatch.setattr(kinship, "check", check)
        merge(plan, 0.6, out)
        return check(plan)

    monkeypatch.setattr(kinship, "check", overtaken)
    with pytest.raises(OutputError, match=f"{out}: another run has just put its result there"):
        merge(make_plan(*pair), 0.3, out)
    assert seen(out) == seen(merge(make_plan(*pair), 0.6, tmp_path / "other"))


def test_paths_that_are_not_utf8_come_back_from_the_recipe(pair: Pair, tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "b\udcffse")
    out = merge(make_plan(base, pair[1]), 0.3, tmp_path / "o\udcfft")
    assert json.loads((out / "adamms.json").read_text("utf-8"))["base"] == base.name
    assert (out / "README.md").read_text("utf-8")
    assert verify(out, deep=True, donor=pair[1]).rows


def test_what_is_published_tells_nothing_of_the_machine(
    pair: Pair, merged: Path, tmp_path: Path
) -> None:
    bare = single(pair[0], tmp_path / "single") / "model.safetensors"
    for out in (merged, merge(make_plan(bare, pair[1]), 0.3, tmp_path / "out")):
        for name in ("adamms.json", "README.md"):
            assert str(pair[0].parent) not in (out / name).read_text("utf-8")
            assert str(tmp_path) not in (out / name).read_text("utf-8")


def test_resuming_does_not_begin_again(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = make_plan(*pair)
    break_off(pair, out, 100, monkeypatch)
    done: list[int] = []
    assert seen(merge(plan, 0.3, out, progress=done.append)) == whole
    assert sum(done) == plan.bytes_written
    assert done[0] > plan.bytes_written // 3  # what was found done is reported first


@pytest.mark.parametrize("victim", ["shard", "journal's tail", "all shards"])
def test_what_was_lost_meanwhile_is_made_again(
    pair: Pair, whole: Files, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    break_off(pair, out, 100, monkeypatch)
    journal = out / WORK / JOURNAL
    if victim == "journal's tail":
        journal.write_bytes(journal.read_bytes()[:-7])
    else:
        made = sorted((out / WORK).glob("*.safetensors"))
        for shard in made if victim == "all shards" else made[:1]:
            shard.unlink()
    assert seen(merge(make_plan(*pair), 0.3, out)) == whole


def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    break_off(pair, out, 100, monkeypatch)
    first = min((out / WORK).glob("*.safetensors"))
    assert first.read_bytes() == whole[first.name]
    flip_last_bit(first)
    assert seen(merge(make_plan(*pair), 0.3, out)) == whole


def flip_last_bit(path: Path) -> None:
    """Change a file so that neither its size nor its time tells."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def copy_inputs(pair: Pair, folder: Path) -> Pair:
    base, donor = (Path(shutil.copytree(each, folder / each.name)) for each in pair)
    return base, donor


@pytest.mark.parametrize("side", [0, 1])
def test_inputs_that_change_while_they_are_merged_are_found_and_nothing_is_published(
    pair: Pair, side: int, tmp_path: Path
) -> None:
    inputs, out = copy_inputs(pair, tmp_path), tmp_path / "out"
    shard = max(inputs[side].glob("*.safetensors"))

    def overwrite(_: int) -> None:
        with shard.open("r+b") as file:  # not cut first: what is mapped of it would be gone
            file.write(b"\0")

    with pytest.raises(OutputError, match="was changed while it was merged, so nothing was"):
        merge(make_plan(*inputs), 0.3, out, progress=overwrite)
    assert list(out.iterdir()) == [out / WORK]
    assert not list((out / WORK).glob("*.safetensors")) and not (out / WORK / JOURNAL).exists()


@pytest.mark.parametrize("side", [0, 1])
def test_a_merge_is_not_resumed_with_other_bytes_of_the_same_size_and_time(
    pair: Pair, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, out = copy_inputs(pair, tmp_path / "in"), tmp_path / "out"
    break_off(inputs, out, 50, monkeypatch)
    flip_last_bit(max(inputs[side].glob("*.safetensors")))
    assert_refused(inputs, out, "unfinished merge of other inputs")


def test_samples_of_an_input_are_read_whole(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read may return less than it was asked for, and the digest would be another."""

    class ShortFile(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:1000]) or 0

    def read_short(fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        return len(os.pread(fd, 1000, offset))

    plan = make_plan(*pair)
    before = digest_inputs(plan)
    monkeypatch.setattr(os, "preadv", read_short)
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedReader(ShortFile(path, mode)))
    assert digest_inputs(plan) == before


@pytest.mark.parametrize("content", [None, b"", b'{"merge": "12'])
def test_a_merge_killed_before_its_first_line_is_begun_again(
    pair: Pair, whole: Files, content: bytes | None, tmp_path: Path
) -> None:
    """The kill may fall between the making of the work folder and its journal's first line."""
    (tmp_path / "out" / WORK).mkdir(parents=True)
    if content is not None:
        (tmp_path / "out" / WORK / JOURNAL).write_bytes(content)
    assert seen(merge(make_plan(*pair), 0.3, tmp_path / "out")) == whole


@pytest.mark.parametrize("nth", [0, 1])
def test_a_shard_that_is_durable_but_not_yet_noted_is_finished(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last bytes may have been made durable on their own before it was digested and noted."""
    parent = tiny.ancestor("qwen2")
    base, donor = (
        tiny.make("qwen2", tmp_path / name, ancestor=parent, seed=seed, max_shard_size="100KB")
        for seed, name in enumerate(("base", "donor"))
    )
    plan = make_plan(base, donor)
    calls = iter(range(nth))
    finish = ShardFile.finish

    def failing(shard: ShardFile) -> tuple[int, str]:
        if next(calls, None) is None:
            shard.close()
            raise StopError
        return finish(shard)

    assert len(list(base.glob("*.safetensors"))) > 1
    with monkeypatch.context() as patch:
        small_steps(patch, durable=1)
        patch.setattr(loop, "WINDOW", 128)  # so that a window ends where the shard does
        patch.setattr(ShardFile, "finish", failing)
        with pytest.raises(StopError):
            merge(plan, 0.3, tmp_path / "out")
    assert seen(merge(plan, 0.3, tmp_path / "out")) == seen(merge(plan, 0.3, tmp_path / "whole"))


SETUP = """
from lowmem_adamms.merging import disk_sink, loop, writer
loop.WINDOW = disk_sink.WINDOW = 12_288  # with whole pages, for the page cache to be passed by
writer._physical_memory = lambda: 0
disk_sink.DURABLE = 50_000
"""
WRITES = ("os.pwrite", "os.fsync", "os.fdatasync", "os.posix_fallocate")
RENAMES = ("pathlib.Path.replace",)


@pytest.fixture(scope="module")
def drive(forker: Forker, pair: Pair) -> Drive:
    """A merge in a process of its own, sent a signal before call `at` of these calls."""

    def merge_until(out: Path, calls: Sequence[str], at: int, number: int = signal.SIGKILL) -> Done:
        words = (*pair, "-o", out, "--alpha", "0.3")
        return forker.run(words, calls, at, number=number, setup=NUMPY_KERNEL + SETUP)

    return merge_until


def number_of(calls: Sequence[str], drive: Drive, folder: Path) -> int:
    """How many of these calls an undisturbed merge makes."""
    done = drive(folder / "undisturbed", calls, -1)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("calls ")[1])


def assert_nothing_incomplete(out: Path, whole: Files) -> None:
    """What has a final name is whole; the index is there only if everything is."""
    final = {name: what for name, what in seen(out).items() if not name.startswith(WORK)}
    assert {name: whole.get(name) for name in final} == final
    if INDEX in final:
        assert {name for name in whole if name.endswith(".safetensors")} <= set(final)


def kill_and_resume(
    pair: Pair, drive: Drive, out: Path, whole: Files, calls: Sequence[str], at: int
) -> None:
    done = drive(out, calls, at)
    assert done.returncode == -signal.SIGKILL, (calls, at, done.stderr)
    assert_nothing_incomplete(out, whole)
    if seen(out) != whole:  # else all was done but the last fsync
        assert main([*map(str, pair), "-o", str(out), "--alpha", "0.3"]) == 0, (calls, at)
    assert seen(out) == whole, (calls, at)


def test_killed_while_writing_it_resumes_to_the_same_bytes(
    pair: Pair, drive: Drive, whole: Files, tmp_path: Path
) -> None:
    total = number_of(WRITES, drive, tmp_path)
    assert total > 100
    moments = {0, 1, total - 1, *random.Random(0).sample(range(total), 5)}
    for at in sorted(moments):
        kill_and_resume(pair, drive, tmp_path / str(at), whole, WRITES, at)


def test_killed_while_publishing_it_resumes_to_the_same_bytes(
    pair: Pair, drive: Drive, whole: Files, tmp_path: Path
) -> None:
    total = number_of(RENAMES, drive, tmp_path)
    assert total == sum(what != b"(folder)" for what in whole.values())
    for at in (0, 1, total // 2, total - 1):
        kill_and_resume(pair, drive, tmp_path / str(at), whole, RENAMES, at)


@pytest.mark.parametrize("nth", range(4))
def test_killed_while_clearing_up_it_resumes_to_the_same_bytes(
    pair: Pair, drive: Drive, whole: Files, nth: int, tmp_path: Path
) -> None:
    """Between the last rename and the end: journal and folders go one by one."""
    out = tmp_path / "out"
    done = drive(out, ("os.unlink", "os.rmdir"), nth)
    if nth == 0:
        assert done.returncode == -signal.SIGKILL
    assert_nothing_incomplete(out, whole)
    assert main([*map(str, pair), "-o", str(out), "--alpha", "0.3"]) == 0
    assert seen(out) == whole


@pytest.mark.parametrize("at", [5, 90])
def test_ctrl_c_exits_130_and_says_how_to_resume(
    pair: Pair, drive: Drive, whole: Files, at: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = drive(out, WRITES, at, signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted: run the same command again to resume"
    assert "Traceback" not in done.stderr
    assert_nothing_incomplete(out, whole)
    assert main([*map(str, pair), "-o", str(out), "--alpha", "0.3"]) == 0
    assert seen(out) == whole


def test_every_file_is_on_the_disk_before_it_gets_its_name(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    named: list[str] = []
    replace = Path.replace

    def fsync(fd: int) -> None:
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def checked(path: Path, target: Path) -> Path:
        assert synced[path.stat().st_ino] == path.stat().st_size
        named.append(str(target.relative_to(tmp_path / "out")))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", checked)
    found = {"report.html": b"<p>", ANSWERS: b"{}\n"}
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / ANSWERS).write_bytes(found[ANSWERS])
    merge(
        make_plan(*pair), 0.3, tmp_path / "out", extra_files={"report.html": found["report.html"]}
    )
    files = whole | found
    assert sorted(named) == sorted(name for name, what in files.items() if what != b"(folder)")
    assert named[-1] == INDEX
    assert seen(tmp_path / "out") == files
    assert (tmp_path / "out").stat().st_ino in synced


# A full disk, and systems that lack a call


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
def test_a_full_disk_is_one_line_and_can_be_resumed(
    pair: Pair,
    whole: Files,
    call: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = iter(range({"pwrite": 50, "posix_fallocate": 1}.get(call, 3)))
    real: Callable[..., Any] = getattr(os, call)

    def full(*args: Any) -> Any:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    command = [*map(str, pair), "-o", str(tmp_path / "out"), "--alpha", "0.3"]
    with monkeypatch.context() as patch:
        small_steps(patch)
        patch.setattr(os, call, full)
        assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: disk full")
    assert_nothing_incomplete(tmp_path / "out", whole)
    assert main(command) == 0
    assert seen(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("pwrite", errno.EIO, "check the disk"),
        ("fsync", errno.EIO, "check the disk"),
        ("posix_fallocate", errno.EFBIG, "--max-shard-size"),
        ("open", errno.EMFILE, "ulimit -n"),
    ],
)
def test_what_else_a_system_may_refuse_is_one_line_and_can_be_resumed(
    pair: Pair,
    whole: Files,
    call: str,
    number: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real: Callable[..., Any] = getattr(os, call)
    asked = iter(range(1))

    def failing(*args: Any, **options: Any) -> Any:
        of_a_shard = call != "open" or str(args[0]).endswith(".safetensors")
        if of_a_shard and next(asked, None) is None:
            raise OSError(number, os.strerror(number), *args[:1] if call == "open" else ())
        return real(*args, **options)

    command = [*map(str, pair), "-o", str(tmp_path / "out"), "--alpha", "0.3"]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: .*\.partial/.*: {os.strerror(number)}; .*{words}", line)
    assert line.endswith("run the same command to resume")
    assert main(command) == 0
    assert seen(tmp_path / "out") == whole


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_shard_that_is_deleted_meanwhile_is_one_line_and_can_be_resumed(
    pair: Pair, whole: Files, side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, out = copy_inputs(pair, tmp_path), tmp_path / "out"
    folder = inputs[1] if side == "input" else out / WORK

    def delete(_: int) -> None:
        for shard in folder.glob("*.safetensors"):
            shard.rename(tmp_path / shard.name)

    words = "No such file or directory" if side == "input" else "was deleted while the merge ran"
    with pytest.raises((OSError, OutputError), match=words):
        merge(make_plan(*inputs), 0.3, out, progress=delete)
    assert list(out.iterdir()) == [out / WORK]
    for shard in tmp_path.glob("*.safetensors"):
        shard.rename(inputs[1] / shard.name) if side == "input" else shard.unlink()
    command = [*map(str, inputs), "-o", str(out), "--alpha", "0.3"]
    assert main(command) == 0
    assert tensor_bytes(out).keys() == tensor_bytes(inputs[0]).keys()


def test_systems_that_lack_calls_write_the_same_bytes(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("posix_fadvise", "posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(stream, "_libc_sync_file_range", None)
    monkeypatch.setattr(stream, "_libc_madvise", None)
    monkeypatch.setattr(writer, "_physical_memory", lambda: 0)  # so that pages are evicted
    small_steps(monkeypatch, durable=10_000)
    assert seen(merge(make_plan(*pair), 0.3, tmp_path / "out")) == whole


@pytest.mark.parametrize("side", [0, 1])
def test_an_input_cut_after_the_plan_is_one_error(
    pair: Pair, whole: Files, side: int, tmp_path: Path
) -> None:
    inputs = copy_inputs(pair, tmp_path)
    plan = make_plan(*inputs)
    shard = max(inputs[side].glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = shard.stat().st_size - 10  # what was sampled before is still there
    os.truncate(shard, size)
    with pytest.raises(FormatError, match=f"{shard.name}: {size} bytes, expected"):
        merge(plan, 0.3, tmp_path / "out", force=True)
    assert_nothing_incomplete(tmp_path / "out", whole)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / WORK]


def test_short_writes_are_gone_on_with(
    pair: Pair, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    small_steps(monkeypatch)
    assert seen(merge(make_plan(*pair), 0.3, tmp_path / "out")) == whole
