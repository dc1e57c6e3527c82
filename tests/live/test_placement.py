"""Where a live model goes: sums done by hand, what more memory may change, and what is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

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
from lowmem_adamms.live import free_memory as memory
from lowmem_adamms.live.free_memory import Memory, available_ram, measure
from lowmem_adamms.live.placement import Placement, homes, place
from lowmem_adamms.mapping.join import make_plan
from lowmem_adamms.mapping.plan import Plan

MakePlan: TypeAlias = Callable[..., Plan]
Put: TypeAlias = Callable[[str, object], None]
Smi: TypeAlias = Callable[[str], Path]

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
QWEN_WORK = GIB + 8 * QWEN_KV_EACH
QWEN_STAGING = 3 * 3584 * 18944 * 2


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Makes a plan of two tiny decoders; `more` tensors stand in the base alone."""
    monkeypatch.setitem(ITEM_BYTES, "I64", 8)

    def write(name: str, tensors: Any) -> Checkpoint:
        config = {"architectures": ["LlavaLlamaForCausalLM"], "tie_word_embeddings": False}
        write_headers(tmp_path / name, Family(name, config, tensors))
        return open_checkpoint(tmp_path / name)

    def make(dtype: str = "BF16", more: Any = None) -> Plan:
        base = llama_decoder(SMALL, dtype=dtype) | (more or {})
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


def test_a_whole_model_is_its_elements_in_the_live_dtype(small: MakePlan) -> None:
    found = place(small(), PLENTY)
    assert (found.device, found.quantize, found.dtype) == ("cpu", None, "BF16")
    assert found.model_bytes == WHOLE
    assert found.work_bytes == GIB + KV


def test_int8_is_a_byte_an_element_and_four_a_row_of_the_linear_weights(small: MakePlan) -> None:
    found = place(small(), PLENTY, quantize="int8")
    assert found.quantize == "int8"
    assert found.model_bytes == LINEAR + 4 * ROWS + 2 * REST
    assert found.work_bytes == GIB + KV + STAGING


def test_nf4_of_tiny_weights_rounds_each_of_its_tables_up(small: MakePlan) -> None:
    found = place(small(), PLENTY, quantize="nf4")
    halves, scales = 2 * (2 * 32 + 2 * 16 + 3 * 48), 2 * (4 * 1 + 3 * 2)
    assert found.model_bytes == halves + scales + 2 * 7 * 4 + 2 * REST
    assert found.work_bytes == GIB + KV + STAGING


def test_nf4_of_a_true_size_model_has_the_published_rate(
    true_size: dict[str, Checkpoint],
) -> None:
    plan = make_plan(true_size["llama-2-7b"], true_size["vicuna-7b-v1.5"])
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    found = place(plan, PLENTY, quantize="nf4")
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
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (2,), 2 * 2),
        ("some.thing.else.weight", "BF16", (16, 8), 2 * 16 * 8),
    ],
)
def test_only_linear_weights_are_quantized_and_only_floats_are_cast(
    small: MakePlan, name: str, dtype: str, shape: tuple[int, ...], int8: int
) -> None:
    with_it = small(more=typed("", dtype, {name: shape}))
    bare, more = (place(plan, PLENTY, quantize="int8") for plan in (small(), with_it))
    assert more.model_bytes - bare.model_bytes == int8


def test_the_live_dtype_is_that_of_most_bytes_unless_one_is_asked_for(small: MakePlan) -> None:
    tower = typed("model.vision_tower.", "F32", {"a.weight": (100, 4), "b.weight": (10,)})
    assert place(small(), PLENTY).dtype == "BF16"
    assert place(small(more=tower), PLENTY).dtype == "BF16"  # 1640 bytes against 2640
    tower |= typed("model.vision_tower.", "F32", {"c.weight": (251, 1)})
    most = place(small(more=tower), PLENTY)  # 2644
    assert most.dtype == "F32"
    asked = place(small(), PLENTY, dtype="F32")
    assert (asked.dtype, asked.model_bytes) == ("F32", 2 * WHOLE)
    assert asked.work_bytes == GIB + 2 * KV
    with pytest.raises(RecipeError, match="int8"):
        place(small(), PLENTY, dtype="int8")


