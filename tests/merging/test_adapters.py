"""LoRA adapters as donors, against `base + alpha * scale * B A` in float64, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stacks
import tiny
import torch
from command import run
from hub_server import HubServer, use
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.checkpoints import coded
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.errors import FormatError, MappingError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.merging import loop
from lowmem_adamms.merging.verify import verify

Tensors = dict[str, torch.Tensor]
CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "base_model_name_or_path": "some/text"}
H, INNER = tiny.HIDDEN, tiny.INNER
SHAPES = {
    "self_attn.q_proj": (64, H),
    "self_attn.k_proj": (32, H),
    "mlp.gate_proj": (INNER, H),
    "mlp.down_proj": (H, INNER),
}
PREFIX = "base_model.model.model.layers"


def factors(shape: tuple[int, int], seed: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=random)
    return 0.05 * left, torch.randn(rank, shape[1], generator=random)


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def draw(
    shapes: dict[str, tuple[int, int]],
    seed: int = 0,
    *,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Tensors]:
    """The tensors of an adapter, and by layer and module the product that it adds, unscaled."""
    tensors, products = {}, {}
    for layer in range(tiny.LAYERS):
        for i, (module, shape) in enumerate(shapes.items()):
            left, right = (f.to(dtype) for f in factors(shape, seed + 10 * layer + i, rank))
            name = f"{PREFIX}.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = right, left
            products[f"{layer}.{module}"] = left.double() @ right.double()
    return tensors, products


def assert_rounded(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Whether every value is the bf16 number next to the exact one, as good as halfway."""
    assert out.dtype == torch.bfloat16
    unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((out.double() - exact).abs() <= 0.5001 * unit).all()


def find(tensors: Tensors, ending: str) -> str:
    (name,) = (name for name in tensors if name.endswith(ending) and "visual" not in name)
    return name


