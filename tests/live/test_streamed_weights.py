"""A streamed model: its answers are those of the held one, and it takes two layers of memory.

What its parameters are when they are used is compared with merged checkpoints in
`test_live_model.py`. The models here have five layers, so that no layer stays where it was.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import talk
import tiny
import torch
from lowmem_adamms.kernels import gpu

from lowmem_adamms import Alphas, LiveModel, make_plan
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.errors import PlacementError, RecipeError
from lowmem_adamms.live import (
    decoder_layers,
    held_weights,
    live_model,
    model_size,
    streamed_weights,
    vocabulary_table,
)
from lowmem_adamms.live.decoder_layers import CannotStreamError
from lowmem_adamms.live.device_source import DeviceSource
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.layer_turnstile import LayerTurnstile
from lowmem_adamms.live.placement import Placement
from lowmem_adamms.live.placing import place
from lowmem_adamms.live.streamed_layers import spread_layers
from lowmem_adamms.live.streamed_weights import StreamedWeights
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.live.vocabulary_table import VocabularyTable
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging import loop
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.settings import AnswerSettings, PlacementSettings

LAYERS = 5
SETTINGS = AnswerSettings(max_new_tokens=4)
Plans = Callable[[str], Plan]


def placed(plan: Plan, live: Any = "streamed", **wishes: Any) -> Placement:
    settings = PlacementSettings(device="cpu", live=live, **wishes)
    return place(plan, Memory(64 << 30, None, None), settings)


def load(plan: Plan, live: str = "streamed", dtype: str | None = None) -> LiveModel:
    placement = placed(plan, live)
    return LiveModel(plan, placement=placement, dtype=dtype, trust_remote_code=True)


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """The plan of a family's base, which answers, and its donor, of five layers each."""
    root = tmp_path_factory.mktemp("five layers")
    known: dict[str, Plan] = {}

    def make(family: str) -> Plan:
        if family not in known:
            parent = tiny.ancestor(tiny.line_of(family), layers=LAYERS)
            base = tiny.make(family, root / "bare" / family, ancestor=parent)
            donor_family = talk.DONORS.get(family, family)
            donor = tiny.make(donor_family, root / "donor" / family, ancestor=parent, seed=2)
            known[family] = make_plan(talk.complete(base, root / family), donor)
        return known[family]

    return make


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A Qwen2-VL whose head is its embedding."""
    root, parent = tmp_path_factory.mktemp("tied"), tiny.ancestor("qwen2", layers=3, tied=True)
    base = tiny.make("qwen2_vl", root / "base", ancestor=parent, tied=True)
    return make_plan(
        base, tiny.make("qwen2_vl", root / "donor", ancestor=parent, tied=True, seed=2)
    )


@pytest.fixture
def live(plan_of: Plans) -> Iterator[LiveModel]:
    with load(plan_of("llama")) as model:
        yield model


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "filler" in thread.name}


# Answers


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, "bf16") for name in (*talk.DONORS, "mistral")), ("qwen2_vl", "fp32")],
)
def test_answers_are_those_of_the_held_model_at_alphas_in_any_order(
    family: str, dtype: str, plan_of: Plans, images: tuple[Path, ...]
) -> None:
    prompts = talk.ask(family, images)[:3]
    answers: dict[str, list[list[str]]] = {}
    for way in ("held", "streamed"):
        with load(plan_of(family), way, dtype) as model:
            answers[way] = []
            for alpha in (0.6, 0, 0.3):
                model.apply(alpha)
                answers[way].append(model.generate(prompts, SETTINGS, batch_size=2))
    assert answers["streamed"] == answers["held"]
    assert len({text for row in answers["held"] for text in row}) >= 3


def test_alphas_by_layer_and_role_are_those_of_the_held_model(
    plan_of: Plans, images: tuple[Path, ...]
) -> None:
    alpha = Alphas(0.2, {"layers.1": 0.9, "layers.3.mlp": 0.0, "embed": 1.0, "head": 0.5})
    prompts = talk.ask("qwen2_vl", images)
    answers = []
    for way in ("held", "streamed"):
        with load(plan_of("qwen2_vl"), way) as model:
            model.apply(alpha)
            answers.append(model.generate(prompts, SETTINGS))
    assert answers[0] == answers[1]


def test_answers_are_those_of_the_held_model_by_way_of_a_device(
    plan_of: Plans, images: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for a card: its source, its kernel, its streams and events."""
    plan, prompts = plan_of("qwen2_vl"), talk.ask("qwen2_vl", images)
    with load(plan, "held") as model:
        model.apply(0.3)
        expected = model.generate(prompts, SETTINGS, batch_size=2)

    def make_source(plan: Plan, files: MappedFiles, placement: Placement) -> DeviceSource:
        where = replace(placement, vram_source_bytes=10**5, pinned_source_bytes=10**5)
        return DeviceSource(plan, files, where, "cpu")

    monkeypatch.setattr(streamed_weights, "make_source", make_source)
    monkeypatch.setattr(streamed_weights, "choose_kernel", lambda *_: gpu.blend_torch)
    for head_in_windows in (False, True):
        placement = replace(placed(plan), head_in_windows=head_in_windows)
        with LiveModel(plan, placement=placement) as model:
            model.apply(0.3)
            assert model.generate(prompts, SETTINGS, batch_size=2) == expected


