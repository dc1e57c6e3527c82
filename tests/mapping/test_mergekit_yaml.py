"""mergekit's recipes: the weights they mean, tensor by tensor, and what is refused and how.

The oracle is written from mergekit's docs (README, "Parameter Specification", and "Linear" in
docs/merge_methods.md) with numpy's own interpolation; it knows no roles. That embedding, norm and
head take a list's first value, and a lone layer its last, is what mergekit's planner does (plan.py,
plan_module and plan_slice); mergekit 0.1.5 itself gave the same tensors for recipes such as these.
"""

from __future__ import annotations

import importlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowmem_adamms import Alphas, make_plan, merge
from lowmem_adamms.cli import main
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.mapping.alphas import alpha_of
from lowmem_adamms.mapping.mergekit_yaml import Recipe, read_recipe
from lowmem_adamms.mapping.plan import Plan

yaml: Any = importlib.import_module("yaml")  # it brings no types

Pair = tuple[Path, Path]
Document = dict[str, Any]
LAYERS = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A LLaVA-OneVision and a Qwen2: the decoder's tensors have other prefixes."""
    folder = tmp_path_factory.mktemp("pair")
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    return (
        tiny.make("llava_onevision", folder / "base", ancestor=parent),
        tiny.make("qwen2", folder / "donor", ancestor=parent),
    )


@pytest.fixture(scope="module")
def plan(pair: Pair) -> Plan:
    return make_plan(*pair)


def written(folder: Path, document: Document | str) -> Path:
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, document: Document | str) -> Recipe:
    return read_recipe(written(folder, document))


def models(pair: Pair, *weights: Any, **more: Any) -> list[Document]:
    return [
        {"model": str(side), "parameters": {"weight": weight}, **more}
        for side, weight in zip(pair, weights, strict=True)
    ]


def linear(pair: Pair, base: Any, donor: Any, **more: Any) -> Document:
    return {"merge_method": "linear", "models": models(pair, base, donor), **more}


# What weights mean


def weight_of(setting: Any, name: str, depth: float) -> float:
    """A setting for one tensor, by the rules of the docs."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for case in setting:
            if case.get("filter") in (None, "*") or case["filter"] in name:
                return weight_of(case["value"], name, depth)
    if isinstance(setting, list):
        return float(np.interp(depth, np.linspace(0, 1, len(setting)), setting))
    return float(setting)


NUMBERS = st.sampled_from([0.1, 0.25, 0.5, 1, 2, 0.8])
VALUES = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=6)
FILTERS = ["self_attn", "mlp", "*", "layers.1", "head", "norm", "language_model"]
CASES = st.fixed_dictionaries({"value": VALUES, "filter": st.sampled_from(FILTERS)})
WITH_REST = st.builds(
    lambda cases, rest: [*cases, {"value": rest}], st.lists(CASES, max_size=3), VALUES
)


@settings(max_examples=50)
@given(VALUES | WITH_REST, VALUES | WITH_REST)
@example([{"filter": "language_model", "value": 0.9}, {"value": 0.1}], [0.1, 0.2, 0.9])
def test_any_setting_means_what_the_docs_say(pair: Pair, plan: Plan, base: Any, donor: Any) -> None:
    """Of every blended tensor: the donor's share."""
    alpha, _ = read(pair[0].parent, linear(pair, base, donor)).alphas(plan)
    assert not isinstance(alpha, tuple)
    for step, part in plan.parts:
        if part.donor:
            layer = re.search(r"layers\.(\d+)\.", step.name)
            depth = int(layer[1]) / (LAYERS - 1) if layer else 0.0
            ours = weight_of(base, step.name, depth)
            theirs = weight_of(donor, part.donor_name or "", depth)
            share = alpha_of(alpha, part.role)
            assert share == pytest.approx(theirs / (ours + theirs), abs=1e-11)


def test_weights_that_are_not_normalized_are_taken_as_they_are(
    pair: Pair, plan: Plan, tmp_path: Path
) -> None:
    document = linear(pair, 0.7000005, 0.3, parameters={"normalize": False})
    assert read(tmp_path, document).alphas(plan)[0] == 0.3


