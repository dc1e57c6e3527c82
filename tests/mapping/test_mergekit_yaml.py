"""mergekit's recipes: the weights they mean, tensor by tensor, and what is refused and how.

The oracle is written from mergekit's docs (README, "Parameter Specification", and "Linear" in
docs/merge_methods.md) with numpy's own interpolation, and adds up whole float64 tensors; it knows
no roles. That embedding, norm and head take a list's first value, and a lone layer its last, is
what mergekit's planner does (plan.py, plan_module and plan_slice); mergekit 0.1.5 itself gave the
same tensors for recipes such as these.
"""

from __future__ import annotations

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_adamms import Alphas, make_plan, merge
from lowmem_adamms.cli import main
from lowmem_adamms.errors import ConfigError, RecipeError
from lowmem_adamms.mapping.mergekit_yaml import read_recipe
from lowmem_adamms.mapping.plan import Plan

yaml: Any = importlib.import_module("yaml")  # it brings no types

Pair = tuple[Path, Path]
Document = dict[str, Any]
LAYERS = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A LLaVA-OneVision and a Qwen2 in float32: the decoder's tensors have other prefixes."""
    folder = tmp_path_factory.mktemp("pair")
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    return (
        tiny.make("llava_onevision", folder / "base", ancestor=parent, dtype="float32"),
        tiny.make("qwen2", folder / "donor", ancestor=parent, dtype="float32"),
    )


@pytest.fixture(scope="module")
def plan(pair: Pair) -> Plan:
    return make_plan(*pair)


def written(folder: Path, document: Document | str) -> Path:
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


# The oracle


def weight_of(setting: Any, name: str, depth: float) -> float | None:
    """A setting for one tensor, by the rules of the docs."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for case in setting:
            if case.get("filter") in (None, "*") or case["filter"] in name:
                return weight_of(case["value"], name, depth)
        return None
    if isinstance(setting, list):
        return float(np.interp(depth, np.linspace(0, 1, len(setting)), setting))
    return None if setting is None else float(setting)


def oracle(document: Document, pair: Pair) -> dict[str, torch.Tensor]:
    """Every tensor of the merged LLaVA, in float64, from a recipe of two whole models."""
    named = [str(pair[0]), str(pair[1])]
    ours, theirs = tiny.load(pair[0]), tiny.load(pair[1])
    everywhere = document.get("parameters", {})
    own = {m["model"]: m.get("parameters", {}) for m in document["models"]}
    out = {}
    for name, tensor in ours.items():
        partner = name.removeprefix("language_model.")
        if partner not in theirs:
            out[name] = tensor.double()
            continue
        layer = re.search(r"layers\.(\d+)\.", name)
        depth = int(layer[1]) / (LAYERS - 1) if layer else 0.0
        weights = []
        for model, spelled in zip(named, (name, partner), strict=True):
            levels = (own.get(model, {}).get("weight"), everywhere.get("weight"))
            found = (weight_of(level, spelled, depth) for level in levels)
            weights.append(next(weight for weight in found if weight is not None))
        # The base has more rows of embedding and head, behind those that both share: its own
        total, rows = tensor.double().clone(), len(theirs[partner])
        mixed = weights[0] * total[:rows] + weights[1] * theirs[partner].double()
        total[:rows] = mixed / sum(weights) if everywhere.get("normalize", True) else mixed
        out[name] = total
    return out


def assert_close(found: Path, expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the rounding to float32."""
    merged = tiny.load(found)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-7, atol=1e-9, msg=name)


def models(pair: Pair, *weights: Any) -> list[Document]:
    return [
        {"model": str(side)} | ({"parameters": {"weight": weight}} if weight is not None else {})
        for side, weight in zip(pair, weights, strict=False)
    ]


def linear(pair: Pair, *weights: Any, **more: Any) -> Document:
    return {"merge_method": "linear", "models": models(pair, *weights), **more}


