"""The donor's weight by layer and role: what it means, how it is written, and the bytes it makes.

The oracle for bytes takes each tensor's layer from its name and blends with the reference kernel.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowmem_adamms.kernels import cpu, reference
from tiny import raw, seen

from lowmem_adamms import Alphas, LiveModel, make_plan, merge
from lowmem_adamms.cli import main
from lowmem_adamms.errors import FormatError, OutputError, RecipeError
from lowmem_adamms.mapping.alphas import (
    Alpha,
    alpha_from_json,
    alpha_to_json,
    blended_roles,
    format_lines,
    from_roles,
    interpolate,
    parse_alpha_layers,
    resolve,
)
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.merging.verify import verify
from lowmem_adamms.searching.recorded_answers import read_answers
from lowmem_adamms.values import parse_alpha

loop = importlib.import_module(
    "lowmem_adamms.merging.loop"
)  # the package's `merge` is the function
disk = importlib.import_module("lowmem_adamms.merging.disk_sink")

Pair = tuple[Path, Path]
LAYERS = 5
WORDS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Qwen2-VL and a LLaVA-OneVision of five layers."""
    folder = tmp_path_factory.mktemp("pair")
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    return (
        tiny.make("qwen2_vl", folder / "base", ancestor=parent),
        tiny.make("llava_onevision", folder / "donor", ancestor=parent),
    )


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A CogVLM, whose q, k and v are one tensor of two streams, and a LLaVA."""
    folder = tmp_path_factory.mktemp("fused")
    parent = tiny.ancestor("llama")
    return (
        tiny.make("cogvlm", folder / "base", ancestor=parent),
        tiny.make("llava", folder / "donor", ancestor=parent),
    )


def storage(tensor: torch.Tensor) -> Any:
    words = tensor.contiguous().view(WORDS[tensor.dtype]).numpy()
    return words.view(reference.STORAGE[NAMES[tensor.dtype]])


def blended(base: torch.Tensor, donor: torch.Tensor, alpha: float) -> bytes:
    kinds = NAMES[base.dtype], NAMES[donor.dtype], NAMES[base.dtype]
    return bytes(reference.blend(storage(base), storage(donor), kinds, alpha).tobytes())


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
    pair: Pair, window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends of the range as well: there tensors are copied, in the middle of windows."""
    if window:
        monkeypatch.setattr(loop, "WINDOW", window)
        monkeypatch.setattr(disk, "WINDOW", window)
    weights = [0.1, 0.0, 0.35, 1.0, 0.6]
    alpha = Alphas(0.25, {f"layers.{i}": weight for i, weight in enumerate(weights)})
    out = merge(make_plan(*pair), alpha, tmp_path / "out")
    assert tensors(out) == expected(pair, by_layer(weights, 0.25))
    verify(out, deep=True)


