"""The donor's weight by layer and role: what it means, how it is written, and the bytes it makes.

The oracle for bytes takes each tensor's layer from its name and blends with the reference kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowmem_adamms.kernels import reference
from tiny import raw, seen

from lowmem_adamms import Alphas, LiveModel, make_plan, merge
from lowmem_adamms.cli import main
from lowmem_adamms.errors import FormatError, OutputError, RecipeError
from lowmem_adamms.mapping.alphas import (
    alpha_from_json,
    alpha_of,
    alpha_to_json,
    format_lines,
    from_roles,
    interpolate,
    parse_alpha_layers,
    resolve,
)
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging import disk_sink, loop
from lowmem_adamms.merging.verify import verify

Pair = tuple[Path, Path]
LAYERS = 5


def make_pair(folder: Path, base: str, donor: str, ancestor: Any) -> Pair:
    return (
        tiny.make(base, folder / "base", ancestor=ancestor),
        tiny.make(donor, folder / "donor", ancestor=ancestor),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Qwen2-VL and a LLaVA-OneVision of five layers."""
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    return make_pair(tmp_path_factory.mktemp("pair"), "qwen2_vl", "llava_onevision", parent)


@pytest.fixture(scope="module")
def plan(pair: Pair) -> Plan:
    return make_plan(*pair)


def blended(base: torch.Tensor, donor: torch.Tensor, alpha: float) -> bytes:
    bits = (tensor.contiguous().view(torch.int16).numpy().view("u2") for tensor in (base, donor))
    return bytes(reference.blend(*bits, ("BF16", "BF16", "BF16"), alpha, True).tobytes())


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in tiny.load(folder).items()}


def expected(pair: Pair, of: Callable[[str], float]) -> dict[str, bytes]:
    """Every tensor of the merged Qwen2-VL; of: a tensor's weight by its name."""
    base, donor = tiny.load(pair[0]), tiny.load(pair[1])
    return {
        name: raw(tensor)
        if name.startswith("visual.")
        # The donor has more rows of embedding and head, behind those that both share
        else blended(tensor, donor[f"language_model.{name}"][: len(tensor)], of(name))
        for name, tensor in base.items()
    }


def by_layer(weights: list[float], outside: float) -> Callable[[str], float]:
    def of(name: str) -> float:
        found = re.search(r"\.layers\.(\d+)\.", name)
        return weights[int(found[1])] if found else outside

    return of


# Bytes