WEIGHTS: dict[str, tuple[Any, Any, Document]] = {
    "numbers that do not add up": (1.0, 0.5, {}),
    "lists not normalized": ([1, 0.5], [0, 0.5], {"normalize": False}),
    "in both places": (None, [0.1, 0.2, 0.9], {"weight": 0.25}),
    "filters": (
        [
            {"filter": "self_attn", "value": [0.9, 0.5, 0.7]},
            {"filter": "layers.1.", "value": 3},
            {"value": [0.7, 0.2]},
        ],
        [{"filter": "lm_head", "value": 0.9}, {"filter": "*", "value": [0.3, 0.8]}],
        {},
    ),
    "filters of one model's own names": (
        [{"filter": "language_model", "value": 0.9}, {"value": 0.1}],
        [{"filter": "language_model", "value": 0.9}, {"value": 0.1}],
        {},
    ),
    "filters that leave the rest to the file": (
        [{"filter": "mlp", "value": 0.9}],
        0.4,
        {"weight": [0.2, 0.6]},
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_merged_tensors_are_what_the_docs_say(name: str, pair: Pair, tmp_path: Path) -> None:
    base, donor, parameters = WEIGHTS[name]
    document = linear(pair, base, donor, parameters=parameters)
    out = tmp_path / "out"
    assert main(["merge", "--config", str(written(tmp_path, document)), "-o", str(out)]) == 0
    expected = oracle(document, pair)
    assert_close(out, expected)
    changed = [n for n, t in tiny.load(pair[0]).items() if not torch.equal(t.double(), expected[n])]
    assert len(changed) > 9 * LAYERS
    if name == "filters":
        assert main(["verify", str(out), "--deep"]) == 0


NUMBERS = st.sampled_from([0.1, 0.25, 0.5, 1, 2, 0.8])
VALUES = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=6)
CASES = st.fixed_dictionaries(
    {"value": VALUES},
    optional={"filter": st.sampled_from(["self_attn", "mlp", "*", "layers.1", "head", "norm"])},
)


@settings(max_examples=50)
@given(st.lists(VALUES | st.lists(CASES, min_size=1, max_size=3), min_size=2, max_size=2), VALUES)
def test_any_setting_means_what_the_docs_say(
    pair: Pair, plan: Plan, own: list[Any], rest: Any
) -> None:
    """Of every blended tensor: the donor's share."""
    document = linear(pair, *own, parameters={"weight": rest})
    path = pair[0].parent / "any.yml"
    path.write_text(yaml.safe_dump(document))
    alpha, _ = read_recipe(path).alphas(plan)
    for step in plan.steps:
        for part in step.parts:
            if part.donor is None:
                continue
            layer = re.search(r"layers\.(\d+)\.", step.name)
            depth = int(layer[1]) / (LAYERS - 1) if layer else 0.0
            names = (step.name, part.donor_name or "")
            ours, theirs = (
                next(
                    weight
                    for setting in (mine, rest)
                    if (weight := weight_of(setting, name, depth)) is not None
                )
                for mine, name in zip(own, names, strict=True)
            )
            found = alpha if isinstance(alpha, float) else alpha.of(part.role)
            assert found == pytest.approx(theirs / (ours + theirs), abs=1e-11)


def sliced(pair: Pair, *parts: tuple[Any, Any, Any, Any], **more: Any) -> Document:
    """Slices from (range, base's weight, donor's weight, slice's weight)."""

    def source(side: Path, bounds: Any, weight: Any) -> Document:
        own = {} if weight is None else {"parameters": {"weight": weight}}
        return {"model": str(side), "layer_range": bounds, **own}

    slices = [
        {"sources": [source(pair[0], bounds, base), source(pair[1], bounds, donor)]}
        | ({} if both is None else {"parameters": {"weight": both}})
        for bounds, base, donor, both in parts
    ]
    return {"merge_method": "linear", "slices": slices, **more}


def test_lists_are_interpolated_within_a_slice(pair: Pair, tmp_path: Path) -> None:
    """Embedding as the first slice's first layer, norm and head as the last slice's first."""
    document = sliced(
        pair,
        ([0, 2], [3, 1], 1, None),
        ([2, 4], None, [{"filter": "mlp", "value": 0.25}], 0.75),
        ([4, 5], [9, 1], [0, 3], None),
    )
    alpha, _ = read_recipe(written(tmp_path, document)).alphas(make_plan(*pair))
    assert not isinstance(alpha, float)
    roles = {
        "embed": 0.25,
        "layers.0.attn.q.weight": 0.25,
        "layers.1.attn.q.weight": 0.5,
        "layers.2.attn.q.weight": 0.5,
        "layers.3.mlp.up.weight": 0.25,
        # A slice of one layer takes the lists' last values, what follows it their first
        "layers.4.mlp.up.weight": 0.75,
        "norm": 0.0,
        "head": 0.0,
    }
    assert {role: alpha.of(role) for role in roles} == roles


def test_one_slice_over_all_layers_is_two_whole_models(pair: Pair, tmp_path: Path) -> None:
    plan, lists = make_plan(*pair), ([0.9, 0.1], [0.2, 0.3, 0.8])
    slices = read_recipe(written(tmp_path, sliced(pair, ([0, LAYERS], *lists, None)))).alphas(plan)
    assert slices == read_recipe(written(tmp_path, linear(pair, *lists))).alphas(plan)


# Which is which


def test_the_base_is_the_base_model_or_else_the_first(pair: Pair, tmp_path: Path) -> None:
    first, second = map(str, pair)
    plain = read_recipe(written(tmp_path, linear(pair, 0.7, 0.3)))
    assert (plain.base, plain.donor) == (first, second)
    named = read_recipe(written(tmp_path, linear(pair, 0.7, 0.3, base_model=second)))
    assert (named.base, named.donor) == (second, first)
    alpha, _ = named.alphas(make_plan(pair[1], pair[0]))
    assert alpha == 0.7
    alone = linear(pair, 0.7, base_model=second, parameters={"weight": 0.3})
    added = read_recipe(written(tmp_path, alone))
    assert (added.base, added.donor) == (second, first)
    assert added.alphas(make_plan(pair[1], pair[0]))[0] == 0.7


def test_a_model_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often and in whichever of two ways it is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    document = linear((Path("~/models/a"), Path("~/models/b")), 0.7, 0.3)
    document |= {"base_model": f"{tmp_path}/models/b", "tokenizer_source": "~/models/b"}
    recipe = read_recipe(written(tmp_path, document))
    assert (recipe.base, recipe.donor) == (f"{tmp_path}/models/b", f"{tmp_path}/models/a")


def test_equal_weights_give_the_bytes_of_one_alpha(pair: Pair, tmp_path: Path) -> None:
    path = written(tmp_path, linear(pair, [0.7, 0.7], [0.3, 0.3, 0.3]))
    assert main(["merge", "--config", str(path), "-o", str(tmp_path / "recipe")]) == 0
    plain = merge(make_plan(*pair), 0.3, tmp_path / "plain")
    for file in plain.iterdir():
        assert (tmp_path / "recipe" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),
        ({"dtype": "torch.float16"}, "F16"),
        ({"dtype": None}, None),
        ({}, None),
    ],
)
def test_the_outputs_dtype(keys: Document, dtype: str | None, pair: Pair, tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, linear(pair, 0.7, 0.3, **keys)))
    assert recipe.dtype == dtype


