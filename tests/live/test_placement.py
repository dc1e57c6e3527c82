"""Where a live model goes: sums done by hand, what is refused, and what more memory may change."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import (
    FAMILIES,
    ITEM_BYTES,
    DecoderDims,
    Family,
    llama_decoder,
    tensor_bytes,
    typed,
    write_headers,
)
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import PlacementError, RecipeError
from lowmem_adamms.live import cpu_4bit, model_size, placing
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement, locate_sources
from lowmem_adamms.mapping.join import make_plan
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.settings import PlacementSettings
from lowmem_adamms.values import format_size

MakePlan = Callable[..., Plan]

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9
SPARE = 256 * MIB
PLENTY = Memory(1000 * GB, None, None)

SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)
# Elements of a layer: q 64, k 32, v 32, o 64, gate, up and down 96 each; two norms of 8
LINEAR, ROWS = 2 * (64 + 32 + 32 + 64 + 3 * 96), 2 * (8 + 4 + 4 + 8 + 12 + 12 + 8)
REST = 20 * 8 + 20 * 8 + 8 + 2 * 2 * 8  # embedding, head, last norm, layer norms
KV_EACH = 2 * (4 + 4) * 2 * 2048  # layers, rows of k and v, bytes, tokens
KV = 8 * KV_EACH
STAGING = 3 * 96 * 2
WHOLE = 2 * (LINEAR + REST)
SOURCES = (2 + 4) * (LINEAR + REST)  # the base is BF16, the donor F32

QWEN_BF16 = sum(tensor_bytes(*spec) for spec in FAMILIES["qwen2-vl-7b"].tensors.values())
QWEN_KV_EACH = 28 * 2 * 512 * 2 * 2048
# One layer: q and o, k and v, the MLP, biases of q, k and v, two norms
QWEN_LAYER = 2 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944 + 3584 + 1024 + 2 * 3584)
QWEN_HEAD = 2 * (152064 * 3584 + 3584)  # and the last norm
QWEN_WAITING = 8 * 2048 * 3584 * 2 * 4  # states of a batch of 8


def place(plan: Plan, memory: Memory, **wishes: Any) -> Placement:
    return placing.place(plan, memory, PlacementSettings(**wishes))


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever these tests run on."""
    monkeypatch.setattr(placing, "repacks_4bit", lambda: False)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Makes a plan of two tiny decoders; `more` tensors are in the base alone."""
    monkeypatch.setitem(ITEM_BYTES, "I64", 8)

    def write(name: str, tensors: Any) -> Checkpoint:
        config = {"architectures": ["LlavaLlamaForCausalLM"], "tie_word_embeddings": False}
        write_headers(tmp_path / name, Family(name, config, tensors))
        return open_checkpoint(tmp_path / name)

    def make(more: Any = None) -> Plan:
        base = llama_decoder(SMALL, dtype="BF16") | (more or {})
        return make_plan(write("base", base), write("donor", llama_decoder(SMALL, dtype="F32")))

    return make


@pytest.fixture(scope="module")
def qwen(true_size: dict[str, Checkpoint]) -> Plan:
    """Qwen2-VL-7B with LLaVA-OneVision-7B as donor."""
    return make_plan(true_size["qwen2-vl-7b"], true_size["llava-onevision-qwen2-7b-ov-hf"])


@pytest.fixture(scope="module")
def mplug(true_size: dict[str, Checkpoint]) -> Plan:
    """mPLUG-Owl2, with two streams of keys and values, and LLaVA-1.5 as donor."""
    return make_plan(true_size["mplug-owl2-llama2-7b"], true_size["llava-1.5-7b-hf"])


# Sums


@pytest.mark.parametrize(
    ("quantize", "model_bytes", "staging"),
    [
        ("none", WHOLE, 0),
        ("int8", LINEAR + 4 * ROWS + 2 * REST, STAGING),
        # Half a byte an element; of tiny weights each table of scales is rounded up
        ("nf4", LINEAR // 2 + 2 * (4 * 1 + 3 * 2) + 2 * 7 * 4 + 2 * REST, STAGING),
    ],
)
def test_sums_of_a_small_model(
    small: MakePlan, quantize: str, model_bytes: int, staging: int
) -> None:
    found = place(small(), PLENTY, live_quantize=quantize)
    assert (found.device, found.quantize or "none", found.dtype) == ("cpu", quantize, "BF16")
    assert found.model_bytes == model_bytes
    assert (found.batch_size, found.work_bytes) == (8, GIB + KV + staging)


def test_nf4_of_a_true_size_model_has_the_published_rate(
    true_size: dict[str, Checkpoint],
) -> None:
    plan = make_plan(true_size["llama-2-7b"], true_size["llama-2-7b"])
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    found = place(plan, PLENTY, live_quantize="nf4")
    assert found.model_bytes == linear * (0.5 + (1 + 4 / 256) / 64) + 2 * rest


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "int8"),
    [
        ("model.vision_tower.layers.0.fc1.weight", "BF16", (16, 8), 16 * 8 + 4 * 16),
        ("model.mm_projector.0.weight", "BF16", (16, 8), 16 * 8 + 4 * 16),
        ("model.vision_tower.layers.0.fc1.bias", "BF16", (16,), 2 * 16),
        ("model.vision_tower.class_embedding", "BF16", (1, 8), 2 * 8),
        ("model.vision_tower.patch_embedding.weight", "BF16", (8, 3, 2, 2), 2 * 96),
        ("model.vision_tower.position_ids", "I64", (1, 10), 80),
        ("model.vision_tower.layers.0.norm.weight", "F32", (16,), 2 * 16),
        ("some.thing.else.weight", "BF16", (16, 8), 2 * 16 * 8),
    ],
)
def test_only_linear_weights_are_quantized_and_only_floats_are_cast(
    small: MakePlan, name: str, dtype: str, shape: tuple[int, ...], int8: int
) -> None:
    with_it = small(more=typed("", dtype, {name: shape}))
    bare, more = (place(plan, PLENTY, live_quantize="int8") for plan in (small(), with_it))
    assert more.model_bytes - bare.model_bytes == int8
    assert more.cached_source_bytes == bare.cached_source_bytes == SOURCES  # it is not blended


def test_the_dtype_is_that_of_most_bytes_unless_one_is_asked_for(small: MakePlan) -> None:
    tower = typed("model.vision_tower.", "F32", {"a.weight": (100, 4), "b.weight": (10,)})
    assert place(small(more=tower), PLENTY).dtype == "BF16"  # 1640 bytes against 2640
    tower |= typed("model.vision_tower.", "F32", {"c.weight": (251, 1)})
    assert place(small(more=tower), PLENTY).dtype == "F32"  # 2644
    asked = place(small(), PLENTY, live_dtype="fp32")
    assert (asked.dtype, asked.model_bytes) == ("F32", 2 * WHOLE)
    assert asked.work_bytes == GIB + 2 * KV


def test_the_outputs_dtype_and_quantization_hold_where_the_models_own_are_not_set(
    small: MakePlan,
) -> None:
    none, own = PlacementSettings(), PlacementSettings(live_quantize="none", live_dtype="fp16")
    for settings, expected in ((none, ("int8", "F32")), (own, (None, "F16"))):
        found = placing.place(small(), PLENTY, settings, quantize="int8", dtype="F32")
        assert (found.quantize, found.dtype) == expected


def test_the_batch_sets_the_work(small: MakePlan) -> None:
    found = place(small(), PLENTY, batch_size=3)
    assert (found.batch_size, found.work_bytes) == (3, (512 + 3 * 64) * MIB + 3 * KV_EACH)


def test_two_streams_of_keys_and_values_share_one_cache(mplug: Plan) -> None:
    assert place(mplug, PLENTY).work_bytes == GIB + 32 * 2 * 4096 * 2 * 8 * 2048


# What is chosen


@pytest.mark.parametrize(
    ("ram", "vram", "device", "live", "batch_size"),
    [
        (4 * GB, 24 * GB, "cuda", "held", 8),
        (32 * GB, 17 * GIB, "cuda", "held", 4),
        (32 * GB, 12 * GB, "cuda", "streamed", 8),
        (16 * GB, 76 * GIB // 10, "cuda", "streamed", 8),  # a card of 8 GB
        (32 * GB, 3 * GIB, "cpu", "held", 8),
        (18 * GB, None, "cpu", "held", 2),
        (10 * GB, None, "cpu", "streamed", 8),
        (4 * GB, None, "cpu", "streamed", 4),
        (25 * GB // 10, None, "cpu", "streamed", 2),  # with its head in windows
    ],
)
def test_a_7b_model_goes_exact_to_the_fastest_device_and_is_streamed_if_it_must(
    qwen: Plan, ram: int, vram: int | None, device: str, live: str, batch_size: int
) -> None:
    found = place(qwen, Memory(ram, vram, "a card" if vram else None))
    assert (found.device, found.quantize, found.dtype) == (device, None, "BF16")
    assert (found.live, found.batch_size) == (live, batch_size)
    if (live, batch_size) == ("held", 8):
        assert (found.model_bytes, found.work_bytes) == (QWEN_BF16, GIB + 8 * QWEN_KV_EACH)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_of_a_streamed_model(qwen: Plan, device: str) -> None:
    """Two layers and the head; on a card also the vision side, which a CPU uses where it lies."""
    found = place(qwen, Memory(100 * GB, 100 * GB, None), device=device, live="streamed")
    vision = QWEN_BF16 - 28 * QWEN_LAYER - QWEN_HEAD - 2 * 152064 * 3584
    on_card = vision if device == "cuda" else 0
    assert found.model_bytes == 2 * QWEN_LAYER + QWEN_HEAD + on_card
    each = 8 * QWEN_KV_EACH + QWEN_WAITING
    assert (found.batches_at_once, found.waiting_bytes) == (16, 15 * each)
    assert found.work_bytes == GIB + 8 * QWEN_KV_EACH
    need = found.required_bytes
    for spare, batches in ((0, 1), (each - 1, 1), (each, 2), (5 * each, 6)):
        memory = Memory(need + spare, need + spare, None)
        tight = place(qwen, memory, device=device, live="streamed")
        assert (tight.batches_at_once, tight.waiting_bytes) == (batches, (batches - 1) * each)
        left = need + spare - tight.required_bytes - tight.waiting_bytes
        assert tight.vram_source_bytes <= left
        assert device == "cuda" or tight.page_cache_bytes == left


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_that_is_left_goes_where_it_saves_most_readings(qwen: Plan, device: str) -> None:
    """Of 28 layers for 16 batches of 8: with one at a time, none kept, 448 readings a token."""
    ample = Memory(100 * GB, 100 * GB, None)
    need = place(qwen, ample, device=device, live="streamed").required_bytes
    each = 8 * QWEN_KV_EACH + QWEN_WAITING
    for spare, batches, kept in (
        (0, 1, 0),
        (QWEN_LAYER, 1, 1),  # 432
        (each, 2, 0),  # 224, rather than 2 layers
        (7 * each + 3 * QWEN_LAYER, 8, 3),  # 50, rather than 56
        (26 * QWEN_LAYER, 1, 26),  # none: the other two have a buffer each
        (15 * each, 7, 26),
        (15 * each + 30 * QWEN_LAYER, 16, 26),
    ):
        free = Memory(need + spare, need + spare, None)
        wishes = {"ram": free.ram_bytes, "vram": free.vram_bytes}
        found = place(qwen, free, device=device, live="streamed", batch_size=8, **wishes)
        assert (found.batches_at_once, found.kept_layers) == (batches, kept)
        assert found.waiting_bytes == (batches - 1) * each
        assert found.kept_bytes == kept * QWEN_LAYER
        assert need <= found.used_bytes <= need + spare
        assert abs(found.kept_source_bytes - kept * 2 * QWEN_LAYER) < 2
        assert any(line.startswith(f"layers: {kept} stay ") for line in found.lines) == (kept > 0)


def test_who_asks_for_streaming_wants_the_least_memory_unless_it_is_given(qwen: Plan) -> None:
    memory = Memory(16 * GB, 16 * GB, None)
    asked, given, left = (
        place(qwen, memory, device="cpu", **wishes).kept_layers
        for wishes in ({"live": "streamed"}, {"live": "streamed", "ram": 16 * GB}, {})
    )
    assert (asked, given) == (0, left)
    assert left > 0
    on_card = place(qwen, memory, device="cuda", live="streamed", ram=16 * GB)
    assert on_card.kept_layers == 0


@pytest.mark.parametrize(("device", "tables"), [("cpu", 0), ("cuda", 2)])
def test_tables_that_are_kept_lie_in_their_file_but_for_a_card(
    true_size: dict[str, Checkpoint], device: str, tables: int
) -> None:
    """No row of them is blended, so that none is looked up by itself."""
    kept = make_plan(
        true_size["qwen2-vl-7b"], true_size["llava-onevision-qwen2-7b-ov-hf"], embeddings="keep"
    )
    found = place(kept, Memory(100 * GB, 100 * GB, None), device=device, live="streamed")
    vision = QWEN_BF16 - 28 * QWEN_LAYER - QWEN_HEAD - 2 * 152064 * 3584
    rest = 2 * QWEN_LAYER + 2 * 3584 + (vision if device == "cuda" else 0)
    assert found.model_bytes == rest + tables * 2 * 152064 * 3584


def test_a_tied_base_holds_its_embedding_for_the_head(true_size: dict[str, Checkpoint]) -> None:
    base = true_size["qwen2-1.5b"]
    found = place(make_plan(base, base), PLENTY, live="streamed")
    layer = 2 * (2 * 1536**2 + 2 * 256 * 1536 + 3 * 1536 * 8960 + 1536 + 512 + 2 * 1536)
    assert found.model_bytes == 2 * layer + 2 * (151936 * 1536 + 1536)


def test_what_the_loaded_model_casts_does_not_stay_mapped(small: MakePlan) -> None:
    tower = typed("model.vision_tower.", "F32", {"a.weight": (10, 4)})
    bare, more = (place(small(more=m), PLENTY, live="streamed") for m in (None, tower))
    assert more.model_bytes - bare.model_bytes == 2 * 40


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_streamed_model_is_not_quantized(qwen: Plan, quantize: str) -> None:
    with pytest.raises(RecipeError, match="streamed model is exact"):
        place(qwen, PLENTY, live="streamed", live_quantize=quantize)


def test_a_model_that_cannot_be_streamed_is_held_and_says_why(qwen: Plan) -> None:
    streamed = place(qwen, PLENTY, live="streamed", batch_size=4)
    held = placing.hold_instead(qwen, streamed, PLENTY, "its layers are knotted")
    assert (held.live, held.batch_size, held.quantize) == ("held", 4, None)
    assert held.lines[0] == "the model is held: its layers are knotted"
    with pytest.raises(PlacementError, match="knotted, so that it cannot be streamed; the model"):
        placing.hold_instead(qwen, streamed, Memory(10 * GB, None, None), "its layers are knotted")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_need_is_model_work_and_256_mib_to_the_byte(
    qwen: Plan, device: str, quantize: str
) -> None:
    wish = {"device": device, "live_quantize": quantize, "live": "held"}

    def free(count: int) -> Memory:
        return Memory(count, GB, None) if device == "cpu" else Memory(GB, count, None)

    found = place(qwen, free(1000 * GB), **wish)
    need = found.model_bytes + found.work_bytes + SPARE
    assert place(qwen, free(need), **wish).batch_size == 8
    assert place(qwen, free(need - 1), **wish).batch_size == 4
    with pytest.raises(PlacementError, match="at batch 8 needs"):
        place(qwen, free(need - 1), batch_size=8, **wish)


def test_nothing_is_quantized_unasked_where_bitsandbytes_is_missing(
    qwen: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    card = Memory(32 * GB, 8 * GIB, "a card")
    assert str(place(qwen, card)) == "cuda BF16 streamed at batch 8"
    assert str(place(qwen, card, live="held")) == "cpu BF16 at batch 8"
    for wish in ("int8", "nf4"):
        with pytest.raises(PlacementError, match=f"{wish} needs bitsandbytes: pip install"):
            place(qwen, card, live_quantize=wish)


def test_four_bits_are_not_chosen_where_this_cpu_cannot_run_them(
    small: MakePlan, qwen: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small one is 8 wide, Qwen2-VL-7B has multiples of 32 rows and 64 columns throughout."""
    monkeypatch.setattr(placing, "repacks_4bit", lambda: True)
    tower = {f"model.vision_tower.{i}.fc.weight": ("BF16", (9600, 100)) for i in range(64)}
    plan = small(tower)
    need = place(plan, PLENTY, live_quantize="int8", batch_size=1).required_bytes
    short = Memory(need - 1, None, None)
    with pytest.raises(PlacementError, match="does not fit") as refusal:
        place(plan, short, batch_size=1, live="held")
    assert "`live='streamed'` would fit" in str(refusal.value)
    with pytest.raises(PlacementError, match=r"cannot run \S+ in 4 bit .*, expected"):
        placing.check_runnable(plan, place(plan, PLENTY, live_quantize="nf4"))
    card = Memory(need - 1, 1000 * GB, "a card")
    placing.check_runnable(plan, place(plan, card, live_quantize="nf4"))
    placing.check_runnable(qwen, place(qwen, PLENTY, live_quantize="nf4"))
    assert str(place(qwen, PLENTY, live_quantize="nf4")) == "cpu nf4 at batch 8"
    monkeypatch.setattr(placing, "repacks_4bit", lambda: False)
    assert str(place(plan, short, batch_size=1, live="held")) == "cpu nf4 at batch 1"