def test_batch_and_length_set_the_work(small: MakePlan) -> None:
    found = place(small(), PLENTY, batch=3, tokens=100)
    assert found.batch == 3
    assert found.work_bytes == (512 + 3 * 64) * MIB + 3 * KV_EACH * 100 // 2048
    # A gibibyte of activations at the batch that is tried first, 576 MiB at the last
    assert place(small(), PLENTY, batch=8).work_bytes == GIB + KV
    assert place(small(), PLENTY, batch=1).work_bytes == 576 * MIB + KV_EACH


@pytest.mark.parametrize(
    ("base", "donor"),
    [
        ("mplug-owl2-llama2-7b", "llava-1.5-7b-hf"),
        ("cogvlm-chat-7b", "llava-1.5-7b-hf"),
        ("llava-1.5-7b-hf", "cogvlm-chat-7b"),
    ],
)
def test_two_streams_of_keys_and_values_share_one_cache(
    true_size: dict[str, Checkpoint], base: str, donor: str
) -> None:
    plan = make_plan(true_size[base], true_size[donor])
    assert place(plan, PLENTY).work_bytes == GIB + 32 * 2 * 4096 * 2 * 8 * 2048


# Which option


@pytest.mark.parametrize(
    ("ram", "vram", "device", "quantize", "batch"),
    [
        (32 * GB, 24 * GB, "cuda", None, 8),
        (4 * GB, 24 * GB, "cuda", None, 8),
        (32 * GB, 17 * GIB, "cuda", None, 4),
        (32 * GB, 12 * GIB, "cuda", "int8", 8),
        (32 * GB, 12 * GB, "cuda", "int8", 4),
        (32 * GB, 11 * GB, "cuda", "int8", 2),
        (32 * GB, 8 * GIB, "cuda", "nf4", 8),
        (32 * GB, 7 * GIB, "cuda", "nf4", 2),
        (32 * GB, 6 * GIB, "cpu", None, 8),
        (18 * GB, None, "cpu", None, 2),
        (14 * GB, None, "cpu", "int8", 8),
        (10 * GB, None, "cpu", "nf4", 8),
    ],
)
def test_a_7b_model_goes_to_the_fastest_device_at_the_best_precision(
    qwen: Plan, ram: int, vram: int | None, device: str, quantize: str | None, batch: int
) -> None:
    found = place(qwen, Memory(ram, vram, "a card" if vram else None))
    assert (found.device, found.quantize, found.dtype) == (device, quantize, "BF16")
    assert found.batch == batch
    if (quantize, batch) == (None, 8):
        assert (found.model_bytes, found.work_bytes) == (QWEN_BF16, QWEN_WORK)


