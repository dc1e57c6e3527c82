"""The live model against its one promise: it is what loading the merged checkpoint would give.

After any applies, every parameter and buffer equals, bit for bit, what transformers loads from the
folder that `merge` writes at the last alpha. The expectation never goes through `live/`: a folder
on disk, and from_pretrained of the class that its config names.
"""

from __future__ import annotations

import functools
import importlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lowmem_adamms.kernels import gpu
from tiny import raw

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.errors import FormatError, MappingError, PlacementError, RecipeError
from lowmem_adamms.live import (
    held_weights,
    live_model,
    load_check,
    transformers_model,
    vocabulary_table,
)
from lowmem_adamms.live.conversions import group_tensors
from lowmem_adamms.live.device_source import DeviceSource
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.live_sink import LiveSink
from lowmem_adamms.live.placement import Placement
from lowmem_adamms.live.placing import place
from lowmem_adamms.live.vocabulary_table import VocabularyTable
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging import loop
from lowmem_adamms.settings import PlacementSettings

Make = Callable[..., Path]
GetReady = Callable[..., "Ready"]
Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


# What is expected


def load(folder: Path, dtype: str = "auto", **options: Any) -> Any:
    """The folder's model, by the class that its config names."""
    transformers = importlib.import_module("transformers")
    config = json.loads((folder / "config.json").read_text())
    remote = "auto_map" in config
    known = None if remote else getattr(transformers, config["architectures"][0], None)
    loader = known or transformers.AutoModelForCausalLM
    with transformers_model.quiet():
        model = loader.from_pretrained(folder, dtype=dtype, trust_remote_code=remote, **options)
    return model.eval()