@pytest.mark.parametrize("window", [None, 4096, 1000])
def test_each_layer_is_blended_at_its_own_alpha(
    pair: Pair, plan: Plan, window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends of the range as well: there tensors are copied, in the middle of windows."""
    if window:
        monkeypatch.setattr(loop, "WINDOW", window)
        monkeypatch.setattr(disk_sink, "WINDOW", window)
    weights = [0.1, 0.0, 0.35, 1.0, 0.6]
    alpha = Alphas(0.25, {f"layers.{i}": weight for i, weight in enumerate(weights)})
    out = merge(plan, alpha, tmp_path / "out")
    assert tensors(out) == expected(pair, by_layer(weights, 0.25))
    verify(out, deep=True, base=pair[0], donor=pair[1])


def test_parts_of_a_fused_tensor_may_have_their_own(tmp_path: Path) -> None:
    """CogVLM's q, k and v are one tensor of two streams."""
    fused = make_pair(tmp_path, "cogvlm", "llava", tiny.ancestor("llama"))
    alpha = Alphas(0.3, {"layers.0.attn.k": 0.5, "layers.0.attn.v.weight@vision": 0.0})
    out = merge(make_plan(*fused), alpha, tmp_path / "out")
    base, donor, found = tiny.load(fused[0]), tiny.load(fused[1]), tensors(out)
    stem = "language_model.model.layers.0.self_attn.{}_proj.weight"
    for expert, three in {"language": (0.3, 0.5, 0.3), "vision": (0.3, 0.5, 0.0)}.items():
        name = f"model.layers.0.self_attn.{expert}_expert_query_key_value.weight"
        lent = [donor[stem.format(role)] for role in "qkv"]
        parts = map(blended, base[name].chunk(3), lent, three)
        assert found[name] == b"".join(parts), name
    verify(out, deep=True)


def test_equal_weights_are_one_form_and_the_same_files(
    pair: Pair, plan: Plan, tmp_path: Path
) -> None:
    for equal in (
        Alphas(0.3),
        Alphas(0.9, {"layers": 0.3, "embed": 0.3, "norm": 0.3, "head": 0.3}),
        Alphas(0.3, {f"layers.{i}": 0.3 for i in range(LAYERS)}),
    ):
        assert resolve(equal, plan) == 0.3
    keeping = make_plan(*pair, embeddings="keep")
    assert resolve(Alphas(0.3, {"embed": 0.5, "head": 0.5}), keeping) == 0.3
    names = [f"layers.2.{role}" for role in ("mlp", "attn_norm", "attn", "mlp_norm")]
    long = Alphas(0.3, dict.fromkeys([*names, "layers.0.attn.q"], 0.5) | {"layers.1": 0.3})
    short = Alphas(0.3, {"layers.0.attn.q": 0.5, "layers.2": 0.5})
    assert resolve(long, plan) == short
    assert seen(merge(plan, long, tmp_path / "long")) == seen(merge(plan, short, tmp_path / "s"))


def test_a_live_model_holds_what_a_merge_writes(plan: Plan, tmp_path: Path) -> None:
    alpha = Alphas(0.2, {"layers.1": 0.6, "layers.3.mlp": 0.0, "head": 1.0})
    merged = tiny.load_model(merge(plan, alpha, tmp_path / "out"))
    with LiveModel(plan, device="cpu", dtype="bf16") as live:
        live.apply(0.5)
        live.apply(alpha)
        assert live.alpha == alpha
        found = {name: raw(tensor.detach()) for name, tensor in live.model.named_parameters()}
    assert found == {name: raw(tensor.detach()) for name, tensor in merged.named_parameters()}


# Papers, journals, resumption


def test_the_recipe_and_the_card_say_each_alpha(plan: Plan, tmp_path: Path) -> None:
    alpha = Alphas(0.3, {"layers.1": 0.5, "layers.2": 0.5, "layers.4.mlp": 0.1, "head": 0.0})
    out = merge(plan, alpha, tmp_path / "out")
    document = json.loads((out / "adamms.json").read_bytes())
    assert document["alpha"] == 0.3
    assert document["alphas"] == {"layers.1": 0.5, "layers.2": 0.5, "layers.4.mlp": 0.1, "head": 0}
    card = (out / "README.md").read_text()
    assert "with a = 0.3, apart from\n" in card
    for line in ("- layers 1-2: 0.5\n", "- layer 4 mlp: 0.1\n", "- head: 0\n"):
        assert line in card


def test_an_edited_recipe_is_found(plan: Plan, tmp_path: Path) -> None:
    out = merge(plan, Alphas(0.3, {"layers.1": 0.5}), tmp_path / "out")
    path = out / "adamms.json"
    document = json.loads(path.read_bytes())
    for alphas in ({"layers.1": 0.4}, {}, {"layers.1": 2}, {"layers.1": "x"}, ["layers.1"], 3):
        path.write_text(json.dumps(document | {"alphas": alphas}))
        with pytest.raises(FormatError):
            verify(out, deep=True, base=plan.base.path, donor=plan.donor.path)


def test_a_killed_merge_resumes_at_the_same_alphas_only(plan: Plan, tmp_path: Path) -> None:
    out, alpha = tmp_path / "out", Alphas(0.3, {"layers.1": 0.5})
    whole = seen(merge(plan, alpha, tmp_path / "whole"))

    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(plan, alpha, out, progress=stop)
    for other in (0.3, Alphas(0.3, {"layers.1": 0.4}), Alphas(0.3, {"layers.2": 0.5})):
        with pytest.raises(OutputError, match="another"):
            merge(plan, other, out)
    again = Alphas(0.3, {"layers.1": 0.5, "layers.2": 0.3})
    assert seen(merge(plan, again, out)) == whole


# The type


def test_the_longest_name_that_fits_counts() -> None:
    values = {
        "layers": 0.2,
        "layers.1": 0.3,
        "layers.1.attn": 0.4,
        "layers.1.attn.q.weight": 0.5,
        "layers.1.attn.k.weight@vision": 0.6,
    }
    weights = {
        None: 0.1,
        "embed": 0.1,
        "layers.10.mlp.up.weight": 0.2,
        "layers.1.mlp.up.weight": 0.3,
        "layers.1.attn.v.weight@text": 0.4,
        "layers.1.attn.q.bias": 0.4,
        "layers.1.attn.q.weight@vision": 0.5,
        "layers.1.attn.k.weight@text": 0.4,
        "layers.1.attn.k.weight@vision": 0.6,
    }
    assert {role: Alphas(0.1, values).of(role) for role in weights} == weights


IN_LAYER = ("attn.q.weight", "attn.q.weight@text", "attn.q.weight@vision", "attn_norm.weight")
ROLES = ["embed", "norm", "head", *(f"layers.{i}.{rest}" for i in (0, 1, 10) for rest in IN_LAYER)]
CHOICES = st.sampled_from([0.0, 0.1, 0.25, 1.0])


@given(st.fixed_dictionaries(dict.fromkeys(ROLES, CHOICES)), st.none() | CHOICES)
def test_a_weight_for_each_role_survives_being_shortened_and_written(
    by_role: Mapping[str, float], default: float | None
) -> None:
    short = from_roles(by_role, default)
    again = alpha_from_json(json.loads(json.dumps(alpha_to_json(short))))
    assert again == short and hash(again) == hash(short)
    for alpha in (short, again):
        assert {role: alpha_of(alpha, role) for role in ROLES} == by_role
    assert isinstance(short, float) == (len(set(by_role.values())) == 1)


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    alpha = Alphas(0, {"layers.10": 0.5, "layers.2": 0.5, "head": 1, "layers.11": 0.5})
    assert list(alpha.values) == ["head", "layers.2", "layers.10", "layers.11"]
    assert str(alpha) == "0; layer 2: 0.5; layers 10-11: 0.5; head: 1"
    mixed = Alphas(0, {"layers.0": 0.5, "layers.0.mlp": 0.5, "layers.1": 0.4, "layers.2": 0.5})
    assert str(mixed) == "0; layer 0: 0.5; layer 1: 0.4; layer 2: 0.5; layer 0 mlp: 0.5"


def test_a_tied_head_has_the_weight_of_the_embedding(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2", tied=True)
    two = [
        tiny.make("qwen2", tmp_path / str(seed), ancestor=parent, seed=seed, tied=True)
        for seed in (1, 2)
    ]
    alpha = resolve(parse_alpha_layers("0.1,0.5", 2), make_plan(*two))
    assert alpha == Alphas(0.1, {"layers.1": 0.5, "norm": 0.5})
    out = merge(make_plan(*two), alpha, tmp_path / "out")
    verify(out, deep=True)
    base, donor = map(tiny.load, two)
    name = "model.embed_tokens.weight"
    assert tensors(out)[name] == blended(base[name], donor[name], 0.1)


def test_a_long_list_is_cut_for_people() -> None:
    alpha = Alphas(0, {f"layers.{i}": 0.1 + i / 1000 for i in range(60)})
    assert format_lines(alpha)[-1] == "and 20 more"


def test_alphas_cannot_be_changed() -> None:
    given_values = {"embed": 0.5}
    alpha = Alphas(0.1, given_values)
    given_values["embed"] = 0.9
    assert alpha.of("embed") == 0.5
    with pytest.raises(TypeError):
        alpha.values["embed"] = 0.9  # type: ignore[index]


def test_weights_outside_the_range_are_refused_with_their_name() -> None:
    with pytest.raises(RecipeError, match=r"layers\.3: alpha is nan, expected"):
        Alphas(0.5, {"layers.3": float("nan")})
    with pytest.raises(RecipeError, match=r"alpha is 1\.1"):
        Alphas(1.1)


@pytest.mark.parametrize("name", ["layers.5", "layer.1", "layers.01", "visual", "", "layers.1.att"])
def test_a_name_of_nothing_is_refused_before_anything_is_written(
    name: str, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no such role; expected layers\.0 to layers\.4, embed"):
        merge(plan, Alphas(0.1, {name: 0.5}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --alpha-layers


def test_a_list_is_interpolated_over_depth() -> None:
    found = parse_alpha_layers("0.1, 0.3,0.5", 5)
    assert [found.of(f"layers.{i}.mlp.up.weight") for i in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [found.of(role) for role in ("embed", "norm", "head")] == [0.1, 0.5, 0.5]
    given_alpha = parse_alpha_layers("0.1,0.3,0.5", 5, 0.7)
    assert [given_alpha.of(role) for role in ("embed", "norm", "head")] == [0.7] * 3
    assert given_alpha.of("layers.1.mlp.up.weight") == 0.2
    longer = parse_alpha_layers("0,0.2,0.4,0.6,0.8,1", 3)
    assert [longer.of(f"layers.{i}.x") for i in range(3)] == [0, 0.5, 1]
    assert parse_alpha_layers("0.3", 7) == parse_alpha_layers("0.3,0.3", 7)


def test_ranges_name_layers_and_the_rest_takes_alpha() -> None:
    found = parse_alpha_layers("1-2:0.2, 4:1,head:0", 6, 0.3)
    assert [found.of(f"layers.{i}.x") for i in range(6)] == [0.3, 0.2, 0.2, 0.3, 1.0, 0.3]
    assert [found.of(role) for role in ("embed", "norm", "head")] == [0.3, 0.3, 0.0]
    whole = parse_alpha_layers("0-5:0.2,embed:0,norm:0.1,head:0.5", 6)
    assert [whole.of(role) for role in ("embed", "norm", "head")] == [0, 0.1, 0.5]


def test_parts_of_all_layers_can_be_named() -> None:
    """The longest name counts: experts go before the MLP they are of, and that before its layer."""
    found = parse_alpha_layers("2:0.9,mlp=0.5,experts:0.2,router=0", 6, 0.3)
    parts = {
        "attn.q.weight": (0.3, 0.9),
        "mlp.up.weight": (0.5, 0.5),
        "mlp.shared_expert_gate.weight": (0.5, 0.5),
        "mlp.experts": (0.2, 0.2),
        "mlp.experts.7.gate.weight": (0.2, 0.2),
        "mlp.router.correction_bias": (0.0, 0.0),
    }
    for part, weights in parts.items():
        assert tuple(found.of(f"layers.{i}.{part}") for i in (1, 2)) == weights, part
    assert found.of("embed") == 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'': expected a number"),
        ("a", "'a': expected a number"),
        ("0.1,2", "alpha is 2.0, expected"),
        ("0.1,3:0.5", "'0.1' is neither one of embed, norm, head, attn,"),
        ("0-6:0.5", "'0-6' is neither"),
        ("4-2:0.5", "'4-2' is neither"),
        ("1:", "'': expected a number"),
        ("1-3:0.5,2:0.1", "layers.2 is named twice"),
        ("1-2:0.2", "says nothing of layers.0; give `alpha`"),
        ("0-5:0.2,embed:0,norm:0.1", "says nothing of head"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_alpha_layers(text, 6)
    assert str(error.value).startswith(f"`alpha_layers` {text!r}: ")
    assert says in str(error.value)


def test_depth_is_interpolated_without_the_dust_of_arithmetic() -> None:
    assert [interpolate([0.3, 0.3, 0.3], i / 27) for i in range(28)] == [0.3] * 28
    assert interpolate([0, 0.3], 2 / 3) == 0.2


# The command line


def test_merge_takes_alphas_by_layer(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["merge", *map(str, pair), "-o", str(out), "--alpha-layers", "0-1:0.2,3:0"]
    assert main([*words, "--alpha", "0.4"]) == 0
    assert tensors(out) == expected(pair, by_layer([0.2, 0.2, 0.4, 0.0, 0.4], 0.4))
    inputs = ["--base", str(pair[0]), "--donor", str(pair[1])]
    assert main(["verify", str(out), "--deep", *inputs]) == 0