def test_the_command_lines_dtype_goes_first(pair: Pair, tmp_path: Path) -> None:
    path = written(tmp_path, linear(pair, 0.7, 0.3, dtype="bfloat16"))
    words = ["merge", "--config", str(path), "-o", str(tmp_path / "out")]
    assert main([*words, "--dtype", "fp16"]) == 0
    assert {tensor.dtype for tensor in tiny.load(tmp_path / "out").values()} == {torch.float16}


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": None},
        {"tokenizer": {"source": "base"}},
        {"tokenizer": {"source": "base", "tokens": None, "pad_to_multiple_of": None}},
        {"chat_template": None, "parameters": None},
    ],
)
def test_what_changes_nothing_is_taken(keys: Document, pair: Pair, tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, linear(pair, 0.7, 0.3, **keys)))
    assert (recipe.base, recipe.donor) == tuple(map(str, pair))


# What the user is told


def test_a_filter_that_matches_nothing_is_said(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [{"filter": "language_model", "value": 0.9}, {"filter": "atn", "value": 1}]
    document = linear(pair, [*cases, {"value": 0.5}], 0.5)
    document["models"][1]["parameters"]["weight"] = [*cases, {"value": 0.5}]
    out = ["-o", str(tmp_path / "out")]
    assert main(["merge", "--config", str(written(tmp_path, document)), *out]) == 0
    told = capsys.readouterr().err
    assert f"note: filter 'atn' matches no blended tensor of {pair[0]}\n" in told
    assert f"note: filter 'atn' matches no blended tensor of {pair[1]}\n" in told
    assert f"note: filter 'language_model' matches no blended tensor of {pair[1]}\n" in told
    assert f"'language_model' matches no blended tensor of {pair[0]}" not in told
    assert "note: only language weights are blended: connector" in told


def test_a_recipe_of_two_language_models_leaves_nothing_to_say(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    two = tuple(tiny.make("qwen2", tmp_path / str(i), ancestor=parent, seed=i) for i in (1, 2))
    weights = ([{"filter": "*", "value": 1}], 1)
    recipe = read_recipe(written(tmp_path, linear((two[0], two[1]), *weights)))
    assert recipe.alphas(make_plan(*two)) == (0.5, ())


@pytest.mark.parametrize(
    ("weights", "parameters", "says"),
    [
        ((0.7, 0.7), {"normalize": False}, "0.7 and 0.7, add up to 1.4 with normalize: false"),
        ((0.7, 0.30001), {"normalize": False}, "add up to 1.00001 with normalize: false"),
        ((1, -1), {}, "add up to 0"),
        ((-0.5, 1.5), {}, "share 1.5; expected 0 to 1"),
        ((1.5, -0.5), {"normalize": False}, "share -0.5; expected 0 to 1"),
        ((0.5,), {}, "no weight of"),
        (([{"filter": "mlp", "value": 1}], 1), {}, "no weight of"),
    ],
)
def test_weights_that_are_no_average_are_refused(
    weights: tuple[Any, ...], parameters: Document, says: str, pair: Pair, tmp_path: Path
) -> None:
    document = linear(pair, *weights, parameters=parameters)
    if len(weights) == 1:
        document["models"].append({"model": str(pair[1])})
    with pytest.raises(RecipeError) as error:
        read_recipe(written(tmp_path, document)).alphas(make_plan(*pair))
    assert says in str(error.value) and str(tmp_path / "recipe.yml") in str(error.value)


def test_a_filter_finds_a_tied_head_by_the_name_it_would_have(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    two = [
        tiny.make("qwen2", tmp_path / str(tied), ancestor=parent, tied=tied)
        for tied in (False, True)
    ]
    document = linear((two[0], two[1]), 0.5, [{"filter": "lm_head", "value": 1.5}, {"value": 0.5}])
    alpha, notes = read_recipe(written(tmp_path, document)).alphas(make_plan(*two))
    assert alpha == Alphas(0.5, {"head": 0.75})
    assert notes == ()


def test_slices_that_do_not_reach_the_last_layer_are_refused(pair: Pair, tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, sliced(pair, ([0, 3], 1, 1, None))))
    with pytest.raises(RecipeError, match="end at layer 3, the models have 5"):
        recipe.alphas(make_plan(*pair))


TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b}]\n"