def test_a_filter_finds_a_tied_head_by_the_name_it_would_have(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2")
    untied, tied = (
        tiny.make("qwen2", tmp_path / str(tied), ancestor=parent, tied=tied)
        for tied in (False, True)
    )
    cases = [{"filter": "lm_head", "value": 1.5}, {"filter": "*", "value": 0.5}]
    recipe = read(tmp_path, linear((untied, tied), 0.5, cases))
    # and between two language models nothing is left to say
    assert recipe.alphas(make_plan(untied, tied)) == (Alphas(0.5, {"head": 0.75}), ())


@pytest.mark.parametrize(
    ("weights", "normalize", "says"),
    [
        ((0.7, 0.30001), False, "0.7 and 0.30001, make no average"),
        ((0, 0), True, "0 and 0, make no average"),
        ((-0.5, 1.5), True, "-0.5 and 1.5, make no average"),
        ((1.5, -0.5), False, "1.5 and -0.5, make no average"),
        (([{"filter": "mlp", "value": 1}], 1), True, "no weight of"),
    ],
)
def test_weights_that_are_no_average_are_refused(
    weights: tuple[Any, Any], normalize: bool, says: str, pair: Pair, plan: Plan, tmp_path: Path
) -> None:
    document = linear(pair, *weights, parameters={"normalize": normalize})
    with pytest.raises(RecipeError) as error:
        read(tmp_path, document).alphas(plan)
    assert says in str(error.value) and str(tmp_path / "recipe.yml") in str(error.value)


# Models, dtype and tokenizer


def test_the_base_is_the_base_model_or_else_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a model may lie in the home folder, in whichever of two ways it is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    document = linear((Path("~/a"), Path("b")), 0.7, 0.3)
    recipe = read(tmp_path, document)
    assert (recipe.base, recipe.donors) == (f"{tmp_path}/a", ("b",))
    recipe = read(tmp_path, document | {"base_model": "b", "tokenizer_source": "base"})
    assert (recipe.base, recipe.donors) == ("b", (f"{tmp_path}/a",))
    read(tmp_path, document | {"base_model": f"{tmp_path}/a", "tokenizer_source": "~/a"})


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),
        ({}, None),
    ],
)
def test_the_outputs_dtype(keys: Document, dtype: str | None, pair: Pair, tmp_path: Path) -> None:
    assert read(tmp_path, linear(pair, 0.7, 0.3, **keys)).dtype == dtype


# What is refused

MODELS = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


def with_weight(weight: str) -> str:
    return MODELS.replace("weight: 1}}]", f"weight: {weight}}}}}]")


REFUSED = [
    ("", "models: Field required"),
    (MODELS + "slices: []", "slices: Extra inputs are not permitted"),
    (MODELS + "chat_template: auto", "chat_template: Extra inputs are not permitted; found 'auto'"),
    (MODELS + "parameters: {weight: 1}", "parameters.weight: Extra inputs are not permitted"),
    (MODELS + "dtype: int64", "'int64' cannot be written"),
    (
        MODELS + "base_model: c",
        "found models a, b; expected two or more, one of them the base, c",
    ),
    (MODELS.replace("b", "a"), "found models a; expected two"),
    (MODELS + "tokenizer_source: union", "tokenizer_source: found union; the output has the"),
    ("models: [{model: a, parameters: {weight: 1}}]", "models: List should have at least 2 items"),
    ("models: a", "models: Input should be a valid list; found 'a'"),
    (with_weight("much"), "Input should be a valid number, unable to parse string as a number"),
    (with_weight(".inf"), "models.1.parameters.weight.0.value.0: Input should be a finite number"),
    (with_weight("[]"), "should have at least 1 item"),
    (with_weight("[{filter: mlp}]"), "weight.0.value: Field required"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_what_is_not_taken_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, f"merge_method: linear\n{text}")
    (line,) = error.value.lines
    assert line.startswith(f"{tmp_path / 'recipe.yml'}: ") and says in line


def test_every_key_that_is_not_taken_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, f"merge_method: linear\n{with_weight('1, density: 1')}x: 1")
    assert main(["merge", "--config", str(path), "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["models.1.parameters.density", "x"]
    assert all(line.startswith(f"error: {path}: ") for line in lines)


BOMB = "a: &a [1,1]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "merge_method: sce\nt: 0.5\n",
            "merge_method is 'sce'; taken are linear, slerp, task_arithmetic",
        ),
        ("- a\n- b\n", "merge_method is None"),
        ("models: [", "cannot be read as YAML: while parsing"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", "line 2"),
        ("a: 2001-99-99\n", "cannot be read"),
        ("[" * 1500, "cannot be read"),
        (BOMB + "merge_method: linear\nmodels: *i\n", "a: Extra inputs"),
        ("merge_method: linear\nmodels: &m [*m, *m]\n", "models.0: Input should be"),
    ],
)
def test_broken_and_hostile_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    assert says in str(error.value)
    assert all(len(line) < 500 and "\n" not in line for line in error.value.lines)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        read_recipe(tmp_path / "none.yml")