def contents(model: Any) -> Contents:
    """Every parameter and buffer, with all that a quantized one consists of."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in [*tensors.items()]:
        if (state := getattr(tensor, "quant_state", None)) is not None:
            tensors[f"{name}.absmax"], tensors[f"{name}.code"] = state.absmax, state.code
            tensors[f"{name}.offset"] = state.offset
            tensors[f"{name}.state2.absmax"] = state.state2.absmax
            tensors[f"{name}.state2.code"] = state.state2.code
        if (scales := getattr(tensor, "SCB", None)) is not None:
            tensors[f"{name}.SCB"], tensors[f"{name}.CB"] = scales, tensor.CB
    return {name: (str(t.dtype), tuple(t.shape), raw(t)) for name, t in tensors.items()}


def assert_same(found: Contents, expected: Contents) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


# The checkpoints


@functools.cache
def ancestor(kind: str, *, seed: int = 0, tied: bool = False, inner: int = 0) -> tiny.Tensors:
    return tiny.ancestor(kind, seed, tied=tied)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return folder


def rewrite(
    folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], **more: torch.Tensor
) -> Path:
    """Change a checkpoint's tensors; None leaves one out."""
    changed = {name: change(name, tensor) for name, tensor in tiny.load(folder).items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    tiny._save_tensors({**kept, **more}, folder)
    return folder


def mixed_dtypes(folder: Path) -> Path:
    """Norms in float32, values in float16, all else as it was."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "norm" in name:
            return tensor.float()
        return tensor.half() if "v_proj" in name else tensor

    return rewrite(folder, change)


def both_tied(folder: Path) -> Path:
    """The head on disk as well, and a config that ties only deep inside."""
    head = next(t for name, t in tiny.load(folder).items() if "embed_tokens" in name)
    rewrite(folder, lambda _, tensor: tensor, **{"lm_head.weight": head.clone()})

    def edit(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = False
        config["text_config"]["tie_word_embeddings"] = True

    return edit_config(folder, edit)


def gemma(folder: Path) -> Path:
    """Llama's tensors under a class that ties unless its config says otherwise; this says nothing.

    The head, equal to the embedding, is on disk.
    """
    head = tiny.load(folder)["model.embed_tokens.weight"].clone()
    rewrite(folder, lambda _, tensor: tensor, **{"lm_head.weight": head})

    def edit(config: dict[str, Any]) -> None:
        config.update(model_type="gemma", architectures=["GemmaForCausalLM"])
        del config["tie_word_embeddings"]

    return edit_config(folder, edit)


def respelled(rename: tiny.Rename) -> Callable[[Path], Path]:
    return lambda folder: tiny.respell(folder, rename, folder.parent / rename.__name__)


FORMS: dict[str, Callable[[Path], Path]] = {
    "bin": lambda folder: tiny.to_bin(folder, folder.parent / "bin"),
    "remote": tiny.add_remote_code,
    "modern": respelled(tiny.modern),
    "llava_hub": respelled(tiny.llava_hub),
    "headless": respelled(tiny.headless),
    "mixed": mixed_dtypes,
    "both_tied": both_tied,
    "gemma": gemma,
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A descendant of its line's one ancestor, made once for each family and options."""

    @functools.cache
    def made(
        family: str,
        *forms: str,
        parent: int = 0,
        tied_parent: bool = False,
        inner: int = tiny.INNER,
        **options: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        tied = tied_parent or options.get("tied", False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tiny, "INNER", inner)
            line = tiny.line_of(family)
            tensors = ancestor(line, seed=parent, tied=tied, inner=inner)
            tiny.make(family, folder, ancestor=tensors, **options)
        for form in forms:
            folder = FORMS[form](folder)
        return folder

    return made


@dataclass(frozen=True)
class Pair:
    """What is merged and how: forms and options of both sides, and options of `make_plan`."""

    base: tuple[Any, ...]
    donor: tuple[Any, ...]
    base_options: dict[str, Any] = field(default_factory=dict)
    donor_options: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def planned(self, make: Make) -> Plan:
        return make_plan(
            make(*self.base, **self.base_options),
            make(*self.donor, **self.donor_options),
            **self.plan,
        )


TIED, TIED_PARENT, FP32 = {"tied": True}, {"tied_parent": True}, {"dtype": "float32"}
PAIRS = {
    "qwen2_vl-ov": Pair(("qwen2_vl",), ("llava_onevision",)),
    "ov modern-qwen2_5_vl": Pair(("llava_onevision", "modern"), ("qwen2_5_vl",)),
    "next modern-llava bin": Pair(("llava_next", "modern"), ("llava", "bin")),
    "llava hub-llama": Pair(("llava", "llava_hub"), ("llama",)),
    "llama-llava": Pair(("llama",), ("llava",)),
    "tied-untied": Pair(("qwen2_vl",), ("llava_onevision",), base_options=TIED),
    "tied headless-untied": Pair(("qwen2", "headless"), ("qwen2_vl",), base_options=TIED),
    "untied-tied": Pair(("llava_onevision",), ("qwen2_vl",), TIED_PARENT, TIED),
    "tied inside-untied": Pair(("qwen2_vl", "both_tied"), ("llava_onevision",), TIED, TIED_PARENT),
    "silent-untied": Pair(("llama", "gemma"), ("llava",), TIED, TIED_PARENT),
    "donor of fewer rows": Pair(("llava",), ("llama",), donor_options={"vocab": 300}),
    "plan fp32, mixed": Pair(("llava", "mixed"), ("llava_next",), plan={"dtype": DTYPES["F32"]}),
    "live fp32": Pair(("qwen2_vl",), ("llava_onevision",), dtype="fp32"),
    "plan fp32, live bf16": Pair(
        ("qwen2_vl",), ("llava_onevision",), plan={"dtype": DTYPES["F32"]}, dtype="bf16"
    ),
    "bf16-fp32": Pair(("qwen3_vl",), ("qwen3",), donor_options=FP32),
    "mixed-bf16": Pair(("llava", "mixed"), ("llava_next",)),
    "cogvlm-llava": Pair(("cogvlm", "remote"), ("llava",)),
}


def placed(plan: Plan, **wishes: Any) -> Placement:
    """On the CPU, whatever this machine has."""
    return place(plan, Memory(64 << 30, None, None), PlacementSettings(device="cpu", **wishes))


def live_of(
    plan: Plan, dtype: str | None = None, quantize: Any = None, live: Any = "held", **options: Any
) -> LiveModel:
    head_in_windows = options.pop("head_in_windows", False)
    placement = placed(plan, live_quantize=quantize, live=live)
    return LiveModel(
        plan,
        dtype=dtype,
        placement=replace(placement, head_in_windows=head_in_windows),
        trust_remote_code="auto_map" in plan.base.config,
        **options,
    )


@dataclass
class Ready:
    """A pair's live model, and what its merged checkpoints hold, each made once."""

    plan: Plan
    live: LiveModel
    root: Path
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[float, Contents] = field(default_factory=dict)

    def __enter__(self) -> Ready:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.close()

    def merged(self, alpha: float) -> Path:
        out = self.root / repr(alpha)
        return out if out.exists() else merge(self.plan, alpha, out, force=True)

    def expected(self, alpha: float) -> Contents:
        if alpha not in self.known:
            self.known[alpha] = contents(load(self.merged(alpha), self.dtype, **self.options))
        return self.known[alpha]

    def check(self, alphas: Sequence[float]) -> None:
        for alpha in alphas:
            self.live.apply(alpha)
            assert self.live.alpha == alpha
            assert_same(contents(self.live.model), self.expected(alpha))


TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", None: "auto"}


@pytest.fixture(scope="module")
def ready(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ready]]:
    """A pair's live model, loaded once for all tests of it."""
    with ExitStack() as stack:

        @functools.cache
        def prepared(
            name: str, quantize: str | None = None, live: str = "held", **ways: bool
        ) -> Ready:
            if quantize:
                pytest.importorskip("bitsandbytes")
            pair = (QUANTIZED if quantize else PAIRS)[name]
            plan = pair.planned(make)
            model = live_of(plan, pair.dtype, quantize, live, **ways)
            options = as_loaded(quantize) if quantize else {}
            root = tmp_path_factory.mktemp("merged")
            return stack.enter_context(Ready(plan, model, root, TORCH[pair.dtype], options))

        yield prepared


# The promise


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_live_is_what_the_merged_checkpoint_loads_as(name: str, ready: GetReady) -> None:
    pair = ready(name)
    base = contents(pair.live.model)
    assert_same(base, pair.expected(0))
    pair.check((0.3, 0.3, 0))
    merged = pair.expected(0.3)
    assert sum(merged[key] != base[key] for key in base) >= 2 * 9, "too little is merged"


IDS = (5, 301, 7, 7, 0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, also of a weight of which there are none until they are used."""
    if isinstance(tensor, VocabularyTable):
        return tensor.blender.look_up(range(tensor.shape[0]))
    return tensor


def contents_as_it_runs(model: Any) -> Contents:
    """Every parameter and buffer as it is when its module runs, after one forward pass.

    Those of modules that did not run are as they are after it.
    """
    found: Contents = {}
    hooks = []
    for path, module in model.named_modules():
        registry = {**module._parameters, **module._buffers}
        if not any(tensor is not None for tensor in registry.values()):
            continue

        def note(module: Any, *_: Any, path: str = path) -> None:
            for name, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    key = f"{path}.{name}" if path else name
                    found[key] = (str(tensor.dtype), tuple(tensor.shape), raw(whole(tensor)))

        hooks.append(module.register_forward_pre_hook(note))
    with transformers_model.quiet(), torch.inference_mode():
        model(
            input_ids=torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS), dtype=torch.int)
        )
    for hook in hooks:
        hook.remove()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in found:
            assert not tensor.is_meta, f"{name} was not there when it was used"
            found[name] = (str(tensor.dtype), tuple(tensor.shape), raw(whole(tensor)))
    return found


TABLES = ("qwen2_vl-ov", "tied-untied", "silent-untied", "donor of fewer rows", "live fp32")


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "held") for name in PAIRS), *((name, "windows") for name in TABLES)]
)
def test_a_streamed_model_runs_with_what_the_merged_checkpoint_loads_as(
    name: str, head: str, ready: GetReady, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's embedding, of "silent-untied", scales what it looks up."""
    monkeypatch.setattr(vocabulary_table, "HEAD_WINDOW_ROWS", 128)
    pair = ready(name, live="streamed", head_in_windows=head == "windows")
    model = pair.live.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = embedding is output
    assert isinstance(output, VocabularyTable) == (head == "windows")
    assert isinstance(embedding, VocabularyTable) == (head == "windows" or not is_tied)
    for alpha in (0.3, 0, 0.3):
        pair.live.apply(alpha)
        assert_same(contents_as_it_runs(model), pair.expected(alpha))


def test_tied_parameters_stay_tied_and_the_others_apart(ready: GetReady) -> None:
    for name, tied in (("tied-untied", True), ("qwen2_vl-ov", False), ("silent-untied", False)):
        model = ready(name).live.model
        ready(name).live.apply(0.3)
        embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embed.data_ptr() == head.data_ptr()) is tied
        assert torch.equal(embed, head) is tied


@pytest.mark.parametrize(
    ("name", "quantize"), [("qwen2_vl-ov", None), ("live fp32", None), ("qwen2_vl-ov", "int8")]
)
def test_an_interrupted_apply_leaves_nothing_behind(
    name: str,
    quantize: str | None,
    ready: GetReady,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = ready(name, quantize)
    interrupt_apply(pair.live, monkeypatch)
    assert pair.live.alpha is None
    pair.check((0.3,))


def interrupt_apply(model: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of tensors, at another alpha."""
    left = 0.6 * sum(step.nbytes for step in model.plan.steps if step.action == "interpolate")

    def stop(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if left < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(held_weights, "WINDOW_BYTES", 1000)
        model.apply(0.9, progress=stop)


def test_progress_adds_up_to_what_alpha_changes(ready: GetReady) -> None:
    pair = ready("qwen2_vl-ov")
    seen: list[int] = []
    pair.live.apply(0.3, progress=seen.append)
    changed = [step for step in pair.plan.steps if step.action == "interpolate"]
    assert sum(seen) == sum(step.nbytes for step in changed)


def test_an_alpha_out_of_range_changes_nothing(ready: GetReady) -> None:
    pair = ready("qwen2_vl-ov")
    pair.live.apply(0.3)
    with pytest.raises(RecipeError):
        pair.live.apply(1.5)
    assert pair.live.alpha == 0.3
    assert_same(contents(pair.live.model), pair.expected(0.3))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("qwen2_vl-ov", ("model.visual.",)),
        (
            "ov modern-qwen2_5_vl",
            ("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
        ),
        ("llama-llava", ("nothing",)),
    ],
)
def test_vision_names_are_all_parameters_outside_the_decoder(
    name: str, inside: tuple[str, ...], ready: GetReady
) -> None:
    live = ready(name).live
    names = {key for key, _ in live.model.named_parameters() if key.startswith(inside)}
    assert live.vision_names & dict(live.model.named_parameters()).keys() == names


def test_a_closed_model_is_gone(make: Make) -> None:
    with live_of(PAIRS["qwen2_vl-ov"].planned(make)) as model:
        gone = weakref.ref(model.model)
        model.apply(0.5)
    assert gone() is None
    for use in (lambda: model.apply(0.5), lambda: model.generate("x")):
        with pytest.raises(RuntimeError, match="this LiveModel was closed"):
            use()
    model.close()


def test_without_a_placement_one_is_chosen(make: Make) -> None:
    with LiveModel(PAIRS["qwen2_vl-ov"].planned(make), device="cpu") as model:
        assert (model.placement.device, model.placement.quantize) == ("cpu", None)


# Windows


@pytest.mark.parametrize("window", [1000, 1 << 30])
@pytest.mark.parametrize("name", ["donor of fewer rows", "mixed-bf16"])
def test_the_size_of_the_windows_changes_no_bit(name: str, window: int, ready: GetReady) -> None:
    pair = ready(name)
    for alpha in (1, 0.3):
        loop.run(pair.plan, alpha, pair.live._weights.sink, window=window)
        assert_same(contents(pair.live.model), pair.expected(alpha))


# Memory


class Watching(LiveSink):
    """Notes the most bytes that are staged at once."""

    most = 0

    def slot(self, step: Any, offset: int, nbytes: int) -> Any:
        slot = super().slot(step, offset, nbytes)
        self.most = max(self.most, self.staged_bytes())
        return slot

    def staged_bytes(self) -> int:
        staged = [target._staged for target in set(self._targets.values())]
        buffers = [each.values() if isinstance(each, dict) else [each] for each in staged]
        return sum(buffer.nbytes for found in buffers for buffer in found if buffer is not None)


def own_sink(model: LiveModel, source: Any, kind: type[LiveSink] = LiveSink) -> Any:
    """A second sink on a live model."""
    groups = group_tensors(model.model, model.plan.base.tensors)
    return kind(model.model, model.plan, groups, source)


@pytest.fixture
def files() -> Iterator[MappedFiles]:
    with MappedFiles() as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "quantize", "most"),
    [
        ("qwen2_vl-ov", None, 0),
        ("live fp32", None, 4096),
        ("qwen2_vl-ov", "nf4", 2 * 128 * 64 * 2),  # a window may end one tensor and begin the next
    ],
)
def test_no_more_is_staged_than_a_window_or_the_tensors_to_quantize_in_it(
    name: str, quantize: str | None, most: int, ready: GetReady, files: MappedFiles
) -> None:
    pair = ready(name, quantize)
    sink = own_sink(pair.live, files, Watching)
    loop.run(pair.plan, 0.3, sink, source=files, window=4096)
    assert (sink.most, sink.staged_bytes()) == (most, 0)
    assert_same(contents(pair.live.model), pair.expected(0.3))


# The way over a device, without one


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("untied-tied", (1, 0)),
        ("live fp32", (0, 1)),
        ("mixed-bf16", (0.4, 0.3)),
    ],
)
def test_sources_on_a_device_change_no_bit(
    name: str, shares: tuple[float, float], ready: GetReady, files: MappedFiles
) -> None:
    pair = ready(name)
    where = pair.live.placement
    vram, pinned = (int(where.cached_source_bytes * share) for share in shares)
    where = replace(where, vram_source_bytes=vram, pinned_source_bytes=pinned)
    source = DeviceSource(pair.plan, files, where, "cpu")
    sink = own_sink(pair.live, source)
    for window, alpha in ((1 << 20, 1), (5000, 0.3), (1 << 20, 0)):
        loop.run(pair.plan, alpha, sink, kernel=gpu.blend_torch, source=source, window=window)
        assert_same(contents(pair.live.model), pair.expected(alpha))


# 4 and 8 bit


WIDE = {"inner": 128}  # on some CPUs bitsandbytes multiplies only whole blocks of 64
QUANTIZED = {
    "qwen2_vl-ov": Pair(("qwen2_vl",), ("llava_onevision",), WIDE, WIDE),
    "fp32-bf16": Pair(("llava",), ("llava_next",), {**WIDE, **FP32}, WIDE),
    # Biases in fp16, which bitsandbytes casts for a bf16 product
    "live fp16": Pair(("qwen2_vl",), ("llava_onevision",), WIDE, WIDE, dtype="fp16"),
    "cogvlm": Pair(("cogvlm", "remote"), ("llava",), WIDE, WIDE),
}


def as_loaded(quantize: str) -> dict[str, Any]:
    """What from_pretrained is told, to quantize as the live model does."""
    cls = importlib.import_module("transformers").BitsAndBytesConfig
    config = cls(load_in_8bit=True)
    if quantize == "nf4":
        config = cls(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


INPUT = torch.arange(1, 9).reshape(1, -1)


def logits(model: Any) -> torch.Tensor:
    with transformers_model.quiet(), torch.inference_mode():
        out: torch.Tensor = model(input_ids=INPUT, attention_mask=torch.ones_like(INPUT)).logits
    return out


@pytest.mark.parametrize(
    ("quantize", "name"),
    [
        ("nf4", "fp32-bf16"),
        ("nf4", "live fp16"),
        ("nf4", "cogvlm"),
        ("int8", "qwen2_vl-ov"),
    ],
)
def test_a_quantized_model_is_the_merged_checkpoint_quantized(
    quantize: str, name: str, ready: GetReady
) -> None:
    """Also after answers: a forward pass moves and repacks weights, and casts biases."""
    pair = ready(name, quantize)
    assert sum(map(transformers_model.is_quantized, pair.live.model.parameters())) >= 2 * 7
    fresh = load(pair.merged(0.3), pair.dtype, **pair.options)
    seen = []
    for alpha in (0.3, 1, 0.3):
        pair.check((alpha,))
        seen.append(logits(pair.live.model))
    assert torch.equal(seen[0], logits(fresh))
    assert torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[1], seen[0])


# What is refused


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is loaded."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(transformers_model, "load_model", fail)


@pytest.mark.usefixtures("no_loading")
def test_strangers_are_refused_before_anything_is_loaded(make: Make) -> None:
    plan = make_plan(make("qwen2_vl"), make("llava_onevision", parent=7))
    with pytest.raises(MappingError, match="look unrelated"):
        live_of(plan)


def test_force_loads_strangers(make: Make, tmp_path: Path) -> None:
    plan = make_plan(make("qwen2_vl"), make("llava_onevision", parent=7))
    with Ready(plan, live_of(plan, force=True), tmp_path) as forced:
        forced.check((0.3,))


@pytest.mark.usefixtures("no_loading")
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_model, "measure_memory", lambda: Memory(64 << 20, None, None))
    with pytest.raises(PlacementError, match="does not fit"):
        LiveModel(PAIRS["qwen2_vl-ov"].planned(make))


@pytest.mark.usefixtures("no_loading")
def test_a_bare_file_is_refused(make: Make) -> None:
    base = make("qwen2_vl", max_shard_size="5GB") / "model.safetensors"
    with pytest.raises(FormatError, match=r"model\.safetensors: a bare file cannot be run"):
        live_of(make_plan(base, make("llava_onevision")))


def spoil_loading(monkeypatch: pytest.MonkeyPatch, target: str, place: int) -> None:
    """Flip a bit of one element of a parameter, as it is loaded."""
    real = transformers_model.load_model

    def spoilt(*args: Any, **options: Any) -> Any:
        model = real(*args, **options)
        flat = model.get_parameter(target).detach().reshape(-1)
        flat[place:][:1].view(torch.uint8)[:1] ^= 1
        return model

    monkeypatch.setattr(transformers_model, "load_model", spoilt)


UP = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("quantize", "target", "place"),
    [
        (None, "model.visual.blocks.0.norm1.bias", 0),
        *((None, UP, place) for place in (0, 300, 64 * 96 - 1)),
        ("nf4", UP, 5),
        ("int8", UP, 5),
    ],
)
def test_one_wrong_bit_after_loading_is_found(
    quantize: str | None, target: str, place: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(load_check, "CHUNK_BYTES", 512)
    spoil_loading(monkeypatch, target, place)
    plan = PAIRS["qwen2_vl-ov"].planned(make)
    stem = target.removeprefix("model.language_model.").removeprefix("model.")
    with pytest.raises(FormatError) as caught:
        live_of(plan, quantize=quantize)
    assert f"{stem} is not what transformers loaded into {target}" in str(caught.value)


def copied(folder: Path, out: Path) -> Path:
    return tiny.respell(folder, lambda name: name, out)


@pytest.mark.parametrize("lost", ["visual.blocks.1.norm1.weight", "visual.merger.mlp.0.weight"])
def test_a_checkpoint_that_lacks_a_parameter_is_refused(
    lost: str, make: Make, tmp_path: Path
) -> None:
    base = rewrite(
        copied(make("qwen2_vl"), tmp_path / "base"), lambda name, t: None if name == lost else t
    )
    with pytest.raises(FormatError, match=rf"holds no weights for model\.{lost}.* random"):
        live_of(make_plan(base, make("llava_onevision")))


def test_weights_that_transformers_would_not_load_are_refused(make: Make, tmp_path: Path) -> None:
    """A config of one layer on a file of two: the second would be merged, but never speak."""
    folder = copied(make("llama"), tmp_path / "base")
    base = edit_config(folder, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(MappingError, match=r"does not load model\.layers\.1\.") as caught:
        live_of(make_plan(base, make("llava")))
    assert "LlamaForCausalLM" in str(caught.value)


def test_a_config_that_ties_what_differs_on_disk_is_searched_as_it_is_merged(
    make: Make, tmp_path: Path
) -> None:
    """The loader keeps such a head apart, and so does the plan."""
    folder = copied(make("llama"), tmp_path / "base")
    base = edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    plan = make_plan(base, make("llava"))
    assert "lm_head.weight" in {step.name for step in plan.steps}
    with Ready(plan, live_of(plan), tmp_path) as pair:
        pair.check((0.3, 0))


def test_a_head_that_differs_where_the_plan_took_no_sample_is_refused(
    make: Make, tmp_path: Path
) -> None:
    base = copied(make("llama", tied=True), tmp_path / "base")
    head = tiny.load(base)["model.embed_tokens.weight"].clone()
    head.view(-1)[2300] += 1  # samples end at 2048 and begin again at 2633
    rewrite(base, lambda _, tensor: tensor, **{"lm_head.weight": head})
    plan = make_plan(base, make("llava", tied_parent=True))
    assert "lm_head.weight" not in {step.name for step in plan.steps}
    with pytest.raises(FormatError, match=r"ties .* to the embedding.*differ on disk"):
        live_of(plan)