def test_parts_of_a_fused_tensor_may_have_their_own(fused: Pair, tmp_path: Path) -> None:
    alpha = Alphas(
        0.3, {"layers.0.attn.k": 0.5, "layers.1.attn.v.weight@vision": 0.0, "layers.1.mlp": 1.0}
    )
    out = merge(make_plan(*fused), alpha, tmp_path / "out")
    base, donor, found = tiny.load(fused[0]), tiny.load(fused[1]), tensors(out)
    fused_name = "model.layers.{}.self_attn.{}_expert_query_key_value.weight"
    weights: dict[tuple[int, str], tuple[float, float, float]] = {
        (0, "language"): (0.3, 0.5, 0.3),
        (0, "vision"): (0.3, 0.5, 0.3),
        (1, "language"): (0.3, 0.3, 0.3),
        (1, "vision"): (0.3, 0.3, 0.0),
    }
    for (layer, expert), three in weights.items():
        name = fused_name.format(layer, expert)
        stem = f"language_model.model.layers.{layer}.self_attn"
        parts = [
            blended(rows, donor[f"{stem}.{role}_proj.weight"], weight)
            for rows, role, weight in zip(base[name].chunk(3), "qkv", three, strict=True)
        ]
        assert found[name] == b"".join(parts), name
    for layer, weight in ((0, 0.3), (1, 1.0)):
        name = f"model.layers.{layer}.mlp.vision_mlp.up_proj.weight"
        theirs = donor[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
        assert found[name] == blended(base[name], theirs, weight)
    verify(out, deep=True)


def test_equal_weights_are_one_form_and_the_same_files(pair: Pair, tmp_path: Path) -> None:
    plan = make_plan(*pair)
    for equal in (
        Alphas(0.3),
        Alphas(0.9, {"layers": 0.3, "embed": 0.3, "norm": 0.3, "head": 0.3}),
        Alphas(0.3, {f"layers.{i}": 0.3 for i in range(LAYERS)}),
    ):
        assert resolve(equal, plan) == 0.3
    names = [f"layers.2.{role}" for role in ("mlp", "attn_norm", "attn", "mlp_norm")]
    long = Alphas(0.3, dict.fromkeys([*names, "layers.0.attn.q"], 0.5) | {"layers.1": 0.3})
    short = Alphas(0.3, {"layers.0.attn.q": 0.5, "layers.2": 0.5})
    assert resolve(long, plan) == short
    assert seen(merge(plan, long, tmp_path / "long")) == seen(merge(plan, short, tmp_path / "s"))


def test_windows_stay_fused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call more a layer at most: where a window holds the end of one and the next one's start.

    Copies end windows, so the base's own tensors are left out of the count by asking both ways.
    """
    monkeypatch.setattr(loop, "WINDOW", 1 << 16)

    def calls(alpha: Alpha) -> tuple[int, set[float]]:
        found: list[float] = []

        def kernel(parts: Any, dtypes: Any, weight: float) -> None:
            found.append(weight)
            cpu.blend(parts, dtypes, weight)

        loop.run(make_plan(*pair), alpha, Memory(), kernel=kernel)
        return len(found), set(found)

    weights = {f"layers.{i}": 0.1 + 0.1 * i for i in range(LAYERS)}
    plain, _ = calls(0.3)
    layered, met = calls(Alphas(0.05, weights))
    assert met == {0.05, *weights.values()}
    assert plain <= layered <= plain + LAYERS + 1


class Memory:
    """A sink of arrays."""

    def __init__(self) -> None:
        self.out: dict[str, Any] = {}

    def wants(self, step: Any) -> bool:
        self.out[step.name] = np.zeros(step.nbytes, np.uint8)
        return True

    def copy(self, step: Any, offset: int, content: Any) -> None:
        pass

    def slot(self, step: Any, offset: int, nbytes: int) -> Any:
        return self.out[step.name][offset : offset + nbytes]

    def commit(self) -> None:
        pass


def test_a_live_model_holds_what_a_merge_writes(pair: Pair, tmp_path: Path) -> None:
    plan = make_plan(*pair)
    alpha = Alphas(0.2, {"layers.1": 0.6, "layers.3.mlp": 0.0, "head": 1.0})
    merged = tiny.load_model(merge(plan, alpha, tmp_path / "out"))
    with LiveModel(plan, device="cpu", dtype="bf16") as live:
        live.apply(0.5)
        live.apply(alpha)
        assert live.alpha == alpha
        found = {name: raw(tensor.detach()) for name, tensor in live.model.named_parameters()}
    assert found == {name: raw(tensor.detach()) for name, tensor in merged.named_parameters()}


# Papers, journals, resumption


def test_the_recipe_and_the_card_say_each_alpha(pair: Pair, tmp_path: Path) -> None:
    alpha = Alphas(0.3, {"layers.1": 0.5, "layers.2": 0.5, "layers.4.mlp": 0.1, "head": 0.0})
    out = merge(make_plan(*pair), alpha, tmp_path / "out")
    document = json.loads((out / "adamms.json").read_bytes())
    assert document["alpha"] == 0.3
    assert document["alphas"] == {"layers.1": 0.5, "layers.2": 0.5, "layers.4.mlp": 0.1, "head": 0}
    card = (out / "README.md").read_text()
    assert "with a = 0.3, apart from\n" in card
    for line in ("- layers 1-2: 0.5\n", "- layer 4 mlp: 0.1\n", "- head: 0\n"):
        assert line in card


def test_an_edited_recipe_is_found(pair: Pair, tmp_path: Path) -> None:
    out = merge(make_plan(*pair), Alphas(0.3, {"layers.1": 0.5}), tmp_path / "out")
    path = out / "adamms.json"
    document = json.loads(path.read_bytes())
    for alphas in ({"layers.1": 0.4}, {}, {"layers.1": 2}, {"layers.1": "x"}, ["layers.1"], 3):
        path.write_text(json.dumps(document | {"alphas": alphas}))
        with pytest.raises(FormatError):
            verify(out, deep=True)


def test_a_killed_merge_resumes_at_the_same_alphas_only(pair: Pair, tmp_path: Path) -> None:
    plan, out = make_plan(*pair), tmp_path / "out"
    alpha = Alphas(0.3, {"layers.1": 0.5})
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


def test_answers_at_alphas_are_kept_apart_and_not_scored_as_an_alpha(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    layered = Alphas(0.2, {"layers.0": 0.3})
    with AnswerJournal(path, "mine") as journal:
        for alpha in (0.1, 0.2, 0.3):
            journal.note(alpha, 0, f"at {alpha}", [1])
        journal.note(layered, 0, "layered", [2])
    with AnswerJournal(path, "mine") as journal:
        assert journal.answers[0.2] == {0: "at 0.2"}
        assert journal.answers[Alphas(0.2, {"layers.0": 0.3})] == {0: "layered"}
        assert journal.tokens[layered] == {0: [2]}
    assert read_answers([path])[0] == {alpha: [f"at {alpha}"] for alpha in (0.1, 0.2, 0.3)}


# The type


def test_the_longest_name_that_fits_counts() -> None:
    alpha = Alphas(
        0.1,
        {
            "layers": 0.2,
            "layers.1": 0.3,
            "layers.1.attn": 0.4,
            "layers.1.attn.q.weight": 0.5,
            "layers.1.attn.k.weight@vision": 0.6,
        },
    )
    assert [
        alpha.of(role)
        for role in (
            None,
            "embed",
            "layers.10.mlp.up.weight",
            "layers.1.mlp.up.weight",
            "layers.1.attn.v.weight@text",
            "layers.1.attn.q.bias",
            "layers.1.attn.q.weight",
            "layers.1.attn.q.weight@vision",
            "layers.1.attn.k.weight@text",
            "layers.1.attn.k.weight@vision",
        )
    ] == [0.1, 0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.4, 0.6]


ROLES = [
    "embed",
    "norm",
    "head",
    *(
        f"layers.{i}.{rest}"
        for i in (0, 1, 10)
        for rest in (
            "attn.q.weight",
            "attn.q.weight@text",
            "attn.q.weight@vision",
            "attn.q.bias",
            "attn_norm.weight",
            "mlp.up.weight",
        )
    ),
]
CHOICES = st.sampled_from([0.0, 0.1, 0.25, 1.0])


@given(st.fixed_dictionaries(dict.fromkeys(ROLES, CHOICES)), st.none() | CHOICES)
def test_a_weight_for_each_role_survives_being_shortened_and_written(
    by_role: Mapping[str, float], default: float | None
) -> None:
    short = from_roles(by_role, default)
    again = alpha_from_json(json.loads(json.dumps(alpha_to_json(short))))
    assert again == short and hash(again) == hash(short)
    for alpha in (short, again):
        found = {role: alpha.of(role) if isinstance(alpha, Alphas) else alpha for role in ROLES}
        assert found == by_role
    assert isinstance(short, float) == (len(set(by_role.values())) == 1)


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    alpha = Alphas(0, {"layers.10": 0.5, "layers.2": 0.5, "head": 1, "layers.11": 0.5})
    assert list(alpha.values) == ["head", "layers.2", "layers.10", "layers.11"]
    assert str(alpha) == "0; layer 2: 0.5; layers 10-11: 0.5; head: 1"


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


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf")])
def test_weights_outside_the_range_are_refused_with_their_name(bad: float) -> None:
    with pytest.raises(RecipeError, match=r"layers\.3: alpha is .*expected"):
        Alphas(0.5, {"layers.3": bad})
    with pytest.raises(RecipeError, match="alpha is"):
        Alphas(bad)
    with pytest.raises(RecipeError, match="alpha is"):
        parse_alpha(bad)


@pytest.mark.parametrize("name", ["layers.5", "layer.1", "layers.01", "visual", "", "layers.1.att"])
def test_a_name_of_nothing_is_refused_before_anything_is_written(
    name: str, pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no such role; expected layers\.0 to layers\.4, embed"):
        merge(make_plan(*pair), Alphas(0.1, {name: 0.5}), tmp_path / "out")
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'': expected a number"),
        ("0.1,", "'': expected a number"),
        ("a", "'a': expected a number"),
        ("0.1,2", "alpha is 2.0, expected"),
        ("nan", "alpha is nan"),
        ("0.1,3:0.5", "mixes"),
        ("0-9:0.5", "0-9 is not within the decoder's layers 0-5"),
        ("0-6:0.5", "0-6 is not within"),
        ("4-2:0.5", "4-2 is not within"),
        ("-1:0.5", "'-1' is neither a layer"),
        ("tail:0.5", "'tail' is neither a layer nor one of embed, norm, head"),
        ("1:", "'': expected a number"),
        ("1-3:0.5,2:0.1", "layer 2 is named twice"),
        ("embed:0,embed:0", "embed is named twice"),
        ("1:1.5", "alpha is 1.5, expected"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_alpha_layers(text, 6, 0.3)
    assert str(error.value).startswith(f"--alpha-layers {text!r}: ")
    assert says in str(error.value)


def test_what_ranges_leave_out_needs_alpha() -> None:
    with pytest.raises(RecipeError, match="nothing of layer 0, layer 3, layer 4 and 4 more"):
        parse_alpha_layers("1-2:0.2", 6)


def test_depth_is_interpolated_without_the_dust_of_arithmetic() -> None:
    assert [interpolate([0.3, 0.3, 0.3], i / 27) for i in range(28)] == [0.3] * 28
    assert interpolate([0, 0.3], 2 / 3) == 0.2
    assert [interpolate([0.1, 0.3], depth) for depth in (0, 0.5, 1)] == [0.1, 0.2, 0.3]


# The command line


def test_merge_takes_alphas_by_layer(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["merge", *map(str, pair), "-o", str(out), "--alpha-layers", "0-1:0.2,3:0"]
    assert main([*words, "--alpha", "0.4"]) == 0
    assert tensors(out) == expected(pair, by_layer([0.2, 0.2, 0.4, 0.0, 0.4], 0.4))
    assert main(["verify", str(out), "--deep"]) == 0


def test_options_that_contradict_are_one_line(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", *map(str, pair), "-o", str(tmp_path / "out")]
    for more, says in (
        (["--alpha-layers", "0.1", "--prompts", "x.jsonl"], "give either --alpha"),
        (["--alpha-layers", "1-2:0.2"], "give --alpha for the rest"),
        (["--alpha-layers", "0.1,0.2", "--alpha", "7"], "alpha is 7.0"),
    ):
        assert main([*words, *more]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1 and says in printed
    assert not (tmp_path / "out").exists()


def test_roles_are_told_with_the_tensors_of_both_sides(pair: Pair) -> None:
    plan: Plan = make_plan(*pair)
    names = blended_roles(plan)
    assert names["layers.3.attn.q.weight"] == (
        "model.layers.3.self_attn.q_proj.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
    )
    assert not any(base.startswith("visual.") for base, _ in names.values())
