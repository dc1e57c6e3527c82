"""Quantized outputs: the bytes that transformers would save, in our shards, whatever happens."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny import raw, seen

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header, read_header
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.cli import main
from lowmem_adamms.errors import FormatError, MappingError, MergeError, RecipeError
from lowmem_adamms.live import transformers_model as loading
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placing import place
from lowmem_adamms.mapping.plan import Part, Plan, Step
from lowmem_adamms.merging import disk_sink as sink
from lowmem_adamms.merging import loop
from lowmem_adamms.merging.journal import WORK
from lowmem_adamms.merging.shard_layout import Entry
from lowmem_adamms.merging.verify import verify
from lowmem_adamms.quantizing import quantization
from lowmem_adamms.quantizing.quantization import prepare
from lowmem_adamms.quantizing.quantized_layout import Method, QuantizedLayout
from lowmem_adamms.settings import PlacementSettings
from lowmem_adamms.values import parse_dtype

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

from lowmem_adamms.quantizing import quantizing_sink as quantized_sink

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
METHODS: tuple[Method, ...] = ("nf4", "int8")
PAIRS = {
    "qwen2_vl": "llava_onevision",
    "qwen3_vl": "qwen3",
    "llava": "llama",
    "mistral": "llava",
}
BOTH_WAYS = (("qwen2_vl", "int8"), ("llava", "int8"))
Plain = Callable[[str], tuple[Plan, Path]]
Contents = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]
Capture = pytest.CaptureFixture[str]


def contents(tensors: dict[str, torch.Tensor]) -> Contents:
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in tensors.items()}


def loaded(folder: Path, quantize: str | None = None) -> Any:
    return loading.load_model(
        folder, device="cpu", dtype="auto", quantize=quantize, trust_remote_code=False
    )


def files(folder: Path) -> dict[str, bytes]:
    """What is seen there; nothing is left of the work."""
    assert not (folder / WORK).exists()
    return seen(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Plain:
    """A family's plan, and what a merge at 0.3 makes of it without --quantize."""
    made: dict[str, tuple[Plan, Path]] = {}
    parent = tiny.ancestor("mistral")

    def pair(family: str) -> tuple[Plan, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            donor = tiny_models[PAIRS[family]]
            if family == "mistral":
                donor = tiny.make("mistral", root / "donor", ancestor=parent, seed=2)
            plan = make_plan(tiny_models[family], donor)
            made[family] = plan, merge(plan, 0.3, root / "plain")
        return made[family]

    return pair


@pytest.fixture(scope="module")
def outs(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen2-VL quantized both ways. Read only."""
    root = tmp_path_factory.mktemp("quantized")
    plan, _ = plain("qwen2_vl")
    return {method: merge(plan, 0.3, root / method, quantize=method) for method in METHODS}


# The promise


@pytest.mark.parametrize(("family", "method"), [*((family, "nf4") for family in PAIRS), *BOTH_WAYS])
def test_the_bytes_are_those_that_transformers_saves(
    family: str, method: Method, plain: Plain, tmp_path: Path
) -> None:
    plan, unquantized = plain(family)
    out = merge(plan, 0.3, tmp_path / "out", quantize=method)
    model = loaded(unquantized, method)
    with loading.quiet():
        model.save_pretrained(tmp_path / "saved")
    ours, theirs = contents(tiny.load(out)), contents(tiny.load(tmp_path / "saved"))
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert sum(name.endswith((".absmax", ".SCB")) for name in ours) >= 2 * 7
    config, saved = (
        json.loads((folder / "config.json").read_bytes())["quantization_config"]
        for folder in (out, tmp_path / "saved")
    )
    assert config == saved
    assert contents(loaded(out).state_dict()) == contents(model.state_dict())


def mixed(folder: Path) -> Path:
    """Norms in float32 and values in float16 under a config of bfloat16."""
    tensors = {
        name: t.float() if "norm" in name else t.half() if "v_proj" in name else t
        for name, t in tiny.load(folder).items()
    }
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def silent(folder: Path) -> Path:
    """A config that says no dtype."""
    config = json.loads((folder / "config.json").read_bytes())
    for level in (config, config["text_config"], config["vision_config"]):
        level.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def respelled(folder: Path) -> Path:
    return tiny.respell(folder, tiny.modern, folder.with_name("modern"))


@pytest.mark.parametrize(
    ("change", "dtype", "method"),
    [
        (mixed, None, "nf4"),
        (mixed, None, "int8"),
        (silent, None, "nf4"),
        (respelled, None, "nf4"),
        (mixed, "fp16", "int8"),
        (silent, "fp32", "nf4"),
    ],
)
def test_it_loads_as_the_merged_checkpoint_does_quantized(
    change: Callable[[Path], Path],
    dtype: str | None,
    method: Method,
    tiny_models: dict[str, Path],
    ancestors: dict[str, tiny.Tensors],
    tmp_path: Path,
) -> None:
    """Other dtypes on disk than in memory, and names that transformers changes as it loads."""
    base = change(tiny.make("qwen2_vl", tmp_path / "base", ancestor=ancestors["qwen2"]))
    wanted = DTYPES[parse_dtype(dtype)] if dtype else None
    plan = make_plan(base, tiny_models["llava_onevision"], dtype=wanted)
    unquantized = merge(plan, 0.3, tmp_path / "plain")
    out = merge(plan, 0.3, tmp_path / "out", quantize=method)
    model = loaded(out)
    assert contents(model.state_dict()) == contents(loaded(unquantized, method).state_dict())
    assert any(map(loading.is_quantized, model.parameters()))
    verify(out, deep=True)


def test_tied_tables_stay_whole(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2", tied=True)
    base, donor = (
        tiny.make("qwen2", tmp_path / name, ancestor=parent, seed=seed, tied=True)
        for seed, name in enumerate(("base", "donor"))
    )
    plan = make_plan(base, donor)
    out = merge(plan, 0.3, tmp_path / "out", quantize="nf4")
    assert tiny.load(out)["model.embed_tokens.weight"].dtype == torch.bfloat16
    unquantized = loaded(merge(plan, 0.3, tmp_path / "plain"), "nf4")
    assert contents(loaded(out).state_dict()) == contents(unquantized.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_remote_code_is_asked_as_well(
    method: Method,
    tiny_models: dict[str, Path],
    talking: dict[str, Path],
    tmp_path: Path,
) -> None:
    plan = make_plan(talking["cogvlm"], tiny_models["llava"])
    with pytest.raises(RecipeError, match="`trust_remote_code=True`"):
        merge(plan, 0.3, tmp_path / "out", quantize=method)
    out = merge(plan, 0.3, tmp_path / "out", quantize=method, trust_remote_code=True)
    assert sum(name.endswith((".absmax", ".SCB")) for name in tiny.load(out)) >= 2 * 7


@pytest.mark.parametrize(
    ("alpha", "method"), [(0, "nf4"), (0.3, "nf4"), (0.3, "int8"), (1, "int8")]
)
def test_what_a_quantized_search_asks_is_what_is_written(
    alpha: float, method: Any, plain: Plain, tmp_path: Path
) -> None:
    """The ends are copies, which take another way than blends."""
    plan, _ = plain("llava")
    placement = place(
        plan,
        Memory(1 << 40, None, None),
        PlacementSettings(device="cpu", live_quantize=method),
    )
    with LiveModel(plan, placement=placement) as live:
        live.apply(alpha)
        asked = contents(live.model.state_dict())
    out = merge(plan, alpha, tmp_path / "out", quantize=method)
    assert contents(loaded(out).state_dict()) == asked


# Piece by piece


class Collected:
    """A disk sink that keeps what it is given."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def slot(self, entry: Entry, offset: int, nbytes: int) -> Any:
        assert nbytes <= 4096
        buffer = self.made.setdefault(entry.name, np.zeros(entry.nbytes, np.uint8))
        return buffer[offset : offset + nbytes]

    def write_quant_state(self, entry: Entry, content: bytes) -> None:
        self.made[entry.name] = np.frombuffer(content, np.uint8)

    def commit(self) -> None:
        pass


SHAPES = [(1, 1), (1, 64), (3, 37), (5, 64), (7, 129), (2, 40_000), (300, 200)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_any_size_come_out_as_the_whole(
    method: Any,
    dtype: str,
    shape: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bnb = importlib.import_module("bitsandbytes")
    monkeypatch.setattr(quantized_sink, "CHUNK", 1024)
    monkeypatch.setattr(quantized_sink, "WINDOW", 4096)
    random = torch.Generator().manual_seed(shape[1])
    values = torch.randn(shape, generator=random).to(getattr(torch, DTYPES[dtype].torch or ""))
    span = Span(tmp_path / "x", DTYPES[dtype], 0, values.nbytes, shape)
    step = Step("m.weight", DTYPES[dtype], shape, "MLP", "", (Part((0, shape[0]), "r", span),))
    how = QuantizedLayout(method, DTYPES[dtype], frozenset({"m.weight"}), {})
    disk: Any = Collected()
    content = np.frombuffer(raw(values), np.uint8)
    with quantized_sink.QuantizingSink(disk, how, tmp_path) as stage:
        cuts = {0, 4, 8, *range(1000, content.size, 3000), content.size}
        for start, stop in pairwise(sorted(cut for cut in cuts if cut <= content.size)):
            stage.slot(step, start, stop - start)[...] = content[start:stop]
            stage.commit()
    if method == "nf4":
        weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4").to("cpu")
        expected = {"m.weight": weight.data}
        expected |= {f"m.weight.{k}": v for k, v in weight.quant_state.as_dict(packed=True).items()}
    else:
        weight = bnb.nn.Int8Params(values, requires_grad=False).to("cpu")
        layout = torch.zeros(1, dtype=torch.uint8)
        expected = {"m.weight": weight.data, "m.SCB": weight.SCB, "m.weight_format": layout}
    assert {name: made.tobytes() for name, made in disk.made.items()} == {
        name: raw(tensor) for name, tensor in expected.items()
    }


def small_steps(monkeypatch: pytest.MonkeyPatch, window: int = 4096) -> None:
    for room in (loop, sink, quantized_sink):
        monkeypatch.setattr(room, "WINDOW", window)
    monkeypatch.setattr(quantized_sink, "CHUNK", window // 8)
    monkeypatch.setattr(sink, "DURABLE", 10_000)


# The folder


@pytest.mark.parametrize("method", METHODS)
def test_shards_are_the_bases_unless_a_size_is_given(
    method: Method, plain: Plain, tmp_path: Path
) -> None:
    plan, unquantized = plain("llava")
    kept = merge(plan, 0.3, tmp_path / "kept", quantize=method)
    names = sorted(path.name for path in unquantized.glob("*.safetensors"))
    assert len(names) > 1
    assert sorted(path.name for path in kept.glob("*.safetensors")) == names
    out = merge(plan, 0.3, tmp_path / "out", quantize=method, max_shard_size=60_000)
    made = [read_header(shard) for shard in out.glob("*.safetensors")]
    assert len(made) > len(names)
    assert all(head.tensors[-1].stop - head.data_start <= 60_000 for head in made)
    assert contents(tiny.load(out)) == contents(tiny.load(kept))


@pytest.mark.parametrize("method", METHODS)
def test_index_and_headers_fit_and_every_tensor_is_aligned(
    method: Method,
    ancestors: dict[str, tiny.Tensors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An odd width makes tensors of odd sizes; older readers take none that is not aligned."""
    monkeypatch.setattr(tiny, "INNER", 97)
    parent = tiny.ancestor("qwen2")
    base = tiny.make("qwen2", tmp_path / "base", ancestor=parent, max_shard_size="60KB")
    plan = make_plan(base, tiny.make("qwen2", tmp_path / "donor", ancestor=parent, seed=2))
    out = merge(plan, 0.3, tmp_path / "out", quantize=method)
    index = json.loads((out / INDEX).read_bytes())
    total = 0
    for shard in out.glob("*.safetensors"):
        head = read_header(shard)
        assert dict(head.metadata) == {"format": "pt"}
        for info in head.tensors:
            assert info.start * 8 % info.dtype.bits == 0
            assert index["weight_map"][info.name] == shard.name
            total += info.stop - info.start
    assert index["metadata"]["total_size"] == total
    unquantized = loaded(merge(plan, 0.3, tmp_path / "plain"), method)
    assert contents(loaded(out).state_dict()) == contents(unquantized.state_dict())


@pytest.mark.parametrize(("method", "bits"), [("nf4", "4-bit"), ("int8", "8-bit")])
def test_the_papers_say_what_it_is(method: Method, bits: str, outs: dict[str, Path]) -> None:
    card = ModelCard.load(outs[method] / "README.md")
    assert {"bitsandbytes", bits, "merge"} <= set(card.data.to_dict()["tags"])
    assert f"{bits[0]} bit" in card.text
    paper = json.loads((outs[method] / "adamms.json").read_bytes())["quantized"]
    scales = [n for n in tiny.load(outs[method]) if n.endswith((".SCB", ".quant_map"))]
    assert (paper["method"], paper["dtype"]) == (method, "BF16")
    assert paper["tensors"] == len([n for n in scales if "nested" not in n])


def test_the_command_writes_it_and_the_plan_foretells_its_size(
    plain: Plain,
    outs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    plan, unquantized = plain("qwen2_vl")
    pair = (str(plan.base.path), str(plan.donor.path))
    words = ("--quantize", "nf4", "--alpha", "0.3")
    with monkeypatch.context() as patch:
        asked: list[Path] = []
        ask = loading.build_skeleton

        def counted(folder: Path, **options: Any) -> Any:
            asked.append(folder)
            return ask(folder, **options)

        patch.setattr(loading, "build_skeleton", counted)
        assert main(["merge", *pair, "-o", str(tmp_path / "out"), *words]) == 0
        assert len(asked) == 1  # it takes seconds, and as it has to be known first, is kept
    assert "24 of them quantized to nf4" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(outs["nf4"])
    assert main(["plan", *pair, "--quantize", "nf4"]) == 0
    assert "(about; nf4 of bitsandbytes)" in capsys.readouterr().out
    for method in METHODS:
        assert main(["plan", *pair, "--json", "--quantize", method]) == 0
        foretold = json.loads(capsys.readouterr().out)["forecast"]["disk_needed"]
        tensors = tiny.load(outs[method]).items()
        written = sum(t.nbytes for n, t in tensors if "quant_map" not in n and "state" not in n)
        assert 0.95 * written < foretold < 1.05 * written
        assert foretold < sum(t.nbytes for t in tiny.load(unquantized).values())
    assert (
        main(["merge", *pair, "-o", str(tmp_path / "whole"), "--quantize", "none", *words[2:]]) == 0
    )
    assert contents(tiny.load(tmp_path / "whole")) == contents(tiny.load(unquantized))


# Refusals


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("repacks", [True, False])
def test_an_output_that_cannot_run_here_is_noted(
    method: Method, repacks: bool, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes itself says where this CPU repacks: the tiny tower has 48 rows."""
    monkeypatch.setattr(quantization, "repacks_4bit", lambda: repacks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan, _ = plain("qwen2_vl")
    notes: list[str] = []
    merge(plan, 0.3, tmp_path / "out", quantize=method, note=notes.append)
    found = [note for note in notes if note.startswith("the output is for other machines")]
    assert len(found) == (method == "nf4" and repacks)
    assert all(
        re.search(r"cannot run \S+ in 4 bit on this CPU: it is \d+ x", note) for note in found
    )
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_bytes())
    assert not set(found) & set(recipe["notes"]), "what is pushed tells nothing of this machine"


def test_it_cannot_be_merged_again(outs: dict[str, Path]) -> None:
    for out in outs.values():
        with pytest.raises(
            FormatError, match=r"weights quantized in this way cannot be blended.*bitsandbytes"
        ):
            open_checkpoint(out)


def test_what_is_missing_is_named_in_one_line(
    plain: Plain, tmp_path: Path, hide_package: Callable[[str], None], capsys: Capture
) -> None:
    hide_package("bitsandbytes")
    plan, _ = plain("llava")
    words = (str(plan.base.path), str(plan.donor.path), "-o", str(tmp_path / "out"))
    assert main(["merge", *words, "--alpha", "0.3", "--quantize", "nf4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["note", "error"]
    assert "nf4 needs bitsandbytes, which is not installed" in lines[-1]
    assert not (tmp_path / "out").exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_config, "no config.json in it"),
        (unknown_model, "model type `unheard_of`"),
        (wider, r"is \[96, 64\], its config makes it \[128, 64\]|is \[64, 96\]"),
    ],
)
def test_a_base_that_transformers_would_not_load_is_refused(
    spoil: Callable[[Path], None],
    words: str,
    ancestors: dict[str, tiny.Tensors],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    base = tiny.make("qwen2", tmp_path / "base", ancestor=ancestors["qwen2"])
    spoil(base)
    plan = make_plan(base, tiny_models["llava_onevision"])
    with pytest.raises(FormatError, match=words):
        merge(plan, 0.3, tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists()


def test_names_that_transformers_ignores_are_refused(
    ancestors: dict[str, tiny.Tensors], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """LLaVA-1.5 as its authors publish it: no class of transformers reads these names."""
    made = tiny.make("llava", tmp_path / "made", ancestor=ancestors["llama"])
    base = tiny.respell(made, tiny.llava_original, tmp_path / "base")
    with pytest.raises(MappingError, match="transformers does not load"):
        prepare(make_plan(base, tiny_models["llama"]), "nf4")


def test_other_methods_and_bare_files_are_refused(tmp_path: Path, plain: Plain) -> None:
    plan, unquantized = plain("llava")
    with pytest.raises(RecipeError, match="expected nf4 or int8"):
        prepare(plan, "fp4")
    save_file(tiny.load(unquantized), tmp_path / "bare.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="a bare file cannot be quantized"):
        prepare(make_plan(tmp_path / "bare.safetensors", plan.donor.path), "nf4")


# Broken off


class StopError(BaseException):
    """Raised where a process would be killed."""


CALLS = ("pwrite", "fsync", "fdatasync", "ftruncate", "replace")


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Raise before call `at` of those that change the disk; returns the list of calls so far."""
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) > at >= 0:
                raise StopError
            return call(*args, **options)

        return wrapper

    for name in CALLS:
        home: Any = Path if name == "replace" else os
        monkeypatch.setattr(home, name, counted(name, getattr(home, name)))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_broken_off_anywhere_it_resumes_to_the_same_bytes(
    method: Method,
    plain: Plain,
    outs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, _ = plain("qwen2_vl")
    small_steps(monkeypatch, 16_384)
    with monkeypatch.context() as patch:
        calls = stopping(patch, -1)
        undisturbed = merge(plan, 0.3, tmp_path / "undisturbed", quantize=method)
    assert files(undisturbed) == files(outs[method])  # small windows leave no trace
    # Amid it, just before and after a shard gets its final size, and at the end
    ends = [i for i, name in enumerate(calls) if name == "ftruncate"]
    moments = {len(calls) // 3, ends[-1], ends[-1] + 1, len(calls) - 1}
    for at in sorted(moments):
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            stopping(patch, at)
            with pytest.raises(StopError):
                merge(plan, 0.3, out, quantize=method)
        if (out / WORK).exists():  # else only the last fsync was missing
            merge(plan, 0.3, out, quantize=method)
        assert files(out) == files(outs[method]), (at, calls[at])


def test_a_resumed_run_writes_only_what_is_missing(
    plain: Plain, outs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quant states that were journalled are not made again."""
    plan, _ = plain("qwen2_vl")
    small_steps(monkeypatch)
    puts: list[str] = []
    slot = sink.DiskSink.slot

    def noted(self: Any, step: Any, offset: int, nbytes: int) -> Any:
        puts.append(step.name)
        if len(puts) == 150:
            raise StopError
        return slot(self, step, offset, nbytes)

    monkeypatch.setattr(sink.DiskSink, "slot", noted)
    with pytest.raises(StopError):
        merge(plan, 0.3, tmp_path / "out", quantize="nf4")
    first, puts[:] = set(puts), ["resumed"] * 150
    merge(plan, 0.3, tmp_path / "out", quantize="nf4")
    again = set(puts[150:])
    assert len(first - again) > 10
    assert files(tmp_path / "out") == files(outs["nf4"])


def test_another_method_is_another_merge(
    plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = plain("llava")
    with monkeypatch.context() as patch:
        stopping(patch, 20)
        with pytest.raises(StopError):
            merge(plan, 0.3, tmp_path / "out", quantize="nf4")
    for other in ("int8", None):
        with pytest.raises(MergeError, match="unfinished merge of other inputs or options"):
            merge(plan, 0.3, tmp_path / "out", quantize=other)


# Verified


def test_digests_are_verified_and_rows_are_not(
    outs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = shutil.copytree(outs["nf4"], tmp_path / "out")
    found = verify(out, deep=True)
    assert (found.tensors, found.rows) == (len(tiny.load(out)), None)
    assert main(["verify", str(out), "--deep"]) == 0
    assert "the output is quantized: its digests were checked" in capsys.readouterr().err
    shard = min(out.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    verify(out)
    with pytest.raises(FormatError, match="BLAKE3"):
        verify(out, deep=True)


def test_a_recipe_that_says_otherwise_is_found(outs: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(outs["nf4"], tmp_path / "out")
    path = out / "adamms.json"
    recipe = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: recipe[key] for key in recipe if key != "quantized"}))
    with pytest.raises(FormatError, match="weights quantized in this way cannot be blended"):
        verify(out)
    path.write_text(json.dumps({**recipe, "quantized": "nf4"}))
    with pytest.raises(FormatError, match="not a recipe"):
        verify(out)


# Memory


WEIGHED = """
import sys, threading, time
from pathlib import Path
from lowmem_adamms import make_plan, merge
from lowmem_adamms.kernels import cpu
from lowmem_adamms.quantizing import quantization, quantizing_sink
import torch

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

base, donor, out, *methods = sys.argv[1:]
plan = make_plan(base, donor)
for method in methods:
    quantization.prepare(plan, method)
cpu.warm()
quantizing_sink._bitsandbytes().quantize_4bit(torch.zeros(64), quant_type="nf4")
before = anonymous()

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)

for method in methods:
    peak, done = before, False
    watcher = threading.Thread(target=watch)
    watcher.start()
    merge(plan, 0.3, Path(out, method), quantize=method, force=True)
    done = True
    watcher.join()
    print("grew", peak - before)
"""


def a_layer_of_seven_billion(folder: Path) -> Path:
    """One layer 4096 wide with the MLP of a 7B model, heads made small; holes for numbers."""
    wide, inner, rows, bf16 = 4096, 11008, 256, DTYPES["BF16"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (rows, wide),
        **{f"model.layers.0.self_attn.{role}_proj": (rows, wide) for role in "qkv"},
        "model.layers.0.self_attn.o_proj": (wide, rows),
        "model.layers.0.mlp.gate_proj": (inner, wide),
        "model.layers.0.mlp.up_proj": (inner, wide),
        "model.layers.0.mlp.down_proj": (wide, inner),
        "model.layers.0.input_layernorm": (wide,),
        "model.layers.0.post_attention_layernorm": (wide,),
        "model.norm": (wide,),
        "lm_head": (rows, wide),
    }
    head = build_header([(f"{n}.weight", bf16, s) for n, s in shapes.items()], {"format": "pt"})
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * sum(int(np.prod(shape)) for shape in shapes.values()))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": wide,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 8,
        "vocab_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_a_layer_of_true_size_takes_no_more_memory_than_a_merge_may(tmp_path: Path) -> None:
    base, donor = (a_layer_of_seven_billion(tmp_path / name) for name in ("base", "donor"))
    words = (base, donor, tmp_path, *METHODS)
    command = [sys.executable, "-c", WEIGHED, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    grown = [int(number) for number in re.findall(r"grew (\d+)", done.stdout)]
    assert len(grown) == 2 and 0 < min(grown) <= max(grown) <= 64 << 20
    read = (base / "model.safetensors").stat().st_size
    for method, sizes in {"nf4": (0.25, 0.30), "int8": (0.5, 0.55)}.items():
        written = (tmp_path / method / "model.safetensors").stat().st_size
        assert sizes[0] < written / read < sizes[1]
