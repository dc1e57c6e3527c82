"""The loop from plan to bytes: real tiny checkpoints against an oracle that knows no plan.

The oracle reads both checkpoints whole, finds each tensor's partner by names written out here, and
blends with the reference kernel.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from lowmem_adamms.kernels import reference
from safetensors.torch import save_file
from tiny import Tensors, raw

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.mapping.plan import Part, Plan, Step
from lowmem_adamms.merging import disk_sink, loop

Make = Callable[..., Path]
Partner = Callable[[str, Tensors], "torch.Tensor | None"]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


# The oracle


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor's storage array."""
    kind = NAMES[tensor.dtype]
    words: npt.NDArray[Any] = tensor.contiguous().view(WORDS[tensor.dtype]).numpy()
    return words.view(reference.STORAGE[kind])


def blended(base: torch.Tensor, donor: torch.Tensor | None, alpha: float, out: str | None) -> bytes:
    """One output tensor; the donor may have fewer rows, the rest stay the base's."""
    if base.dtype not in NAMES:
        return raw(base)
    kind = NAMES[base.dtype]
    out = out or kind
    result = reference.cast(bits(base), kind, out)
    if donor is not None:
        shared = slice(0, min(len(base), len(donor)))
        triple = (kind, NAMES[donor.dtype], out)
        assert base[shared].shape == donor[shared].shape
        sides = bits(base)[shared], bits(donor)[shared]
        result[shared] = reference.blend(*sides, triple, alpha, True)
    return bytes(result.tobytes())


def oracle(
    base: Path, donor: Path, partner: Partner, alpha: float, dtype: str | None = None
) -> dict[str, bytes]:
    """Every tensor of the merged checkpoint."""
    theirs = tiny.load(donor)
    return {
        name: blended(
            tensor, partner(name, theirs), alpha, None if name.endswith("inv_freq") else dtype
        )
        for name, tensor in tiny.load(base).items()
    }


def same_name(name: str, donor: Tensors) -> torch.Tensor | None:
    text = not name.startswith(("visual.", "vision_tower.", "multi_modal_projector."))
    return donor[name] if text and name != "image_newline" else None


def qwen_from_llava(name: str, donor: Tensors) -> torch.Tensor | None:
    return None if name.startswith("visual.") else donor[f"language_model.{name}"]


def llava_from_qwen(name: str, donor: Tensors) -> torch.Tensor | None:
    own = name.removeprefix("language_model.")
    return None if own == name else donor[own]


def tied_qwen_lends_its_embedding(name: str, donor: Tensors) -> torch.Tensor | None:
    found = name.replace("lm_head.weight", "model.embed_tokens.weight")
    return llava_from_qwen(found, donor)


def rows_of_tokens(partner: Partner, count: int) -> Partner:
    """The same, but of embedding and head only the first `count` rows have a counterpart."""

    def cut(name: str, donor: Tensors) -> torch.Tensor | None:
        found = partner(name, donor)
        table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        return found[:count] if found is not None and table else found

    return cut


def cogvlm_from_llava(name: str, donor: Tensors) -> torch.Tensor | None:
    if name.startswith("model.vision."):
        return None
    name = f"language_model.{name}"
    name = re.sub(r"mlp\.(language|vision)_mlp", "mlp", name)
    name = re.sub(r"(language|vision)_expert_dense", "o_proj", name)
    stem, fused, _ = re.sub(r"(language|vision)_expert_", "", name).partition("query_key_value")
    if fused:
        return torch.cat([donor[f"{stem}{role}_proj.weight"] for role in "qkv"])
    return donor[name]


def mplug_from_cogvlm(name: str, donor: Tensors) -> torch.Tensor | None:
    if name.startswith(("model.vision_model.", "model.visual_abstractor.")):
        return None
    if name.endswith("inv_freq"):
        return None
    expert = "vision" if "multiway.1" in name else "language"
    name = re.sub(r"\.multiway\.\d", "", name)
    name = name.replace("mlp.", "mlp.language_mlp.").replace("o_proj", "language_expert_dense")
    if match := re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.weight", name):
        fused = donor[f"{match[1]}{expert}_expert_query_key_value.weight"]
        return fused.chunk(3)["qkv".index(match[2])]
    return donor[name]


# The checkpoints


@functools.cache
def ancestor(kind: str, *, seed: int = 0, tied: bool = False) -> Tensors:
    return tiny.ancestor(kind, seed, tied=tied)