# Several models, and other methods


def test_each_donor_of_several_has_its_share(pair: Pair, tmp_path: Path) -> None:
    third = tiny.make(
        "qwen2", tmp_path / "third", ancestor=tiny.ancestor("qwen2", layers=LAYERS), seed=5
    )
    document = linear(pair, 1, [2, 6])
    document["models"].append({"model": str(third), "parameters": {"weight": 1}})
    recipe = read(tmp_path, document)
    assert recipe.donors == (str(pair[1]), str(third))
    alphas, _ = recipe.alphas(make_plan(pair[0], [pair[1], third]))
    assert isinstance(alphas, tuple)
    roles = ["layers.0.attn.q.weight", f"layers.{LAYERS - 1}.attn.q.weight"]
    found = [[alpha_of(alpha, role) for role in roles] for alpha in alphas]
    assert found == [[0.5, 0.75], [0.25, 0.125]]


def tasks(method: str, *models: Document, **parameters: Any) -> Document:
    """A recipe of differences from the ancestor "z"."""
    document = {"merge_method": method, "models": list(models), "base_model": "z"}
    return document | ({"parameters": parameters} if parameters else {})


def model(name: str, **parameters: Any) -> Document:
    return {"model": name} | ({"parameters": parameters} if parameters else {})


def test_a_recipe_of_ties_is_read(tmp_path: Path) -> None:
    models = (model("z"), model("a", density=0.3, weight=0.5), model("b", density=0.4))
    recipe = read(tmp_path, tasks("ties", *models, **{"lambda": 0.9, "int8_mask": True}))
    assert (recipe.method, recipe.base, recipe.donors) == ("ties", "a", ("b",))
    assert (recipe.ancestor, recipe.weights, recipe.densities) == ("z", (0.5, 1.0), (0.3, 0.4))
    assert recipe.factor == 0.9


def test_numbers_are_weights_and_lambda_scales_them(tmp_path: Path, pair: Pair) -> None:
    cases = [{"filter": "mlp", "value": 0.5}, {"value": [0.0, 1.0]}]
    models = (model("a", weight=2), model("b", weight=-0.5), model("c", weight=cases))
    recipe = read(tmp_path, tasks("task_arithmetic", *models, **{"lambda": 0.5}))
    assert (recipe.weights, recipe.densities, recipe.factor) == ((1.0, -0.25, 0.5), None, None)
    plan = make_plan(pair[0], [pair[1]] * 2, method="task-arithmetic", ancestor=pair[1])
    alphas, _ = recipe.alphas(plan)
    assert isinstance(alphas, tuple)
    assert alphas[0] == 1.0
    assert alpha_of(alphas[1], "layers.4.mlp.up.weight") == 0.5
    assert alpha_of(alphas[1], "layers.4.attn.q.weight") == 1.0


def test_a_slerp_takes_t_by_layer_and_name(tmp_path: Path, pair: Pair, plan: Plan) -> None:
    cases = [{"filter": "language_model.model.layers.1", "value": 0.9}, {"value": [0, 1]}]
    document = {
        "merge_method": "slerp",
        "models": [{"model": str(side)} for side in pair],
        "base_model": str(pair[0]),
        "parameters": {"t": cases},
    }
    recipe = read(tmp_path, document)
    assert (recipe.base, recipe.donors) == (str(pair[0]), (str(pair[1]),))
    alpha, notes = recipe.alphas(plan)
    assert not isinstance(alpha, tuple)
    layers = [alpha_of(alpha, f"layers.{i}.attn.q.weight") for i in range(LAYERS)]
    assert layers == [0.0, 0.9, 0.5, 0.75, 1.0]
    assert not any("matches no" in note for note in notes)