def test_the_processors_own_words_tell_whether_it_repacks(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert not cpu_4bit.repacks_4bit(info)
    for flags, expected in (("avx2 avx512f", False), ("avx512_bf16 amx_tile", True)):
        info.write_text(f"model name : Any\nflags : fpu {flags}\n", encoding="utf-8")
        assert cpu_4bit.repacks_4bit(info) == expected


def test_a_table_of_positions_is_no_linear_layer(small: MakePlan) -> None:
    plan = small({"model.vision_tower.embeddings.position_embedding.weight": ("BF16", (577, 64))})
    names = [name for name, _ in model_size.linear_weights(plan)]
    assert names and not any("embed" in name for name in names)


def test_a_wish_wins_over_the_order(qwen: Plan) -> None:
    card, large = Memory(32 * GB, 12 * GB, "a card"), Memory(100 * GB, 80 * GB, "a card")
    assert place(qwen, large, device="cpu").device == "cpu"
    assert place(qwen, large, live_quantize="int8").quantize == "int8"
    # Whole on the CPU rather than quantized on the card
    assert place(qwen, card, live_quantize="none", live="held").device == "cpu"
    assert place(qwen, large, live="streamed").live == "streamed"
    # A batch that is asked for is kept, and the precision gives way
    found = [place(qwen, card, batch_size=size, live="held") for size in (1, 16)]
    assert [(each.quantize, each.batch_size) for each in found] == [("int8", 1), ("nf4", 16)]
    assert place(qwen, PLENTY, batch_size=64).batch_size == 64


@pytest.mark.parametrize(
    ("memory", "wish", "words"),
    [
        (
            Memory(15 * GB // 10, 3 * GB, "a card"),
            {},
            [
                "cuda BF16 streamed, head in windows, at batch 1 needs 3.30 GB of VRAM but 3.00 GB",
                "cpu BF16 streamed, head in windows, at batch 1 needs 1.95 GB of RAM but 1.50 GB",
                "a 117 MB key-value cache of 1 x 2048 tokens",
                "smaller model",
                "`vram` and `ram`",
            ],
        ),
        (
            Memory(12 * GB, None, None),
            {"live_quantize": "none", "live": "held"},
            [
                "cpu BF16 at batch 1 needs 17.57 GB",
                "`device='cpu'` with `live='streamed'` would fit",
            ],
        ),
        (
            Memory(32 * GB, 12 * GB, "a card"),
            {"device": "cuda", "live_quantize": "none", "batch_size": 8, "live": "held"},
            [
                "cuda BF16 at batch 8 needs 18.86 GB of VRAM",
                "a 940 MB key-value cache of 8 x 2048 tokens",
                "`device='cuda'` with `live='streamed'` would fit, a smaller `batch_size` may",
            ],
        ),
        (
            Memory(32 * GB, 3 * GB, "a card"),
            {"device": "cuda"},
            [
                "cuda BF16 streamed, head in windows, at batch 1 needs",
                "`device='cpu'` with `live_quantize='none'` would fit, or free",
            ],
        ),
        (
            Memory(32 * GB, None, None),
            {"device": "cuda"},
            [
                "no CUDA card",
                "`device='cpu'` with `live_quantize='none'` would fit",
                "its memory as `vram`",
            ],
        ),
    ],
)
def test_a_refusal_says_in_one_line_what_lacks_and_what_helps(
    qwen: Plan, memory: Memory, wish: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(PlacementError) as caught:
        place(qwen, memory, **wish)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"device": "gpu"}, "`device` 'gpu': expected"),
        ({"live_quantize": "int4"}, "`quantize` 'int4': expected"),
        ({"live_dtype": "int8"}, "int8"),
    ],
)
def test_an_unknown_wish_is_refused_by_name(qwen: Plan, wish: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        place(qwen, PLENTY, **wish)


def test_the_lines_hold_the_sums(qwen: Plan) -> None:
    card = Memory(24 * GB, 7_900_000_000, "NVIDIA Test")
    lines = place(qwen, card, live="held", device="cuda").lines
    assert lines[:6] == (
        "fits: 8.3B in nf4 in 7.85 GB of 7.90 GB, held; on the card, 4 questions at a time",
        "memory: 7.90 GB free on NVIDIA Test, 24.00 GB of RAM available",
        "work: 805 MB assumed for activations and staging"
        " + 470 MB key-value cache of 4 x 2048 tokens"
        " + 407 MB, 3 x the largest quantized tensor",
        "cuda BF16 at batch 1: model 16.58 GB + work 721 MB + spare 268 MB = 17.57 GB of 7.90 GB:"
        " does not fit",
        "cuda int8 at batch 1: model 9.39 GB + work 1.13 GB + spare 268 MB = 10.79 GB of 7.90 GB:"
        " does not fit",
        "cuda nf4 at batch 4: model 5.90 GB + work 1.68 GB + spare 268 MB = 7.85 GB of 7.90 GB:"
        " chosen",
    )
    whole = place(qwen, Memory(24 * GB, None, None)).lines
    assert whole[0] == (
        "fits: 8.3B exact (bf16) in 18.86 GB of 24.00 GB, held; on the CPU, 8 questions at a time"
    )
    assert whole[1] == "memory: no CUDA card, 24.00 GB of RAM available"


@pytest.mark.parametrize(
    ("ram", "what"),
    [
        (16 * GB, "layers streamed from the disk"),
        (60 * GB, "layers streamed from the page cache"),
        (22 * GB // 10, "layers and head streamed from the disk"),
    ],
)
def test_the_lines_of_a_streamed_model(qwen: Plan, ram: int, what: str) -> None:
    found = place(qwen, Memory(ram, None, None), live="streamed")
    verdict = found.lines[0]
    chosen = next(line for line in found.lines if line.endswith(": chosen"))
    size, free = format_size(found.required_bytes), format_size(ram)
    assert verdict == (
        f"fits: 8.3B exact (bf16) in {size} of {free}, {what}; on the CPU,"
        f" {found.batch_size} question{'s' * (found.batch_size > 1)} at a time"
    )
    waits = f"batches: {found.batches_at_once} go through a layer before the next is read; "
    assert any(line.startswith(waits) for line in found.lines) == (found.batches_at_once > 1)
    rest = "962 MB" if found.head_in_windows else "2.02 GB"
    assert chosen.startswith(f"{found}: two layers and the rest {rest} + work")
    assert (
        found.lines[-1].startswith("page cache: ") and "each pass reads 30.45 GB" in found.lines[-2]
    )


# Where base and donor go


def test_sources_fill_the_card_then_pinned_memory_then_the_page_cache(small: MakePlan) -> None:
    plan = small()
    # Base and donor of the embedding take 960 bytes; of layer 0 the norm 48, q 384, k 192, v 192,
    # o 384; q does not fit on the card any more, and nothing follows it there
    need = WHOLE + GIB + KV + SPARE
    found = place(plan, Memory(2 * 1000, need + 960 + 48 + 383, None))
    assert found.vram_source_bytes == 960 + 48
    assert found.pinned_source_bytes == 384 + 192 + 192  # o would be 1152 of the 1000
    assert found.cached_source_bytes == SOURCES - 960 - 48 - 768
    sources = locate_sources(plan, found.vram_source_bytes, found.pinned_source_bytes)
    where = [(part.role, location) for part, _, location in sources]
    assert where[:5] == [
        ("embed", "vram"),
        ("layers.0.attn_norm.weight", "vram"),
        *((f"layers.0.attn.{role}.weight", "pinned") for role in "qkv"),
    ]
    assert where[5:] and {location for _, location in where[5:]} == {"cache"}


def test_a_line_says_what_each_alpha_reads_from_the_disk_again(qwen: Plan) -> None:
    tight = place(qwen, Memory(24 * GB, None, None))
    assert not tight.sources_stay_cached
    assert tight.lines[-1] == (
        "page cache: 5.14 GB of RAM is left for it;"
        " each alpha reads 25.31 GB or more from the disk again"
    )
    ample = place(qwen, Memory(64 * GB, 100 * GB, None), device="cpu")
    assert (ample.vram_source_bytes, ample.pinned_source_bytes) == (0, 0)
    assert ample.sources_stay_cached
    assert ample.lines[-1] == ("page cache: 45.14 GB of RAM is left for it; the disk is read once")


def test_on_a_card_the_lines_say_where_the_sources_are(qwen: Plan) -> None:
    all_there = place(qwen, Memory(64 * GB, 80 * GB, None))
    assert all_there.lines[-1] == "base + donor: each alpha reads 30.45 GB: 30.45 GB in VRAM"
    found = place(qwen, Memory(16 * GB, 24 * GB, None))
    in_vram, pinned = format_size(found.vram_source_bytes), format_size(found.pinned_source_bytes)
    left = 16 * GB - found.pinned_source_bytes - SPARE
    assert found.lines[-2:] == (
        f"base + donor: each alpha reads 30.45 GB: {in_vram} in VRAM, {pinned} in pinned RAM,"
        f" {format_size(found.cached_source_bytes)} through the page cache",
        f"page cache: {format_size(left)} of RAM is left for it; each alpha reads"
        f" {format_size(found.cached_source_bytes - left)} or more from the disk again",
    )


# More memory

AMOUNTS = st.integers(0, 64 * GB)
CARDS = st.none() | AMOUNTS


def attempt(plan: Plan, memory: Memory) -> Placement | None:
    try:
        return place(plan, memory)
    except PlacementError:
        return None


Way = tuple[str, bool, str | None, int]


@pytest.fixture(scope="module")
def needs(mplug: Plan) -> dict[str, dict[Way, int]]:
    """By device, bytes that each precision and batch takes up there, the most wanted first."""
    ways = (("held", "none"), ("streamed", "none"), ("held", "int8"), ("held", "nf4"))
    less = 2 * (32000 - model_size.HEAD_WINDOW_ROWS) * 4096  # of a head in windows
    found: dict[str, dict[Way, int]] = {"cuda": {}, "cpu": {}}
    for device, by_way in found.items():
        for live, quantize in ways:
            for size in (8, 4, 2, 1):
                wish = {"live": live, "live_quantize": quantize, "batch_size": size}
                each = place(mplug, Memory(1000 * GB, 1000 * GB, None), device=device, **wish)
                need = each.model_bytes + each.work_bytes + SPARE
                by_way[live, False, each.quantize, size] = need
            if live == "streamed":
                cut = {
                    (live, True, *key[2:]): n - less for key, n in by_way.items() if key[0] == live
                }
                by_way |= cut
    return found


@given(ram=AMOUNTS, vram=CARDS)
def test_the_batch_gives_way_before_the_precision_and_that_before_the_device(
    mplug: Plan, needs: dict[str, dict[Way, int]], ram: int, vram: int | None
) -> None:
    found = attempt(mplug, Memory(ram, vram, None))
    fitting = [
        (device, *way)
        for device, free in (("cuda", vram or 0), ("cpu", ram))
        for way, need in needs[device].items()
        if need <= free
    ]
    expected = next(iter(fitting), None)
    if found is None:
        assert expected is None
        return
    chosen = (found.device, found.live, found.head_in_windows, found.quantize, found.batch_size)
    assert chosen == expected


@given(ram=AMOUNTS, vram=CARDS)
def test_nothing_is_promised_twice_or_left_out(mplug: Plan, ram: int, vram: int | None) -> None:
    found = attempt(mplug, Memory(ram, vram, None))
    if found is None:
        return
    held = found.required_bytes + found.waiting_bytes + found.vram_source_bytes
    free = ram if found.device == "cpu" else vram
    assert free is not None and held <= free
    assert found.pinned_source_bytes <= ram // 2
    sums = {"vram": 0, "pinned": 0, "cache": 0}
    for part, nbytes, location in locate_sources(
        mplug, found.vram_source_bytes, found.pinned_source_bytes
    ):
        assert part.donor is not None
        assert nbytes == part.base.nbytes + part.donor.nbytes
        sums[location] += nbytes
    assert sums == {
        "vram": found.vram_source_bytes,
        "pinned": found.pinned_source_bytes,
        "cache": found.cached_source_bytes,
    }
    everything = sum(p.base.nbytes + p.donor.nbytes for _, p in mplug.parts if p.donor)
    assert sum(sums.values()) == everything