LINES = {
    "llava_onevision": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "cogvlm": "llama",
    "mplug_owl2": "llama",
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A descendant of its line's one ancestor, made once for each family and options."""

    @functools.cache
    def made(family: str, form: str = "", tied_parent: bool = False, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tied = tied_parent or options.get("tied", False)
        parent = ancestor(LINES.get(family, family[:5]), tied=tied)
        tiny.make(family, folder / "model", ancestor=parent, **options)
        if form == "bin":
            return tiny.to_bin(folder / "model", folder / "bin")
        return tiny.add_tokenizer(folder / "model") if form == "tokens" else folder / "model"

    return made


@dataclass(frozen=True)
class Pair:
    """What is merged, and how the oracle finds partners."""

    base: tuple[str, dict[str, Any]]
    donor: tuple[str, dict[str, Any]]
    partner: Partner
    loads: bool = True

    def made(self, make: Make) -> tuple[Path, Path]:
        (base, ours), (donor, theirs) = self.base, self.donor
        return make(base, **ours), make(donor, **theirs)


FP16, FP32 = {"dtype": "float16"}, {"dtype": "float32"}
TOKENS = {"form": "tokens"}
PAIRS = {
    "qwen2_vl-llava_ov": Pair(("qwen2_vl", {}), ("llava_onevision", {}), qwen_from_llava),
    "qwen2_vl-llava_ov-tokens": Pair(
        ("qwen2_vl", TOKENS), ("llava_onevision", TOKENS), rows_of_tokens(qwen_from_llava, 307)
    ),
    "qwen2_vl-llava_ov-fp16": Pair(("qwen2_vl", {}), ("llava_onevision", FP16), qwen_from_llava),
    "qwen2_vl-fp32-llava_ov": Pair(("qwen2_vl", FP32), ("llava_onevision", {}), qwen_from_llava),
    "llava_ov-qwen2_vl": Pair(("llava_onevision", {}), ("qwen2_vl", {}), llava_from_qwen),
    "llava_ov-tied_qwen2_vl": Pair(
        ("llava_onevision", {"tied_parent": True}),
        ("qwen2_vl", {"tied": True}),
        tied_qwen_lends_its_embedding,
    ),
    "tied_qwen2_vl-llava_ov": Pair(
        ("qwen2_vl", {"tied": True}), ("llava_onevision", {}), qwen_from_llava
    ),
    "qwen2_5_vl-qwen2": Pair(("qwen2_5_vl", {}), ("qwen2", {}), same_name),
    "llava-llava_next": Pair(("llava", {}), ("llava_next", {}), same_name),
    "cogvlm-llava_bin": Pair(
        ("cogvlm", {}), ("llava", {"form": "bin"}), cogvlm_from_llava, loads=False
    ),
    "mplug_owl2_bin-cogvlm": Pair(
        ("mplug_owl2", {"form": "bin"}), ("cogvlm", {}), mplug_from_cogvlm, loads=False
    ),
    "qwen3-qwen3": Pair(("qwen3", {}), ("qwen3", {"seed": 2}), same_name),
}


def tensors_of(folder: Path) -> dict[str, bytes]:
    assert list(folder.glob("*.safetensors"))
    return {name: raw(tensor) for name, tensor in tiny.load(folder).items()}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@dataclass
class Memory:
    """A sink of byte arrays, and what was asked of it."""

    out: dict[str, bytearray] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    open_slots: int = 0
    commits: int = 0
    largest: int = 0

    def wants(self, step: Step) -> bool:
        if step.name not in self.skip:
            self.out[step.name] = bytearray(step.nbytes)
            return True
        return False

    def copy(self, step: Step, offset: int, content: Any) -> Future[None] | None:
        self.out[step.name][offset : offset + len(content)] = bytes(content)
        return None

    def slot(self, step: Step, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        self.open_slots += nbytes
        self.largest = max(self.largest, self.open_slots)
        return np.frombuffer(self.out[step.name], np.uint8)[offset : offset + nbytes]

    def commit(self) -> None:
        self.open_slots = 0
        self.commits += 1

    def bytes(self) -> dict[str, bytes]:
        return {name: bytes(content) for name, content in self.out.items()}


def in_memory(plan: Plan, alpha: float, **options: Any) -> dict[str, bytes]:
    sink = Memory()
    loop.run(plan, alpha, sink, **options)
    return sink.bytes()


def shrink_windows(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Windows that cut tensors, cross their bounds and, at 10 bytes, hold hardly anything."""
    for module in (loop, disk_sink):
        monkeypatch.setattr(module, "WINDOW", size)


# Bytes


@pytest.mark.parametrize("name", PAIRS)
def test_merged_bytes_are_the_oracles(name: str, make: Make, tmp_path: Path) -> None:
    pair = PAIRS[name]
    base, donor = pair.made(make)
    out = merge(make_plan(base, donor), 0.3, tmp_path / "out")
    expected = oracle(base, donor, pair.partner, 0.3)
    assert_same(tensors_of(out), expected)
    # Not vacuous: the language model changed, and something else stayed
    before = {key: raw(tensor) for key, tensor in tiny.load(base).items()}
    changed = [key for key in expected if expected[key] != before[key]]
    assert len(changed) >= 2 * 9


@pytest.mark.parametrize("name", ["qwen2_vl-llava_ov-tokens", "mplug_owl2_bin-cogvlm"])
def test_ends_are_the_bases_and_the_mapped_donors_bytes(name: str, make: Make) -> None:
    pair = PAIRS[name]
    base, donor = pair.made(make)
    plan = make_plan(base, donor)
    ours, theirs = tiny.load(base), tiny.load(donor)
    assert_same(in_memory(plan, 0), {key: raw(tensor) for key, tensor in ours.items()})
    expected = {}
    for key, tensor in ours.items():
        partner = pair.partner(key, theirs)
        if partner is None:
            expected[key] = raw(tensor)
        else:
            shared = partner[: len(tensor)]
            expected[key] = raw(shared) + raw(tensor[len(shared) :])
    assert_same(in_memory(plan, 1), expected)


def test_windows_may_cut_tensors_and_cross_shards(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_windows(monkeypatch, 3000)
    for name in ("qwen2_vl-llava_ov-tokens", "qwen2_vl-llava_ov-fp16", "mplug_owl2_bin-cogvlm"):
        pair = PAIRS[name]
        base, donor = pair.made(make)
        out = merge(make_plan(base, donor), 0.3, tmp_path / name)
        assert_same(tensors_of(out), oracle(base, donor, pair.partner, 0.3))


def test_a_window_never_holds_more_than_its_size(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WINDOW", 4096)
    base, donor = PAIRS["qwen2_vl-llava_ov"].made(make)
    plan = make_plan(base, donor)
    sink = Memory()
    loop.run(plan, 0.3, sink)
    assert sink.open_slots == 0
    assert sink.largest == 4096
    blended = sum(step.nbytes for step in plan.steps if step.action == "interpolate")
    # Full windows but where a copy comes between
    assert blended // 4096 <= sink.commits <= blended // 4096 + len(plan.steps)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("name", ["qwen2_vl-llava_ov-fp16", "mplug_owl2_bin-cogvlm"])
def test_another_dtype_is_rounded_once(name: str, dtype: str, make: Make, tmp_path: Path) -> None:
    pair = PAIRS[name]
    base, donor = pair.made(make)
    for alpha in (0.3, 0.0, 1.0):
        out = merge(make_plan(base, donor, dtype=DTYPES[dtype]), alpha, tmp_path / str(alpha))
        assert_same(tensors_of(out), oracle(base, donor, pair.partner, alpha, dtype))


def test_a_head_that_a_tied_base_carries_is_left_out(make: Make, tmp_path: Path) -> None:
    tied, donor = PAIRS["tied_qwen2_vl-llava_ov"].made(make)
    head = {"lm_head.weight": tiny.load(tied)["model.embed_tokens.weight"].clone()}
    base = tiny.respell(tied, str, tmp_path / "base", extra=head)
    out = merge(make_plan(base, donor), 0.3, tmp_path / "out")
    assert_same(tensors_of(out), oracle(tied, donor, qwen_from_llava, 0.3))
    tiny.load_model(out)


def test_a_sink_that_has_a_step_already_is_not_given_it(make: Make) -> None:
    base, donor = PAIRS["qwen2_vl-llava_ov"].made(make)
    plan = make_plan(base, donor)
    have = frozenset(step.name for step in plan.steps[::3])
    sink = Memory(skip=have)
    loop.run(plan, 0.3, sink)
    expected = oracle(base, donor, qwen_from_llava, 0.3)
    assert_same(sink.bytes(), {key: value for key, value in expected.items() if key not in have})


def test_progress_adds_up_to_the_bytes_written(make: Make) -> None:
    base, donor = PAIRS["cogvlm-llava_bin"].made(make)
    plan = make_plan(base, donor)
    done: list[int] = []
    in_memory(plan, 0.3, progress=done.append)
    assert sum(done) == plan.bytes_written
    assert min(done) > 0


def test_eviction_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WINDOW", 4096)
    monkeypatch.setattr(
        importlib.import_module("lowmem_adamms.checkpoints.mapped_files"), "BLOCK", 1 << 16
    )
    base, donor = PAIRS["qwen2_vl-llava_ov"].made(make)
    found = in_memory(make_plan(base, donor), 0.3, evict=True)
    assert_same(found, oracle(base, donor, qwen_from_llava, 0.3))


def test_what_a_sink_still_reads_is_not_released(make: Make) -> None:
    events: list[str] = []

    class SlowSink(Memory):
        def copy(self, step: Step, offset: int, content: Any) -> Future[None]:
            return writer.submit(self.write, step, offset, content)

        def write(self, step: Step, offset: int, content: Any) -> None:
            time.sleep(0.001)
            super().copy(step, offset, content)
            events.append("written")

    class WatchedFiles(MappedFiles):
        def release(self, span: Span, *, evict: bool) -> Callable[[], None]:
            return partial(events.append, "released" if span.dtype.name == "U8" else "blended")

    plan = make_plan(*PAIRS["qwen2_vl-llava_ov"].made(make))
    with ThreadPoolExecutor(1) as writer, WatchedFiles() as source:
        loop.run(plan, 0.3, SlowSink(), source=source)
    copies = [event for event in events if event != "blended"]
    assert copies.count("written") == copies.count("released") > 10
    for end in range(len(copies)):
        assert copies[:end].count("released") <= copies[:end].count("written")


def test_inputs_are_not_touched(make: Make, tmp_path: Path) -> None:
    base, donor = PAIRS["qwen2_vl-llava_ov"].made(make)

    def seen() -> dict[Path, tuple[bytes, int]]:
        files = [path for side in (base, donor) for path in side.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = seen()
    merge(make_plan(base, donor), 0.3, tmp_path / "out")
    assert seen() == before


# A miniature with everything that is odd at once


def miniature(kinds: tuple[torch.dtype, ...], seed: int) -> Tensors:
    """A Llama of width 3, its dtypes in turn; with a scalar, an empty tensor, integers and bools.

    The noise that sets two apart depends on the seed, the ancestor does not.
    """
    shapes = {
        "model.embed_tokens.weight": (7, 3),
        "model.layers.0.input_layernorm.weight": (3,),
        "model.layers.0.mlp.down_proj.weight": (3, 5),
        "model.layers.0.mlp.gate_proj.weight": (5, 3),
        "model.layers.0.mlp.up_proj.weight": (5, 3),
        "model.layers.0.post_attention_layernorm.weight": (3,),
        **{f"model.layers.0.self_attn.{role}_proj.weight": (3, 3) for role in "qkvo"},
        "model.norm.weight": (3,),
        "lm_head.weight": (7, 3),
    }
    parent, own = (torch.Generator().manual_seed(s) for s in (0, seed))
    out = {
        name: (torch.randn(shape, generator=parent) + 0.1 * torch.randn(shape, generator=own)).to(
            kinds[i % len(kinds)]
        )
        for i, (name, shape) in enumerate(shapes.items())
    }
    out["a.scalar"] = torch.tensor(float(seed))
    out["b.empty"] = torch.empty(0, 3, dtype=torch.bfloat16)
    out["c.integers"] = torch.arange(5) + seed
    out["d.bools"] = torch.tensor([True, False, seed % 2 == 0])
    return out


def write_miniature(folder: Path, kinds: tuple[torch.dtype, ...], seed: int) -> Path:
    folder.mkdir()
    save_file(miniature(kinds, seed), folder / "model.safetensors")
    return folder


def decoder_only(name: str, donor: Tensors) -> torch.Tensor | None:
    return None if name[:2] in ("a.", "b.", "c.", "d.") else donor[name]


THREE = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize(("dtype", "size"), [(None, 4096), (None, 10), ("BF16", 100), ("F32", 10)])
def test_odd_sizes_and_mixed_dtypes_share_windows(
    dtype: str | None, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows hold triples of several dtypes, and float32 at odd multiples of two bytes."""
    shrink_windows(monkeypatch, size)
    base = write_miniature(tmp_path / "base", THREE, 1)
    donor = write_miniature(tmp_path / "donor", THREE[::-1] + THREE, 2)
    for side in (base, donor):
        (side / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    partner = decoder_only
    plan = make_plan(base, donor, dtype=DTYPES[dtype] if dtype else None)
    for alpha in (0.3, 0.0, 1.0):
        expected = oracle(base, donor, partner, alpha, dtype)
        assert_same(in_memory(plan, alpha), expected)
        out = merge(plan, alpha, tmp_path / f"out-{alpha}")
        assert_same(tensors_of(out), expected)


def test_of_an_unknown_family_the_head_is_merged_too(tmp_path: Path) -> None:
    """Its head stands beside the decoder, as nearly always, and not under its prefix."""
    base = write_miniature(tmp_path / "base", THREE, 1)
    donor = write_miniature(tmp_path / "donor", THREE, 2)
    found = in_memory(make_plan(base, donor), 0.3)
    assert_same(found, oracle(base, donor, decoder_only, 0.3))


def test_values_on_the_edge_are_cast_not_blended_with_themselves(tmp_path: Path) -> None:
    """Halfway between two fp16 subnormals: 0.7 x + 0.3 x is not x, and falls to the wrong side."""
    ties = (torch.arange(1, 512, 2) * 2.0**-25).to(torch.bfloat16)
    for name, seed in (("base", 1), ("donor", 2)):
        (tmp_path / name).mkdir()
        tensors = miniature((torch.bfloat16,), seed) | {"a.ties": ties}
        save_file(tensors, tmp_path / name / "model.safetensors")
    plan = make_plan(tmp_path / "base", tmp_path / "donor", dtype=DTYPES["F16"])
    for alpha in (0.1, 0.3, 0.7):
        assert in_memory(plan, alpha)["a.ties"] == raw(ties.to(torch.float16))


# What transformers makes of it


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.loads])
def test_transformers_loads_and_runs_the_result(name: str, make: Make, tmp_path: Path) -> None:
    """No key is missing or left over; the answer depends on the donor."""
    base, donor = PAIRS[name].made(make)
    plan = make_plan(base, donor)
    ids = torch.arange(1, 9)[None]
    logits = []
    for alpha in (0.0, 0.3):
        model = tiny.load_model(merge(plan, alpha, tmp_path / str(alpha)))
        with torch.inference_mode(), quiet():
            logits.append(model(input_ids=ids).logits)
            answer = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        assert answer.shape[1] > ids.shape[1]
    assert logits[1].isfinite().all()
    assert not torch.equal(*logits)


# Refusals, and what is imported


@pytest.mark.parametrize("alpha", [math.nan, -0.1, 1.1, math.inf, -math.inf, 1 + 1e-15])
def test_alpha_outside_its_range_is_refused(alpha: float, make: Make, tmp_path: Path) -> None:
    plan = make_plan(*PAIRS["qwen3-qwen3"].made(make))
    with pytest.raises(RecipeError, match="alpha is"):
        merge(plan, alpha, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_safetensors_imports_neither_torch_nor_transformers(
    make: Make, tmp_path: Path
) -> None:
    base, donor = PAIRS["qwen2_vl-llava_ov-tokens"].made(make)
    script = """
import sys
from lowmem_adamms.cli import main
base, donor, out = sys.argv[1:]
assert main(["plan", base, donor]) == 0
assert main([base, donor, "-o", out, "--alpha", "0.3"]) == 0
assert main(["verify", out, "--deep", "--base", base, "--donor", donor]) == 0
unwanted = {"torch", "transformers", "safetensors", "pydantic", "jinja2"}
print(sorted(unwanted & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, base, donor, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_window_with_room_for_a_bf16_but_not_for_an_fp32_is_closed() -> None:
    """Or the fp32 tensor behind it would be cut too large for the buffer."""
    steps = []
    for name, count in (("BF16", loop.WINDOW // 2 - 1), ("F32", loop.WINDOW)):
        dtype = DTYPES[name]
        span = Span(Path(name), dtype, 0, count * dtype.itemsize, (count,))
        steps.append(Step(name, dtype, (count,), "", "", (Part((0, count), name, span, span),)))
    plan: Any = SimpleNamespace(steps=steps)
    windows: Any = list(loop._cut_windows(plan, 0.3, MagicMock(), loop.WINDOW))
    sizes = [[piece.nbytes for piece in window] for window in windows]
    assert all(0 < sum(pieces) <= loop.WINDOW and all(pieces) for pieces in sizes)
    assert sum(map(sum, sizes)) == sum(step.nbytes for step in steps)