A, B = model("a"), model("b")
REFUSED_TASKS = [
    (tasks("dare_ties", A, B), "say normalize: true"),
    (tasks("ties", A, B, normalize=False), "found false, but ties averages"),
    (tasks("dare_linear", A, B, rescale=False), "dare-linear does it only with true"),
    (tasks("task_arithmetic", A, model("b", density=0.5)), "task-arithmetic keeps all values"),
    (tasks("ties", A, B, **{"lambda": 1.5}), "alpha is 1.5"),
    (tasks("ties", A, model("b", weight=[0, 1])), "weight of a model: expected one number"),
    (tasks("breadcrumbs", model("a", weight=[0, 1]), B), "weight of a: expected one number"),
    (tasks("breadcrumbs", A, model("b", gamma=0.1)), "expected 0.01, which it always is here"),
    (tasks("ties", A, model("z")), "found models a beside the ancestor, z; expected two or more"),
    ({"merge_method": "ties", "models": [A, B]}, "base_model: Field required"),
    (tasks("della", A, B), "merge_method is 'della'"),
    (tasks("ties", A, B) | {"slices": []}, "slices: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("document", "says"), REFUSED_TASKS)
def test_what_other_methods_do_not_take_is_named(
    document: Document, says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, document)
    assert says in str(error.value)


def test_a_recipe_merges_as_the_same_options_do(tmp_path: Path) -> None:
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    made = [
        str(tiny.make("qwen2", tmp_path / name, ancestor=parent, seed=seed, noise=noise))
        for name, seed, noise in (("a", 1, 0.1), ("b", 2, 0.1), ("z", 3, 0.0))
    ]
    models = (model(made[0], density=0.2), model(made[1], density=0.2))
    path = written(tmp_path, tasks("ties", *models) | {"base_model": made[2]})
    assert main(["merge", "--config", str(path), "-o", str(tmp_path / "recipe")]) == 0
    words = ["--method", "ties", "--ancestor", made[2], "-o", str(tmp_path / "plain")]
    assert main(["merge", *made[:2], *words]) == 0
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "recipe" / file.name).read_bytes() == file.read_bytes(), file.name


# The command line


def test_equal_weights_give_the_bytes_of_one_alpha(pair: Pair, plan: Plan, tmp_path: Path) -> None:
    path = written(tmp_path, linear(pair, [0.7, 0.7], [0.3, 0.3, 0.3]))
    assert main(["merge", "--config", str(path), "-o", str(tmp_path / "recipe")]) == 0
    plain = merge(plan, 0.3, tmp_path / "plain")
    for file in plain.iterdir():
        assert (tmp_path / "recipe" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_line_says_what_matches_nothing_and_its_dtype_goes_first(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [{"filter": "language_model", "value": 0.9}, {"filter": "atn", "value": 1}]
    weight = [*cases, {"value": 0.5}]
    path = written(tmp_path, linear(pair, weight, weight, dtype="bfloat16"))
    out = str(tmp_path / "out")
    assert main(["merge", "--config", str(path), "-o", out, "--dtype", "fp16"]) == 0
    assert {tensor.dtype for tensor in tiny.load(Path(out)).values()} == {torch.float16}
    told = capsys.readouterr().err
    for name, side in (("atn", 0), ("atn", 1), ("language_model", 1)):
        assert f"note: filter {name!r} matches no blended tensor of {pair[side]}\n" in told
    assert f"'language_model' matches no blended tensor of {pair[0]}" not in told
    assert "note: only language weights are blended: connector" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--alpha-layers", "0.3", "--prompts", "x"], "leave out --alpha-layers, --prompts"),
        (["base", "donor"], "leave out BASE"),
    ],
)
def test_a_recipe_leaves_nothing_else_to_say(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["merge", *words, "--config", "recipe.yml", "-o", out]) == 2
    assert says in capsys.readouterr().err


def test_without_models_merge_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "-o", str(tmp_path / "out"), "--alpha", "0.3"]) == 2
    assert "merge needs BASE and DONOR, or --config" in capsys.readouterr().err