def test_a_7b_model_in_nf4_fits_a_card_of_8_gb_with_7_6_gib_free(qwen: Plan) -> None:
    card = Memory(16 * GB, 76 * GIB // 10, "a card")
    found = place(qwen, card)
    assert (found.device, found.quantize, found.batch) == ("cuda", "nf4", 4)
    assert found.model_bytes == 5_898_495_360
    assert found.work_bytes == 768 * MIB + 4 * QWEN_KV_EACH + QWEN_STAGING
    assert found.model_bytes + found.work_bytes + SPARE == 7_849_371_008
    with pytest.raises(PlacementError, match=r"cuda nf4 at batch 8 needs 8\.59 GB"):
        place(qwen, card, device="cuda", batch=8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_the_need_is_model_work_and_256_mib_to_the_byte(
    qwen: Plan, device: str, quantize: Any
) -> None:
    wish: dict[str, Any] = {"device": device, "quantize": quantize}

    def there(count: int) -> Memory:
        return Memory(count, GB, None) if device == "cpu" else Memory(GB, count, None)

    for batch, smaller in [(8, 4), (4, 2), (2, 1), (1, None), (3, None)]:
        found = place(qwen, there(1000 * GB), batch=batch, **wish)
        need = found.model_bytes + found.work_bytes + SPARE
        again = place(qwen, there(need), batch=batch, **wish)
        assert (again.device, again.quantize or "none", again.batch) == (device, quantize, batch)
        assert (again.model_bytes, again.work_bytes) == (found.model_bytes, found.work_bytes)
        with pytest.raises(PlacementError, match=f"at batch {batch} needs"):
            place(qwen, there(need - 1), batch=batch, **wish)
        if smaller:
            assert place(qwen, there(need), **wish).batch == batch
            assert place(qwen, there(need - 1), **wish).batch == smaller


def test_a_given_batch_is_kept_and_the_precision_gives_way(qwen: Plan) -> None:
    card = Memory(32 * GB, 12 * GB, "a card")
    found = [place(qwen, card, batch=batch) for batch in (None, 1, 8, 16)]
    assert [(each.device, each.quantize, each.batch) for each in found] == [
        ("cuda", "int8", 4),
        ("cuda", "int8", 1),
        ("cuda", "nf4", 8),
        ("cuda", "nf4", 16),
    ]
    assert place(qwen, PLENTY, batch=64).batch == 64
    assert place(qwen, PLENTY).batch == 8


def test_a_wish_wins_over_the_order(qwen: Plan) -> None:
    large = Memory(100 * GB, 80 * GB, "a card")
    assert place(qwen, large, device="cpu").device == "cpu"
    assert place(qwen, large, device="cpu", quantize="nf4").quantize == "nf4"
    assert place(qwen, large, quantize="int8").quantize == "int8"
    # Whole on the CPU rather than quantized on the card
    assert place(qwen, Memory(32 * GB, 12 * GB, "a card"), quantize="none").device == "cpu"


@pytest.mark.parametrize(
    ("memory", "wish", "words"),
    [
        (
            Memory(4 * GB, None, None),
            {},
            [
                "cpu nf4 at batch 1 needs 7.30 GB of RAM but 4.00 GB is free",
                "a 0.12 GB key-value cache of 1 x 2048 tokens",
                "smaller model",
                "--ram",
            ],
        ),
        (
            Memory(4 * GB, 5 * GB, "a card"),
            {},
            [
                "cuda nf4 at batch 1 needs 7.30 GB of VRAM but 5.00 GB is free",
                "cpu nf4 at batch 1 needs 7.30 GB of RAM but 4.00 GB is free",
                "--vram and --ram",
            ],
        ),
        (
            Memory(12 * GB, None, None),
            {"quantize": "none"},
            ["cpu BF16 at batch 1 needs 17.57 GB", "--device cpu --live-quantize int8 would fit"],
        ),
        (
            Memory(32 * GB, 12 * GB, "a card"),
            {"device": "cuda", "quantize": "none", "batch": 8},
            [
                "cuda BF16 at batch 8 needs 18.86 GB of VRAM",
                "a 0.94 GB key-value cache of 8 x 2048 tokens",
                "--device cuda --live-quantize nf4 would fit, a smaller --batch-size may help",
            ],
        ),
        (
            Memory(32 * GB, 4 * GB, "a card"),
            {"device": "cuda"},
            ["cuda nf4 at batch 1 needs", "--device cpu --live-quantize none would fit, or free"],
        ),
        (
            Memory(32 * GB, None, None),
            {"device": "cuda"},
            ["no CUDA card", "--device cpu --live-quantize none would fit", "--vram SIZE"],
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


@pytest.mark.parametrize("wish", [{"device": "gpu"}, {"quantize": "int4"}])
def test_an_unknown_wish_is_refused_by_name(qwen: Plan, wish: dict[str, Any]) -> None:
    (option, value), *_ = wish.items()
    with pytest.raises(RecipeError, match=f"--{option} {value}: expected"):
        place(qwen, PLENTY, **wish)


def test_the_lines_hold_the_sums(qwen: Plan) -> None:
    lines = place(qwen, Memory(24 * GB, 7_900_000_000, "NVIDIA Test"), device="cuda").lines
    assert lines[:5] == (
        "memory: 7.90 GB free on NVIDIA Test, 24.00 GB of RAM available",
        "work: 0.81 GB assumed for activations and staging"
        " + 0.47 GB key-value cache of 4 x 2048 tokens"
        " + 0.41 GB, 3 x the largest quantized tensor",
        "cuda BF16 at batch 1: model 16.58 GB + work 0.72 GB + spare 0.27 GB = 17.57 GB of 7.90 GB:"
        " does not fit",
        "cuda int8 at batch 1: model 9.39 GB + work 1.13 GB + spare 0.27 GB = 10.79 GB of 7.90 GB:"
        " does not fit",
        "cuda nf4 at batch 4: model 5.90 GB + work 1.68 GB + spare 0.27 GB = 7.85 GB of 7.90 GB:"
        " chosen",
    )
    assert all("\n" not in line for line in lines)
    whole = place(qwen, Memory(24 * GB, None, None)).lines
    assert "work: 1.07 GB" in whole[1] and whole[1].endswith("of 8 x 2048 tokens")
    assert whole[2].startswith("cpu BF16 at batch 8:") and whole[2].endswith(": chosen")


# Where base and donor go


def test_sources_fill_the_card_then_pinned_memory_then_the_page_cache(small: MakePlan) -> None:
    plan = small()
    # Embedding 960 bytes of base and donor; layer 0: q 384, k 192, v 192, o 384, gate 576, …
    order = [part.role for step in plan.steps for part in step.parts][:6]
    assert order == ["embed", *(f"layers.0.{role}" for role in LAYER[:5])]
    need = WHOLE + GIB + KV + SPARE
    found = place(plan, Memory(2 * 1000, need + 960 + 48 + 383, None))
    assert found.sources_vram == 960 + 48  # q does not fit, and nothing follows it
    assert found.sources_pinned == 384 + 192 + 192  # o would be 1152 of the 1000
    assert found.sources_cache == SOURCES - found.sources_vram - found.sources_pinned
    where = [(part.role, home) for _, part, home in homes(plan, found)]
    assert where[:3] == [("embed", "vram"), ("layers.0.attn_norm.weight", "vram"), Q_PINNED]
    assert [home for _, home in where].count("pinned") == 3
    assert where[5:] and {home for _, home in where[5:]} == {"cache"}


LAYER = ("attn_norm.weight", *(f"attn.{part}.weight" for part in "qkvo"))
Q_PINNED = ("layers.0.attn.q.weight", "pinned")


def test_on_the_cpu_all_sources_stay_in_the_page_cache(small: MakePlan) -> None:
    found = place(small(), Memory(1000 * GB, 100 * GB, None), device="cpu")
    assert (found.sources_vram, found.sources_pinned) == (0, 0)
    assert found.sources_cache == SOURCES


def test_what_is_copied_from_the_base_is_no_source(small: MakePlan) -> None:
    tower = typed("model.vision_tower.", "BF16", {"a.weight": (16, 8)})
    assert place(small(more=tower), PLENTY).sources_cache == SOURCES


def test_a_line_says_what_each_alpha_reads_from_the_disk_again(qwen: Plan) -> None:
    tight = place(qwen, Memory(24 * GB, None, None))
    assert tight.lines[-1] == (
        "page cache: at most 5.14 GB of it stays in the RAM left;"
        " each alpha reads the other 25.31 GB or more from the disk again"
    )
    ample = place(qwen, Memory(64 * GB, None, None))
    assert "all of it fits the 45.14 GB" in ample.lines[-1]


def test_on_a_card_the_lines_say_where_the_sources_are(qwen: Plan) -> None:
    all_there = place(qwen, Memory(64 * GB, 80 * GB, None))
    assert all_there.lines[-1] == "base + donor: each alpha reads 30.45 GB: 30.45 GB in VRAM"
    found = place(qwen, Memory(16 * GB, 24 * GB, None))
    spread = [found.sources_vram, found.sources_pinned, found.sources_cache]
    in_vram, in_pinned, cached = (f"{count / 1e9:.2f} GB" for count in spread)
    left = 16 * GB - found.sources_pinned - SPARE
    assert found.lines[-2:] == (
        f"base + donor: each alpha reads 30.45 GB: {in_vram} in VRAM, {in_pinned} in pinned RAM,"
        f" {cached} through the page cache",
        f"page cache: at most {left / 1e9:.2f} GB of it stays in the RAM left; each alpha reads"
        f" the other {(found.sources_cache - left) / 1e9:.2f} GB or more from the disk again",
    )


# More memory

AMOUNTS = st.integers(0, 64 * GB)
CARDS = st.none() | AMOUNTS
RANKS = [(device, quantize) for device in ("cpu", "cuda") for quantize in ("nf4", "int8", None)]


def attempt(plan: Plan, memory: Memory, **wish: Any) -> Placement | None:
    try:
        return place(plan, memory, **wish)
    except PlacementError:
        return None


@given(ram=AMOUNTS, vram=CARDS, more_ram=AMOUNTS, more_vram=CARDS)
def test_more_memory_never_gives_a_worse_placement(
    mplug: Plan, ram: int, vram: int | None, more_ram: int, more_vram: int | None
) -> None:
    cards = None if vram is more_vram is None else (vram or 0) + (more_vram or 0)
    less = attempt(mplug, Memory(ram, vram, None))
    more = attempt(mplug, Memory(ram + more_ram, cards, None))
    if less is None:
        return
    assert more is not None
    ranks = [RANKS.index((found.device, found.quantize)) for found in (less, more)]
    # The batch counts only between placements that are otherwise as good
    assert (ranks[0], less.batch) <= (ranks[1], more.batch)
    if (ranks[0], less.batch) == (ranks[1], more.batch):
        assert less.sources_vram <= more.sources_vram
        assert less.sources_cache >= more.sources_cache


@pytest.fixture(scope="module")
def needs(mplug: Plan) -> dict[tuple[str | None, int], int]:
    """Bytes that each precision and batch takes up on its device, the most wanted first."""
    found = [
        place(mplug, PLENTY, quantize=quantize, batch=batch)
        for quantize in WISHES
        for batch in (8, 4, 2, 1)
    ]
    return {
        (each.quantize, each.batch): each.model_bytes + each.work_bytes + SPARE for each in found
    }


WISHES: tuple[Any, ...] = ("none", "int8", "nf4")


@given(ram=AMOUNTS, vram=CARDS)
def test_the_batch_gives_way_before_the_precision_and_the_precision_before_the_device(
    mplug: Plan, needs: dict[tuple[str | None, int], int], ram: int, vram: int | None
) -> None:
    found = attempt(mplug, Memory(ram, vram, None))
    fitting = [
        (device, *way)
        for device, there in (("cuda", vram or 0), ("cpu", ram))
        for way, need in needs.items()
        if need <= there
    ]
    chosen = (found.device, found.quantize, found.batch) if found else None
    assert chosen == next(iter(fitting), None)


@given(ram=AMOUNTS, vram=CARDS)
def test_nothing_is_promised_twice_or_left_out(mplug: Plan, ram: int, vram: int | None) -> None:
    found = attempt(mplug, Memory(ram, vram, None))
    if found is None:
        return
    held = found.model_bytes + found.work_bytes + SPARE + found.sources_vram
    there = ram if found.device == "cpu" else vram
    assert there is not None and held <= there
    assert found.sources_pinned <= ram // 2
    sums = {"vram": 0, "pinned": 0, "cache": 0}
    for _, part, home in homes(mplug, found):
        assert part.donor is not None
        sums[home] += part.base.nbytes + part.donor.nbytes
    assert sums == {
        "vram": found.sources_vram,
        "pinned": found.sources_pinned,
        "cache": found.sources_cache,
    }
    blended = [part for step in mplug.steps for part in step.parts if part.donor]
    assert sum(sums.values()) == sum(
        part.base.nbytes + part.donor.nbytes for part in blended if part.donor
    )


# What there is


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes one of the system's small files under a root of our own."""

    def write(name: str, content: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")

    write("proc/meminfo", "MemTotal: 64 kB\nMemFree:  9 kB\nMemAvailable:    8000000 kB")
    return write


AVAILABLE = 8_000_000 * 1024


def test_without_a_limit_it_is_what_the_kernel_calls_available(put: Put, tmp_path: Path) -> None:
    assert available_ram(tmp_path) == AVAILABLE
    put("proc/self/cgroup", "0::/user/job")
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


def test_cached_files_in_a_cgroup_make_way(put: Put, tmp_path: Path) -> None:
    put("proc/self/cgroup", "0::/")
    put("sys/fs/cgroup/memory.max", 6 * GB)
    put("sys/fs/cgroup/memory.current", 5 * GB)
    put("sys/fs/cgroup/memory.stat", f"anon 1\nactive_file {GB}\ninactive_file {2 * GB}\nfile 7")
    assert available_ram(tmp_path) == 4 * GB


def test_a_version_1_cgroup_bounds_it_too(put: Put, tmp_path: Path) -> None:
    put("proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/")
    root = "sys/fs/cgroup/memory"  # in a container /docker/x is not there: the mount is it
    put(f"{root}/memory.limit_in_bytes", 3 * GB)
    put(f"{root}/memory.usage_in_bytes", 2 * GB)
    put(f"{root}/memory.stat", f"active_file 99\ntotal_active_file {GB}\ntotal_inactive_file 0")
    assert available_ram(tmp_path) == 2 * GB
    put(f"{root}/memory.limit_in_bytes", 9223372036854771712)
    assert available_ram(tmp_path) == AVAILABLE


def test_an_overdrawn_cgroup_leaves_nothing(put: Put, tmp_path: Path) -> None:
    put("proc/self/cgroup", "0::/")
    put("sys/fs/cgroup/memory.max", GB)
    put("sys/fs/cgroup/memory.current", 2 * GB)
    assert available_ram(tmp_path) == 0


def test_no_file_outside_the_mount_is_read(put: Put, tmp_path: Path) -> None:
    put("proc/self/cgroup", "0::/../outside")
    for folder, limit in (("cgroup", 3 * GB), ("outside", 2 * GB)):
        put(f"sys/fs/{folder}/memory.max", limit)
        put(f"sys/fs/{folder}/memory.current", GB)
    assert available_ram(tmp_path) == 2 * GB


def test_without_proc_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":  # as macOS does
            raise ValueError("unrecognized configuration name")
        return {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr("os.sysconf", sysconf)
    assert available_ram(tmp_path) == 4_096_000
    monkeypatch.delattr("os.sysconf")  # as on Windows
    with pytest.raises(PlacementError, match="--ram"):
        available_ram(tmp_path)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi of the given shell lines on an otherwise empty PATH; returns its log."""
    bin_, log = tmp_path / "bin", tmp_path / "log"
    bin_.mkdir()
    monkeypatch.setenv("PATH", str(bin_))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(script: str) -> Path:
        program = bin_ / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
        program.chmod(0o755)
        return log

    return install


CARD = "echo 'NVIDIA GeForce RTX 4090, 23028'"


def test_what_is_given_wins(smi: Smi) -> None:
    log = smi(CARD)
    assert measure(ram=5, vram=7) == Memory(5, 7, "NVIDIA GeForce RTX 4090")
    log.unlink()
    assert measure(ram=5, vram=0) == Memory(5, None, None)
    assert not log.exists()  # no card is wanted: none is looked for


def test_a_card_can_be_planned_for_where_there_is_none(smi: Smi) -> None:
    assert measure(ram=5, vram=7) == Memory(5, 7, None)
    assert measure(ram=5) == Memory(5, None, None)


def test_this_machines_ram_is_measured(smi: Smi) -> None:
    found = measure()
    assert 0 < found.ram < 1 << 50
    assert found.vram is None


@pytest.mark.parametrize(
    ("visible", "asked"),
    [(None, "0"), ("0", "0"), ("2,0", "2"), (" 1", "1"), ("GPU-8932f937,1", "GPU-8932f937")],
)
def test_the_first_visible_card_is_asked_for(
    smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str
) -> None:
    log = smi(CARD)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure(ram=5) == Memory(5, 23028 * MIB, "NVIDIA GeForce RTX 4090")
    assert log.read_text().split() == [
        f"--id={asked}",
        "--query-gpu=name,memory.free",
        "--format=csv,noheader,nounits",
    ]


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_a_hidden_card_is_no_card(smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    log = smi(CARD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure(ram=5) == Memory(5, None, None)
    assert not log.exists()


@pytest.mark.parametrize(
    "script",
    [
        "exit 9",
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
    monkeypatch.setattr(memory, "_SMI_SECONDS", 0.5)
    smi(script)
    assert measure(ram=5) == Memory(5, None, None)


# Sizes


def test_the_decision_needs_neither_torch_nor_transformers(qwen: Plan) -> None:
    script = (
        "import sys\n"
        "from lowmem_adamms.mapping.join import make_plan\n"
        "from lowmem_adamms.live.free_memory import measure\n"
        "from lowmem_adamms.live.placement import place\n"
        "plan = make_plan(*sys.argv[1:])\n"
        "print(place(plan, measure(vram=24 * 10**9)).device)\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    paths = [str(qwen.base.path), str(qwen.donor.path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cuda\n", "")