def second(parameters: str) -> str:
    return f"models: [{{model: a}}, {{model: b, parameters: {{{parameters}}}}}]\n"


def ranges(*both: tuple[list[int], list[int]]) -> str:
    """Slices, with the layers of each model."""
    slices = [
        {"sources": [{"model": m, "layer_range": r} for m, r in zip("ab", pair, strict=True)]}
        for pair in both
    ]
    return f"slices: {json.dumps(slices)}\n"


REFUSED = [
    (TWO + "modules: {}", "modules: not taken; give the models under models"),
    (TWO + "chat_template: auto", "chat_template: not taken; the base's"),
    (TWO + "int8: 1", "int8: not taken; expected merge_method, models"),
    (
        TWO + "parameters: {int8_mask: true}",
        "parameters.int8_mask: not taken; expected weight, normalize",
    ),
    (second("density: 0.5"), "models[1].parameters.density: not taken; expected weight"),
    ("models: [{model: a}, {model: b+lora}]", "models[1].model: found 'b+lora'; a LoRA is not"),
    ("models: [{model: a}, {model: b}, {model: c}]", "models: found a, b, c; expected two"),
    (TWO + "base_model: c", "models: found a, b; expected two, one of them the base, c"),
    ("models: [{model: a}]", "models: found a; expected two"),
    ("models: [{model: a}, {model: a}]", "models: found a; expected two"),
    ("{}", "models: expected the two models under models, or else under slices"),
    (TWO + ranges(([0, 2], [0, 2])), "models: expected the two models under models, or else"),
    ("models: a", "models: found 'a'; input should be a valid list"),
    ("models: [{}, {model: b}]", "models[0].model: missing"),
    ("models: [{model: 1}, {model: b}]", "models[0].model: found 1; input should be a valid str"),
    ("models: [{model: ' '}, {model: b}]", "found ' '; expected a folder or a Hub id"),
    (second("weight: much"), "weight: found 'much'; input should be a valid number"),
    (second("weight: .inf"), "weight: found inf; input should be a finite number"),
    (second("weight: {value: 1}"), "weight: found {'value': 1}"),
    (second("weight: []"), "weight: found []; list should have at least 1 item"),
    (second("weight: [0, x]"), "weight[1]: found 'x'"),
    (second("weight: [{filter: mlp}]"), "weight[0].value: missing"),
    (second("weight: [{filters: mlp, value: 1}]"), "filters: not taken; expected filter, value"),
    (second("weight: [{filter: 3, value: 1}]"), "weight[0].filter: found 3; input should be"),
    (TWO + "dtype: int64", "dtype: found 'int64'; dtype 'int64' cannot be written"),
    (TWO + "tokenizer_source: union", "tokenizer_source: found union; the output has the base's"),
    (TWO + "tokenizer: {pad_to_multiple_of: null}", "tokenizer_source: found union"),
    (TWO + "tokenizer: {tokens: {<x>: {}}}", "tokenizer.tokens: not taken; expected source"),
    (
        ranges(([0, 2], [0, 2]), ([3, 5], [3, 5])),
        "slices[1].sources: found layer_range [3, 5] and [3, 5], expected [2, N] for both",
    ),
    (ranges(([0, 2], [1, 3])), "slices[0].sources: found layer_range [0, 2] and [1, 3]"),
    (ranges(([0, 0], [0, 0])), "found layer_range [0, 0] and [0, 0], expected [0, N]"),
    (
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
        "slices[0].sources: found [{'layer_range': [...], 'model': 'a'}]; list should have at",
    ),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_what_is_not_taken_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"merge_method: linear\n{text if text != '{}' else ''}")
    with pytest.raises(ConfigError) as error:
        read_recipe(path)
    (line,) = error.value.lines
    assert line.startswith(f"{path}: ") and says in line