# Batches side by side


@pytest.mark.parametrize("family", ["qwen2_vl", "cogvlm", "mistral"])
@pytest.mark.parametrize("at_once", [2, 16])
def test_batches_that_share_readings_answer_as_if_alone(
    family: str, at_once: int, plan_of: Plans, images: tuple[Path, ...]
) -> None:
    """Qwen2-VL keeps its positions on the model; Mistral's cache cannot take drafts."""
    plan, prompts = plan_of(family), talk.ask(family, images)
    answers: list[list[list[str]]] = []
    for count in (1, at_once):
        placement = replace(placed(plan), batches_at_once=count)
        with LiveModel(plan, placement=placement, trust_remote_code=True) as model:
            row = []
            for alpha in (0.3, 0.6):
                model.apply(alpha)
                row.append(model.generate(prompts, SETTINGS, batch_size=1))
            answers.append(row)
    assert answers[0] == answers[1]


def test_a_layer_is_read_once_for_all_batches(
    plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are: three passes, and the layer that is filled ahead."""
    plan = plan_of("llama")
    counts = []
    for at_once in (1, 3):
        with LiveModel(plan, placement=replace(placed(plan), batches_at_once=at_once)) as model:
            model.apply(0.3)
            weights = model._weights
            assert isinstance(weights, StreamedWeights)
            filled: list[Any] = []
            fill = weights._layers._fill
            monkeypatch.setattr(
                weights._layers, "_fill", lambda *a, f=fill, seen=filled: seen.append(f(*a))
            )
            settings = AnswerSettings(max_new_tokens=3, drafts=False)
            model.generate(["What is it?"] * 3, settings, batch_size=1)
            counts.append(len(filled))
    assert counts[1] <= 3 * LAYERS + 1
    assert counts[0] >= 2 * counts[1]


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_in_one_batch_ends_them_all(
    error: BaseException, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.apply(0.6)
    with failing(monkeypatch, error, 7), pytest.raises(type(error)):
        live.generate(["What is it?", "Who?", "Where?"], SETTINGS, batch_size=1)
    again = live.generate(["What is it?", "Who?", "Where?"], SETTINGS, batch_size=1)
    assert len(set(again)) > 1


def test_a_model_is_whole_while_its_notes_are_swapped() -> None:
    """Another thread looks up its layers at that time."""

    class Watched(dict[str, Any]):
        def clear(self) -> None:
            pytest.fail("the model has no layers at this moment")

    owner: Any = type("Owner", (), {})()
    owner.__dict__ = Watched(layers=[1], position=0)
    turnstile = LayerTurnstile(3, [owner], 2)
    notes = turnstile._take_notes()
    owner.later, owner.position = 5, 7
    turnstile._put_notes(notes)
    assert vars(owner) == {"layers": [1], "position": 0}


def test_a_consumer_that_gives_up_ends_the_batches(live: LiveModel) -> None:
    def give_up(*_: Any) -> None:
        raise KeyboardInterrupt

    answerer = live.make_answerer(SETTINGS, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        answerer.answer(["What is it?", "Who?", "Where?"], answered=give_up)
    assert len(set(answerer.answer(["What is it?", "Who?", "Where?"]))) > 1


class Passes:
    """Batches of some passes through three layers, and the layers that each went through."""

    def __init__(self, at_once: int) -> None:
        self.turnstile = LayerTurnstile(3, [], at_once)
        self.seen: list[str] = []
        self.ended: list[str] = []

    def __call__(self, batch: str) -> str:
        name, passes = batch[0], int(batch[1])
        try:
            for _ in range(passes):
                for layer in range(3):
                    self.turnstile.wait(layer)
                    self.seen.append(f"{name}{layer}")
        finally:
            self.ended.append(name)
        return name

    def run(self, *batches: str) -> Iterator[str]:
        return self.turnstile.run_batches(self, batches)


@pytest.mark.parametrize(
    ("at_once", "order"),
    [
        (1, "a0 a1 a2 a0 a1 a2 b0 b1 b2 c0 c1 c2"),
        (2, "a0 b0 a1 b1 a2 b2 a0 c0 a1 c1 a2 c2"),
        (3, "a0 b0 c0 a1 b1 c1 a2 b2 c2 a0 a1 a2"),
    ],
)
def test_all_batches_go_through_a_layer_before_the_next(at_once: int, order: str) -> None:
    """One that comes later begins with the others' next pass."""
    passes = Passes(at_once)
    assert sorted(passes.run("a2", "b1", "c1")) == ["a", "b", "c"]
    assert " ".join(passes.seen) == order


def test_batches_end_with_the_one_that_takes_their_answers() -> None:
    passes = Passes(3)
    answers = passes.run("a2", "b1", "c9")
    assert next(answers) == "b"
    answers.close()  # type: ignore[attr-defined]
    assert sorted(passes.ended) == ["a", "b", "c"]


# Memory


def test_two_layers_are_there_and_the_others_are_not(live: LiveModel) -> None:
    live.generate(["Hm?"], SETTINGS)
    layers = live.model.model.layers
    there = [not layer.mlp.up_proj.weight.is_meta for layer in layers]
    assert sum(there) == 2
    assert isinstance(live._weights, StreamedWeights)
    sizes = [sum(-(-p.nbytes // 64) * 64 for p in layer.parameters()) for layer in layers]
    assert [b.memory.nbytes for b in live._weights._layers._shared] == [max(sizes)] * 2


@pytest.mark.parametrize("kept_layers", [0, 1, 2, 3, 4, LAYERS])
def test_layers_that_are_kept_are_filled_once_an_alpha(kept_layers: int, plan_of: Plans) -> None:
    plan = plan_of("llama")
    kept = spread_layers(LAYERS, kept_layers)
    filled: Counter[int] = Counter()
    with (
        load(plan) as two,
        LiveModel(plan, placement=replace(placed(plan), kept_layers=kept_layers)) as more,
    ):
        assert isinstance(more._weights, StreamedWeights)
        streamed = more._weights._layers
        order, fill = list(streamed._layers), streamed._fill

        def count(layer: Any, alpha: Any) -> None:
            filled[order.index(layer)] += 1
            fill(layer, alpha)

        streamed._fill = count
        for alpha in (0.6, 0.0, 0.3):
            streamed.discard()  # when what was filled ahead last is there
            filled.clear()
            answers = []
            for model in (two, more):
                model.apply(alpha)
                answers.append(model.generate(["What is it?", "Who?"], SETTINGS))
            assert answers[0] == answers[1]
            assert more._answerer
            passes = more._answerer.cost.passes
            assert passes > 1
            stay = kept if LAYERS - kept_layers > 2 else set(range(LAYERS))
            for layer in range(LAYERS):
                # What runs first is filled once more, for a pass that does not come
                assert filled[layer] in ({1} if layer in stay else {passes, passes + 1})


def test_kept_layers_lie_at_even_distances() -> None:
    assert [sorted(spread_layers(8, kept)) for kept in (0, 1, 2, 4)] == [
        [], [7], [3, 7], [1, 3, 5, 7]
    ]  # fmt: skip
    assert all(len(spread_layers(7, kept)) == min(kept, 7) for kept in range(9))


def test_sources_of_kept_layers_leave_the_page_cache_first(
    plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    placement = replace(placed(plan), kept_layers=2)
    each = model_size.layer_source_bytes(plan) // LAYERS
    with LiveModel(plan, placement=placement) as live:
        assert isinstance(live._weights, StreamedWeights)
        layers = list(live._weights._layers._layers)
        for room, dropped in ((5, set()), (4, {4}), (3, {2, 4}), (1, {1, 2, 3, 4})):
            tight = replace(placement, page_cache_bytes=room * each)
            found = streamed_weights._find_uncached(layers, spread_layers(LAYERS, 2), tight)
            assert {layers.index(layer) for layer in found} == dropped


def test_of_the_embedding_only_rows_in_use_are_there(live: LiveModel) -> None:
    embedding = live.model.get_input_embeddings()
    assert isinstance(embedding.weight, VocabularyTable)
    blended: list[tuple[int, ...]] = []
    blender: Any = embedding.weight.blender
    fill = blender._fill

    def watch(step: Any, out: Any) -> None:
        blended.append(step.shape)
        fill(step, out)

    blender._fill = watch
    rows = embedding(torch.tensor([[7, 3, 7, 300]]))
    assert blended == [(3, tiny.HIDDEN)]
    assert torch.equal(rows[0, 0], rows[0, 2])
    for token in (320, -1):
        with pytest.raises(IndexError, match=f"token {token} of an embedding of 320 rows"):
            embedding(torch.tensor([token]))


# The vocabulary's tables


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Tied, and its embedding scales what it looks up."""
    transformers = __import__("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=tiny.ROWS - 3,
        hidden_size=tiny.HIDDEN,
        intermediate_size=tiny.INNER,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
    )
    root = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).bfloat16()
    with quiet():
        for name in ("base", "donor"):
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape)
            model.save_pretrained(root / name)
    return make_plan(root / "base", root / "donor")


def logits_at(model: LiveModel, alpha: float) -> list[torch.Tensor]:
    """Of a prompt, of one token, of a batch, and of a long batch."""
    model.apply(alpha)
    random = torch.Generator().manual_seed(0)
    found = []
    for shape in ((1, 7), (1, 1), (3, 1), (4, 33)):
        ids = torch.randint(0, 300, shape, generator=random)
        with quiet(), torch.inference_mode():
            found.append(model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["llama", "tied qwen2_vl", "gemma"])
def test_a_head_in_windows_gives_the_bits_of_one_that_is_held(
    base: str,
    dtype: str,
    plan_of: Plans,
    tied: Plan,
    gemma: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocabulary_table, "HEAD_WINDOW_ROWS", 128)  # of 320 rows, and of 317
    plan = {"tied qwen2_vl": tied, "gemma": gemma}.get(base) or plan_of(base)
    placements = placed(plan, "held"), replace(placed(plan), head_in_windows=True)
    found = []
    for placement in placements:
        with LiveModel(plan, placement=placement, dtype=dtype) as model:
            found.append([logits_at(model, alpha) for alpha in (0.6, 0, 0.3)])
            weights = [model.model.get_input_embeddings().weight, model.model.lm_head.weight]
    assert all(isinstance(weight, VocabularyTable) for weight in weights)
    for held, streamed in zip(*found, strict=True):
        assert all(map(torch.equal, held, streamed))
    assert not torch.equal(found[0][0][0], found[0][2][0])


@pytest.mark.parametrize("rows", [40_001, 32_064, 4097, 4096, 4031, 63])
def test_windows_cover_all_rows_and_begin_where_vectors_do(rows: int) -> None:
    windows = list(vocabulary_table._cut_windows(rows))
    assert (windows[0][0], windows[-1][1]) == (0, rows)
    assert all(first % 64 == 0 for first, _ in windows)
    assert all(before[1] >= after[0] for before, after in pairwise(windows))
    sizes = {stop - first for first, stop in windows}
    assert max(sizes) < model_size.HEAD_WINDOW_ROWS
    assert min(sizes) >= min(rows, model_size.HEAD_WINDOW_ROWS - 64)


def test_a_row_is_taken_out_of_a_table_and_nothing_else_is_done_with_it(gemma: Plan) -> None:
    """As Gemma 4 takes its padding's."""
    with LiveModel(gemma, placement=replace(placed(gemma), head_in_windows=True)) as model:
        model.apply(1)
        weight = model.model.lm_head.weight
        donor = tiny.load(gemma.donor.path)["model.embed_tokens.weight"]
        assert torch.equal(weight[5], donor[5])
        assert torch.equal(weight[5, :], donor[5])
        assert (weight.shape, weight.dtype) == (donor.shape, donor.dtype)
        inputs, bias = torch.randn(2, tiny.HIDDEN).bfloat16(), torch.randn(tiny.ROWS - 3).bfloat16()
        found = torch.nn.functional.linear(inputs, weight, bias)
        assert torch.equal(found, torch.nn.functional.linear(inputs, donor, bias))
        assert repr(weight) == "VocabularyTable((317, 64), torch.bfloat16)"
        with pytest.raises(TypeError):
            weight + 1
        with pytest.raises(TypeError, match="sum of a weight of which only the rows in use are"):
            weight.sum()


@pytest.mark.parametrize("head", [None, torch.nn.Conv1d(1, 1, 1)])
def test_a_head_that_does_more_than_multiply_cannot_go_in_windows(
    head: Any, plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("llama")
    llama = __import__("transformers").LlamaForCausalLM
    monkeypatch.setattr(llama, "get_output_embeddings", lambda self: head)
    with pytest.raises(CannotStreamError, match="head of LlamaForCausalLM must be held whole"):
        StreamedWeights(
            plan,
            plan.base.path,
            replace(placed(plan), head_in_windows=True),
            dtype="auto",
            trust_remote_code=False,
        )


def test_what_alpha_does_not_change_lies_in_the_file(plan_of: Plans) -> None:
    with load(plan_of("qwen2_vl")) as live:
        assert isinstance(live._weights, StreamedWeights)
        files: Any = live._weights._blender.source
        mapped = files._open.values()
        ranges = [(file._address, file._address + file._bytes.size) for file in mapped]

        def lies_in_file(param: Any) -> bool:
            return any(start <= param.data_ptr() < stop for start, stop in ranges)

        for name, param in live.model.named_parameters():
            if "visual" in name:
                assert lies_in_file(param), name
        assert not lies_in_file(live.model.get_output_embeddings().weight)


# What can go wrong


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> Iterator[None]:
    """Filling fails at the layer after so many."""
    run, calls = loop.run, iter(range(10**6))

    def broken(*args: Any, **options: Any) -> None:
        if next(calls) == after:
            raise error
        run(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(held_weights, "run", broken)
        yield


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_while_a_layer_is_filled_ends_the_pass_and_leaves_no_half_layer(
    error: BaseException, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.apply(0.3)
    expected = live.generate(["What is it?"], SETTINGS)
    for after in (0, 3, 4):
        live.apply(0.6)
        with failing(monkeypatch, error, after), pytest.raises(type(error)):
            live.generate(["What is it?"], SETTINGS)
        assert live.generate(["What is it?"], SETTINGS) != expected
        live.apply(0.3)
        assert live.generate(["What is it?"], SETTINGS) == expected
    assert len(threads()) == 1


def test_after_an_apply_that_did_not_end_nothing_is_answered(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live._weights.sink, "discard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        live.apply(0.3)
    with pytest.raises(RecipeError, match="call apply again"):
        live.generate(["What is it?"], SETTINGS)


def test_a_closed_model_and_its_thread_are_gone(plan_of: Plans) -> None:
    before = threads()
    with load(plan_of("llama")) as model:
        model.apply(0.5)
        model.generate(["What is it?"], SETTINGS)
        gone = weakref.ref(model.model)
        assert threads() - before
    gc.collect()  # the encoder knows itself
    assert gone() is None
    assert threads() == before


def test_layers_that_do_not_come_in_a_list_are_held(
    plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_layers, "_path_of_list_item", lambda *_: None)
    memory = Memory(64 << 30, None, None)
    monkeypatch.setattr(live_model, "measure_memory", lambda **_: memory)
    with load(plan_of("llama")) as live:
        assert live.placement.live == "held"
        note = "the model is held: LlamaForCausalLM has no list of layers with blended weights"
        assert live.notes == (note,)
        answerer = live.make_answerer(SETTINGS, batch_size=1)
        assert answerer.notes == [note]
    small = Memory(1 << 20, None, None)
    monkeypatch.setattr(live_model, "measure_memory", lambda **_: small)
    with pytest.raises(PlacementError, match=r"no list of layers.*cannot be streamed; the model"):
        load(plan_of("llama"))


def test_layers_that_share_weights_are_held(
    plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = __import__("transformers")
    made = transformers.LlamaForCausalLM.__init__

    def shared(self: Any, config: Any) -> None:
        made(self, config)
        self.model.layers[3].mlp.up_proj.weight = self.model.layers[1].mlp.up_proj.weight

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", shared)
    plan = plan_of("llama")
    with pytest.raises(CannotStreamError, match="in more than one layer"):
        StreamedWeights(plan, plan.base.path, placed(plan), dtype="auto", trust_remote_code=False)


def test_prompts_without_an_alpha_are_answered_as_the_base_does(plan_of: Plans) -> None:
    prompts = [Prompt(text) for text in talk.TEXTS]
    answers = []
    for way in ("held", "streamed"):
        with load(plan_of("llama"), way) as model:
            answers.append(model.generate(prompts, SETTINGS))
    assert answers[0] == answers[1]