@pytest.fixture
def base(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen2_vl"]


@pytest.mark.parametrize("alpha", [0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_of_the_text_model_is_added_to_a_multimodal_one(
    base: Path, tmp_path: Path, alpha: float, dtype: torch.dtype
) -> None:
    tensors, products = draw(SHAPES, dtype=dtype)
    adapter = write(tmp_path / "adapter", tensors)
    plan = make_plan(base, adapter, rounding="nearest")
    assert plan.counts["interpolate"] == len(products)
    assert any("LoRA adapter for some/text" in note for note in plan.notes)
    out = merge(plan, alpha, tmp_path / "out")
    before, after = tiny.load(base), tiny.load(out)
    changed = set()
    for module, product in products.items():
        name = find(before, f"layers.{module}.weight")
        changed.add(name)
        assert_rounded(after[name], before[name].double() + alpha * 2 * product)
        assert tiny.raw(after[name]) != tiny.raw(before[name])
    for name in before.keys() - changed:
        assert tiny.raw(after[name]) == tiny.raw(before[name])
    assert verify(out, deep=True, base=base, donor=adapter).rows
    assert ModelCard.load(out / "README.md").data.base_model == [base.name, "adapter"]
    assert not (out / "adapter_config.json").exists()
    assert min(kinship.measure(plan).cosines.values()) > 0.5


def test_at_alpha_0_it_is_the_base(base: Path, tmp_path: Path) -> None:
    out = merge(make_plan(base, write(tmp_path / "a", draw(SHAPES)[0])), 0, tmp_path / "out")
    before = tiny.load(base)
    assert {n: tiny.raw(t) for n, t in tiny.load(out).items()} == {
        n: tiny.raw(t) for n, t in before.items()
    }


def test_scales(base: Path, tmp_path: Path) -> None:
    """The root of the rank, alphas of modules, ranks of modules."""
    q, q_products = draw({"self_attn.q_proj": (64, H)}, rank=9)
    rest, products = draw({"mlp.gate_proj": (INNER, H)}, seed=5)
    adapter = write(
        tmp_path / "adapter",
        q | rest,
        use_rslora=True,
        rank_pattern={"q_proj": 9},
        alpha_pattern={"1.self_attn.q_proj": 6, r"layers\.0\..*q_proj": 3, "_proj": 99},
    )
    before = tiny.load(base)
    after = tiny.load(
        merge(make_plan(base, adapter, rounding="nearest"), 0.5, tmp_path / "out", force=True)
    )
    for module, product in (q_products | products).items():
        scale = 8 / math.sqrt(4)
        if "q_proj" in module:
            scale = (3 if module.startswith("0") else 6) / 3
        name = find(before, f"layers.{module}.weight")
        assert_rounded(after[name], before[name].double() + 0.5 * scale * product)


def test_windows_and_tiles_of_any_size_give_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write(tmp_path / "adapter", draw(SHAPES, dtype=torch.bfloat16)[0])
    plan = make_plan(base, adapter)
    expected = tiny.load(merge(plan, 0.3, tmp_path / "expected"))
    monkeypatch.setattr(loop, "WINDOW", 1000)
    monkeypatch.setattr(coded, "ROWS", 8)
    monkeypatch.setattr(coded, "COLUMNS", 16)
    out = tiny.load(merge(plan, 0.3, tmp_path / "out"))
    assert {n: tiny.raw(t) for n, t in out.items()} == {n: tiny.raw(t) for n, t in expected.items()}


def test_modules_to_save_are_blended_as_they_are(base: Path, tmp_path: Path) -> None:
    before = tiny.load(base)
    head, norm = find(before, "lm_head.weight"), find(before, "1.input_layernorm.weight")
    bias = find(before, "0.self_attn.q_proj.bias")
    saved = {
        "base_model.model.lm_head.weight": before[head] * 1.5,
        "base_model.model.model.layers.1.input_layernorm.modules_to_save.weight": before[norm] * 2,
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": before[bias] * 3,
    }
    adapter = write(tmp_path / "adapter", saved)
    plan = make_plan(base, adapter, rounding="nearest")
    after = tiny.load(merge(plan, 0.5, tmp_path / "out"))
    assert plan.counts["interpolate"] == 3
    for name, whole in zip((head, norm, bias), saved.values(), strict=True):
        assert_rounded(after[name], (before[name].double() + whole.double()) / 2)


def test_fused_and_duplicated_weights(ancestors: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """CogVLM fuses q, k and v; mPLUG-Owl2 has k twice, and each copy is added to."""
    shapes = {"self_attn.q_proj": (64, H), "self_attn.k_proj": (64, H)}
    tensors, products = draw(shapes)
    adapter = write(tmp_path / "adapter", tensors)
    for family in ("cogvlm", "mplug_owl2"):
        base = tiny.make(family, tmp_path / family, ancestor=ancestors["llama"])
        before = tiny.load(base)
        after = tiny.load(
            merge(make_plan(base, adapter, rounding="nearest"), 0.5, tmp_path / f"{family} out")
        )
        changed = {n for n in before if tiny.raw(before[n]) != tiny.raw(after[n])}
        for layer in range(tiny.LAYERS):
            q, k = (products[f"{layer}.self_attn.{part}_proj"] for part in "qk")
            if family == "cogvlm":
                name = f"model.layers.{layer}.self_attn.language_expert_query_key_value.weight"
                added = {name: torch.cat([q, k, torch.zeros(64, H)])}
            else:
                stem = f"model.layers.{layer}.self_attn"
                added = {f"{stem}.k_proj.multiway.{way}.weight": k for way in (0, 1)}
                added[f"{stem}.q_proj.weight"] = q
            for name, product in added.items():
                assert name in changed
                assert_rounded(after[name], before[name].double() + 0.5 * 2 * product)


def test_two_adapters(base: Path, tmp_path: Path) -> None:
    made = [draw(SHAPES, seed=seed) for seed in (0, 100)]
    adapters = [write(tmp_path / str(i), tensors) for i, (tensors, _) in enumerate(made)]
    before = tiny.load(base)
    plan = make_plan(base, adapters, rounding="nearest")
    out = merge(plan, (0.5, 0.25), tmp_path / "out")
    after = tiny.load(out)
    for module, first in made[0][1].items():
        name = find(before, f"layers.{module}.weight")
        added = 0.5 * 2 * first + 0.25 * 2 * made[1][1][module]
        assert_rounded(after[name], before[name].double() + added)
    assert verify(out, deep=True, base=base, donor=adapters).rows


@pytest.mark.parametrize("options", [(), ("--no-cache",)])
def test_from_the_hub(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = write(tmp_path / "adapter", draw(SHAPES)[0])
    expected = tiny.load(merge(make_plan(base, adapter), 0.3, tmp_path / "expected"))
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        server.add("org/base", base)
        server.add("org/adapter", adapter)
        assert run("org/base", "org/adapter", "-o", "out", "--alpha", "0.3", *options) == 0
    out = tiny.load(tmp_path / "out")
    assert {n: tiny.raw(t) for n, t in out.items()} == {n: tiny.raw(t) for n, t in expected.items()}


def test_a_live_model(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, write(tmp_path / "adapter", draw(SHAPES)[0]))
    expected = tiny.load(merge(plan, 0.3, tmp_path / "out"))
    with LiveModel(plan, device="cpu") as live:
        live.apply(0.9)
        live.apply(0.3)
        values = {tiny.raw(param) for param in live.model.parameters()}
    assert {tiny.raw(tensor) for tensor in expected.values()} <= values


# What is refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA is more than"),
        ({"peft_type": "IA3"}, "an adapter of type IA3"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"fan_in_fan_out": True}, "LoRA with fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"lora_alpha": None}, "lora_alpha of"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
    ],
)
def test_other_adapters_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    adapter = write(tmp_path / "adapter", draw(SHAPES)[0], **config)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(adapter)
    assert said in str(caught.value) and "\n" not in str(caught.value)


STEM = f"{PREFIX}.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{STEM}.lora_A.weight": torch.ones(2, H)}, "has no lora_B"),
        (
            {
                f"{STEM}.lora_A.weight": torch.ones(2, H),
                f"{STEM}.lora_B.weight": torch.ones(64, 3),
            },
            r"are \[64, 3\] and \[2, 64\]",
        ),
        (
            {
                f"{STEM}.lora_A.weight": torch.ones(2, H),
                f"{STEM}.lora_magnitude_vector": torch.ones(64),
            },
            "lora_magnitude_vector is of no plain LoRA",
        ),
        (
            {
                "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9),
                "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(H, 2),
            },
            "embed_tokens.lora_embedding_A is of no plain LoRA; merge the adapter into its model",
        ),
        (
            {
                f"{STEM}.lora_A.weight": torch.ones(2, H, dtype=torch.int8),
                f"{STEM}.lora_B.weight": torch.ones(64, 2),
            },
            "is I8; expected",
        ),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, tensors: Tensors, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        open_checkpoint(write(tmp_path / "adapter", tensors))


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", draw({"self_attn.q_proj": (128, H)})[0])
    with pytest.raises(MappingError, match=r"shapes differ for layers\.0\.attn\.q\.weight"):
        make_plan(base, wide)
    strange = draw({"self_attn.rotor": (64, H), "mlp.gate_proj": (INNER, H)})[0]
    strange["base_model.model.visual.blocks.0.attn.qkv.lora_A.weight"] = torch.ones(2, 3)
    strange["base_model.model.visual.blocks.0.attn.qkv.lora_B.weight"] = torch.ones(9, 2)
    adapter = write(tmp_path / "strange", strange)
    with pytest.raises(MappingError, match=r"changes model.layers.0.self_attn.rotor.weight, which"):
        make_plan(base, adapter)
    plan = make_plan(base, adapter, unmatched="keep")
    assert plan.counts["interpolate"] == tiny.LAYERS
    assert plan.leftover["visual.blocks.0.attn.qkv.weight"] == "vision tower"
    assert any("3 tensors outside" in note for note in plan.notes)


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", draw(SHAPES)[0])
    with pytest.raises(MappingError, match="a LoRA adapter, expected a model; give the model as"):
        make_plan(adapter, base)


def test_the_product_alone_is_what_it_stands_for(tmp_path: Path) -> None:
    from lowmem_adamms.checkpoints.sampled_reads import SampledReader

    tensors, products = draw({"self_attn.q_proj": (200, 1500)})
    held = open_checkpoint(write(tmp_path / "adapter", tensors)).tensors
    span = held["model.layers.0.self_attn.q_proj.weight"]
    expected = (2 * products["0.self_attn.q_proj"]).float().numpy()
    with SampledReader() as reader:
        got = np.frombuffer(reader.read_bytes(span), np.float32).reshape(200, 1500)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        for first, count in ((0, 1), (1499, 2), (64 * 1500 - 1, 2), (250_000, 50_000)):
            piece = reader.read_bytes(span.flat_slice(first, count))
            assert piece == got.reshape(-1)[first : first + count].tobytes()


def test_experts(tmp_path: Path) -> None:
    """One by one they are added to; not where the base has them stacked and transposed."""
    arrays = stacks.spell(stacks.ancestor(), "each")
    left, right = factors((stacks.HIDDEN, stacks.INNER), 0)
    name = "model.layers.1.mlp.experts.2.down_proj"
    tensors = {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
    adapter = write(tmp_path / "adapter", {f"base_model.model.{n}": t for n, t in tensors.items()})
    base = stacks.write(tmp_path / "each", arrays, "each")
    plan = make_plan(base, adapter)
    assert plan.counts["interpolate"] == 1
    after = tiny.load(merge(plan, 0.5, tmp_path / "out"))[f"{name}.weight"].double().numpy()
    exact = arrays[f"{name}.weight"] + (left.double() @ right.double()).numpy()
    np.testing.assert_allclose(after, exact, rtol=1e-5, atol=1e-6)
    stacked = stacks.write(
        tmp_path / "stacked", stacks.spell(stacks.ancestor(), "transposed"), "transposed"
    )
    with pytest.raises(MappingError, match=r"changes .*experts.down_proj, which .* another order"):
        make_plan(stacked, adapter)


def test_modules_fused_in_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    """As of Phi-3: the rows of q, k and v, as many as the base has of each."""
    tensors, products = draw({"self_attn.qkv_proj": (128, H)})
    before = tiny.load(base)
    plan = make_plan(base, write(tmp_path / "adapter", tensors), rounding="nearest")
    after = tiny.load(merge(plan, 0.5, tmp_path / "out", force=True))
    for layer in range(tiny.LAYERS):
        product = products[f"{layer}.self_attn.qkv_proj"]
        for part, rows in (("q", slice(64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
            name = find(before, f"layers.{layer}.self_attn.{part}_proj.weight")
            assert_rounded(after[name], before[name].double() + 0.5 * 2 * product[rows])


def test_some_rows_of_a_sum_are_those_of_the_whole(tmp_path: Path) -> None:
    """What is read may hold more rows than are wanted, from another tile on."""
    left, right = factors((200, 8), 1)
    tensors = {"base": torch.ones(200, 8).cumsum(0), "left": left, "right": right}
    save_file(tensors, tmp_path / "model.safetensors")
    spans = open_checkpoint(tmp_path / "model.safetensors").tensors
    coding = coded.LowRank(spans["base"], spans["left"], spans["right"], 2.0)
    whole = coded.CodedSpan.whole(spans["left"], (200, 8), coding)
    with MappedFiles() as files:
        everything = coded.view_span(whole, files.view)
        for first, last in ((0, 1), (70, 199), (130, 140)):
            rows = coded.view_span(whole, files.view, whole.rows(first, last))
            assert rows.tobytes() == everything[first * 32 : last * 32].tobytes()
            part = whole.rows(first, last)
            assert coded.view_span(part, files.view).tobytes() == rows.tobytes()