def test_everything_that_is_not_taken_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "merge_method: linear\ndtype: int8\nx: 1\n" + second("density: 1"))
    assert main(["merge", "--config", str(path), "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["models[1].parameters.density", "dtype", "x"]
    assert all(line.startswith(f"error: {path}: ") for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["slerp", "ties", "task_arithmetic", "passthrough", None, 3])
def test_other_methods_are_refused_by_name(method: Any, tmp_path: Path) -> None:
    path = written(tmp_path, {"merge_method": method, "parameters": {"t": 0.5}})
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"{path}: merge_method is {method!r}; only linear is taken")


BOMB = "a: &a [1,1]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [", ", line 1: not YAML"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", ", line 2: not YAML"),
        ("- a\n- b\n", "found ['a', 'b'], expected mergekit's YAML"),
        ("", "found None, expected mergekit's YAML"),
        ("a: 2001-99-99\n", "cannot be read"),
        ("[" * 1500, "cannot be read"),
        (BOMB + "merge_method: linear\nmodels: *i\n", "a: not taken"),
        (
            "merge_method: linear\nmodels: &m [*m, *m]\n",
            "models[0]: found [[[...], [...]], [[...], [...]]]",
        ),
    ],
)
def test_broken_and_hostile_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe(written(tmp_path, text))
    assert says in str(error.value)
    assert all(len(line) < 500 for line in error.value.lines)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "none.yml")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--alpha", "0.3"], "leave out --alpha"),
        (["--alpha-layers", "0.3", "--prompts", "x"], "leave out --alpha-layers, --prompts"),
        (["base", "donor"], "leave out BASE"),
    ],
)
def test_a_recipe_leaves_nothing_else_to_say(
    more: list[str],
    says: str,
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path, linear(pair, 0.7, 0.3))
    words = ["merge", *[word for word in more if word in ("base", "donor")]]
    rest = [word for word in more if word not in words]
    assert main([*words, "--config", str(path), "-o", str(tmp_path / "out"), *rest]) == 2
    assert says in capsys.readouterr().err


def test_without_models_merge_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "-o", str(tmp_path / "out"), "--alpha", "0.3"]) == 2
    assert "merge needs BASE and DONOR, or --config" in capsys.readouterr().err
