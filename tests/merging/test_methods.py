"""Every method on models of different architecture, against an oracle that knows neither plan nor
kernel: whole tensors in float64, found by names written out here, sorted where the package counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from command import Forker, run
from huggingface_hub import ModelCard
from lowmem_adamms.kernels import reference
from tiny import Tensors, raw, seen

from lowmem_adamms import Alphas, make_plan, merge
from lowmem_adamms.errors import MappingError, MergeError, RecipeError
from lowmem_adamms.mapping.mixture import Mixture, make_mixture
from lowmem_adamms.mapping.plan import Step
from lowmem_adamms.merging import first_pass, loop, model_card
from lowmem_adamms.merging.verify import verify
from lowmem_adamms.methods import METHODS, Method
from lowmem_adamms.settings import MethodSettings

Floats = npt.NDArray[Any]
Mask = npt.NDArray[Any]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
ANCESTOR_ROWS, TEXT_ROWS = 300, 310
"""Of embedding and head; the base has 320, the first donor more."""


# The models: a base and a donor that see, a donor and an ancestor that only read


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    parent = tiny.ancestor("qwen2")
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "base": ("qwen2_vl", {"seed": 1}),
        "donor": ("llava_onevision", {"seed": 2}),
        "text": ("qwen2", {"seed": 3, "dtype": "float16", "vocab": TEXT_ROWS}),
        "ancestor": ("qwen2", {"seed": 4, "noise": 0.0, "vocab": ANCESTOR_ROWS}),
    }
    for name, (family, options) in made.items():
        tiny.make(family, folder / name, ancestor=parent, **options)
    return {name: folder / name for name in made}


def name_in(model: str, name: str) -> str:
    return f"language_model.{name}" if model == "donor" else name


# The oracle


@dataclass(frozen=True)
class Case:
    """A merge: alphas of the donors, or the one factor, and what differs from the defaults."""

    method: str
    alphas: tuple[float, ...]
    donors: tuple[str, ...] = ("donor", "text")
    density: float | None = None
    trim: str = "tensor"
    seed: int = 0
    dtype: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Keywords of make_plan."""
        fields: dict[str, Any] = {"method": self.method, "trim": self.trim, "mask_seed": self.seed}
        fields |= {"density": self.density, "dtype": self.dtype}
        if self.method not in ("linear", "slerp"):
            fields["ancestor"] = True
        return fields


@dataclass(frozen=True)
class Stack:
    """One tensor of all models: values (nan where a model lacks the row), base first."""

    models: list[Floats]
    ancestor: Floats
    dtype: str

    @property
    def has_ancestor(self) -> Mask:
        return ~np.isnan(self.ancestor)

    def mixed(self, relative: bool) -> Mask:
        some: Mask = np.logical_or.reduce([~np.isnan(donor) for donor in self.models[1:]])
        return some & self.has_ancestor if relative else some


def stack_of(name: str, case: Case, loaded: dict[str, Tensors]) -> Stack:
    base = loaded["base"][name]

    def widened(model: str) -> Floats:
        tensor = loaded[model][name_in(model, name)].double().numpy()
        out = np.full(base.shape, np.nan)
        rows = min(len(out), len(tensor))
        out[:rows] = tensor[:rows]
        return out

    dtype = reference_name(case.dtype) or NAMES[base.dtype]
    return Stack([widened(model) for model in ("base", *case.donors)], widened("ancestor"), dtype)


def reference_name(dtype: str | None) -> str | None:
    return {"fp32": "F32", "fp16": "F16", "bf16": "BF16", None: None}[dtype]


def rounded(values: Floats, dtype: str) -> Floats:
    widened: Floats = reference.widen(reference.narrow(values, dtype), dtype)
    return widened


def in_bounds(sizes: Floats, among: Floats, density: float, outliers: float) -> Mask:
    """Which sizes have a rank that is kept, when those of `among` are sorted."""
    order = np.sort(among)[::-1]
    above = int(outliers * len(order))
    last = min(above + max(1, int(density * len(order))), len(order))
    kept: Mask = (sizes >= order[last - 1]) & ((sizes <= order[above]) if above else True)
    return kept


def draw(seed: int, model: int, name: str, shape: tuple[int, ...]) -> Floats:
    """SplitMix64, in integers that wrap: a number from 0 to 1 for each element."""
    text = f"{seed} {model} {name}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    word = np.uint64(key) + index * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    drawn: Floats = ((word ^ word >> np.uint64(31)) >> np.uint64(11)) / (1 << 53)
    return drawn.reshape(shape)


def mixed_values(name: str, case: Case, stack: Stack, everything: Sequence[Stack]) -> Floats:
    """One tensor as the method has it, before it is rounded."""
    method = METHODS[case.method]
    where = stack.mixed(method.relative)
    if case.method == "slerp":
        return slerp(stack, where, *case.alphas)
    if case.method == "linear":
        return average(stack, case.alphas)
    density = case.density or {"ties": 0.2, "breadcrumbs": 0.9}.get(case.method, 0.8)
    deltas = [model - stack.ancestor for model in stack.models]
    present = [where & ~np.isnan(delta) for delta in deltas]
    weights = [1.0, *case.alphas]
    if case.method in ("ties", "dare-ties", "metagpt", "ram"):
        weights = [1.0] * len(deltas)
    kept = list(present)
    if case.method in ("ties", "breadcrumbs"):
        outliers = 0.01 if case.method == "breadcrumbs" else 0.0
        for i, delta in enumerate(deltas):
            ranked = [stack] if case.trim == "tensor" else everything
            among = np.concatenate([magnitudes(each, i, stack.dtype) for each in ranked])
            sizes = rounded(np.abs(delta), stack.dtype)
            kept[i] = kept[i] & in_bounds(sizes, among, density, outliers)
    if case.method.startswith("dare"):
        for i, delta in enumerate(deltas):
            kept[i] = kept[i] & (draw(case.seed, i, name, delta.shape) < density)
        deltas = [delta / density for delta in deltas]
    if case.method == "ram":
        kept = [keep & (np.abs(delta) > 1e-5) for keep, delta in zip(kept, deltas, strict=True)]
    if case.method == "metagpt":
        squares = [
            sum(float((differences(each, i) ** 2).sum()) for each in everything)
            for i in range(len(deltas))
        ]
        weights = [square / sum(squares) for square in squares]
    added = [np.where(k, w * d, 0.0) for k, w, d in zip(kept, weights, deltas, strict=True)]
    total = sum(added)
    if case.method.endswith("ties"):
        sign = np.where(total >= 0, 1.0, -1.0)
        agreeing = [np.sign(each) == sign for each in added]
        total = sum(np.where(agree, each, 0) for agree, each in zip(agreeing, added, strict=True))
        total = total / np.maximum(sum(agree.astype(float) for agree in agreeing), 1)
    if case.method == "ram":
        total = total / np.maximum(sum(keep.astype(float) for keep in kept), 1)
    scale = case.alphas[0] if method.alpha is not None else 1.0
    mixed: Floats = np.where(where, stack.ancestor + scale * total, stack.models[0])
    return mixed


def average(stack: Stack, alphas: Sequence[float]) -> Floats:
    """What donors lack of their share is the base's."""
    base, *donors = stack.models
    shares = [np.where(np.isnan(d), 0.0, a) for d, a in zip(donors, alphas, strict=True)]
    out: Floats = (1 - sum(shares)) * base
    for donor, share in zip(donors, shares, strict=True):
        out = out + np.where(share > 0, share * donor, 0.0)
    return out


def differences(stack: Stack, model: int) -> Floats:
    """Of a model from the ancestor, where both have what is mixed."""
    delta = stack.models[model] - stack.ancestor
    found: Floats = delta[stack.mixed(True) & ~np.isnan(delta)]
    return found


def magnitudes(stack: Stack, model: int, dtype: str) -> Floats:
    return rounded(np.abs(differences(stack, model)), dtype)


def slerp(stack: Stack, where: Mask, alpha: float) -> Floats:
    base, donor = (model[where] for model in stack.models)
    cosine = float(base @ donor / np.linalg.norm(base) / np.linalg.norm(donor))
    shares = (1 - alpha, alpha)
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        shares = tuple(math.sin(share * angle) / math.sin(angle) for share in shares)  # type: ignore[assignment]
    out = stack.models[0].copy()
    out[where] = shares[0] * base + shares[1] * donor
    return out


def expected(case: Case, models: dict[str, Path]) -> dict[str, Floats]:
    """Of every tensor of the decoder the values before rounding."""
    loaded = {name: tiny.load(path) for name, path in models.items()}
    names = [name for name in loaded["base"] if not name.startswith("visual.")]
    stacks = {name: stack_of(name, case, loaded) for name in names}
    return {
        name: mixed_values(name, case, stack, list(stacks.values()))
        for name, stack in stacks.items()
    }


def plan_of(case: Case, models: dict[str, Path], **more: Any) -> Mixture:
    fields = case.fields | more
    if fields.get("ancestor") is True:
        fields["ancestor"] = models["ancestor"]
    plan = make_plan(models["base"], [models[name] for name in case.donors], **fields)
    assert isinstance(plan, Mixture)
    return plan


def alpha_of(case: Case) -> Any:
    return case.alphas if len(case.alphas) > 1 else case.alphas[0]


CASES = [
    Case("linear", (0.3, 0.2)),
    Case("linear", (0.0, 0.25), dtype="fp32"),
    Case("linear", (0.5, 0.5)),
    Case("slerp", (0.3,), ("donor",)),
    Case("slerp", (0.7,), ("text",), dtype="fp32"),
    Case("task-arithmetic", (0.3,), ("donor",)),
    Case("task-arithmetic", (0.4, 0.2)),
    Case("ties", (1.0,)),
    Case("ties", (0.6,), ("donor",), density=0.5),
    Case("ties", (0.9,), density=0.3, dtype="fp32"),
    Case("ties", (0.9,), density=0.25, trim="model"),
    Case("ties", (0.9,), ("text",), density=0.1, trim="model", dtype="fp32"),
    Case("dare-linear", (0.3, 0.2)),
    Case("dare-linear", (0.3,), ("text",), density=0.25, seed=7),
    Case("dare-linear", (0.0,), ("donor",)),  # the base is thinned out as well
    Case("dare-ties", (0.8,)),
    Case("dare-ties", (0.8,), density=0.5, seed=3, dtype="fp32"),
    Case("breadcrumbs", (0.3, 0.2)),
    Case("breadcrumbs", (0.5,), ("donor",), density=0.4, dtype="fp32"),
    Case("metagpt", (1.0,)),
    Case("metagpt", (0.5,), ("donor",)),
    Case("ram", (1.0,)),
    Case("ram", (0.5,), ("text",)),
]


def words_of(case: Case) -> str:
    return "-".join([case.method, *case.donors, *(map(str, case.alphas)), str(case.dtype)])


@pytest.mark.parametrize("case", CASES, ids=words_of)
def test_a_method_is_what_its_oracle_says(
    case: Case, models: dict[str, Path], tmp_path: Path
) -> None:
    merge(plan_of(case, models, rounding="nearest"), alpha_of(case), tmp_path / "out")
    found, ours = tiny.load(tmp_path / "out"), tiny.load(models["base"])
    values = expected(case, models)
    for name, tensor in found.items():
        if name not in values:
            assert raw(tensor) == raw(ours[name].to(tensor.dtype)), name
            continue
        exact, dtype = values[name], NAMES[tensor.dtype]
        got = tensor.double().numpy()
        # Sums in another order may differ in the last of 53 bits, and so round the other way
        step = np.spacing(np.abs(exact)) * 64
        assert np.all(got >= rounded(exact - step, dtype)), name
        assert np.all(got <= rounded(exact + step, dtype)), name
        assert np.mean(got == rounded(exact, dtype)) > 0.99, name
    assert verify(tmp_path / "out", deep=True, **places(case, models)).rows


def places(case: Case, models: dict[str, Path]) -> dict[str, Any]:
    where = {"base": models["base"], "donor": [models[name] for name in case.donors]}
    return where | ({"ancestor": models["ancestor"]} if "ancestor" in case.fields else {})


# What a merge of two models is, other methods become


@pytest.mark.parametrize(
    "case", [Case("linear", (0.3, 0.0)), Case("linear", (0.3, 0.0), ("donor", "donor"))]
)
def test_a_donor_of_weight_0_changes_nothing(
    case: Case, models: dict[str, Path], tmp_path: Path
) -> None:
    merge(plan_of(case, models), (0.3, 0.0), tmp_path / "two")
    merge(make_plan(models["base"], models["donor"]), 0.3, tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.parametrize("method", ["linear", "task-arithmetic"])
def test_without_any_weight_the_output_is_the_base(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    plan = plan_of(Case(method, (0.0, 0.0)), models)
    merge(plan, (0.0, 0.0), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(models["base"])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_slerp_are_base_and_donor(
    alpha: float, models: dict[str, Path], tmp_path: Path
) -> None:
    merge(plan_of(Case("slerp", (alpha,), ("donor",)), models), alpha, tmp_path / "out")
    merge(make_plan(models["base"], models["donor"]), alpha, tmp_path / "plain")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "slerp"])
def test_equal_models_come_out_unchanged(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    base = models["base"]
    copy = shutil.copytree(base, tmp_path / "copy")
    relative = METHODS[method].relative
    plan = make_plan(base, [copy, copy], method=method, ancestor=copy if relative else None)
    alpha: Any = (0.3, 0.3) if plan.coefficients > 1 else 0.3
    merge(plan, alpha, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(base)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in tiny.load(folder).items()}


def test_each_donor_takes_its_own_weights_by_layer(models: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(Case("linear", (0.3, 0.2)), models)
    by_layer = (Alphas(0.3, {"layers.1": 0.0}), Alphas(0.0, {"layers.1": 0.5}))
    merge(plan, by_layer, tmp_path / "out")
    for name, alpha, donor in (("layers.0", 0.3, "donor"), ("layers.1", 0.5, "text")):
        merge(make_plan(models["base"], models[donor]), alpha, tmp_path / donor)
        ours, theirs = weights(tmp_path / "out"), weights(tmp_path / donor)
        assert all(ours[key] == theirs[key] for key in ours if name in key)
    assert verify(tmp_path / "out", deep=True, **places(Case("linear", ()), models)).rows


def test_a_new_method_is_one_entry(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CONTRIBUTING says. Task arithmetic of what has the sign of the sum."""
    method = Method("consensus", "base + ...", "nobody", elect=True)
    monkeypatch.setitem(METHODS, method.name, method)
    settings = MethodSettings(method=method.name)
    donors = [models["donor"], models["text"]]
    plan = make_mixture(
        models["base"], donors, settings, ancestor=models["ancestor"], rounding="nearest"
    )
    merge(plan, (0.5, 0.25), tmp_path / "out")
    case = Case("task-arithmetic", (0.5, 0.25))
    name = "model.layers.1.mlp.up_proj.weight"
    stack = stack_of(name, case, {each: tiny.load(path) for each, path in models.items()})
    weighted = zip((1.0, 0.5, 0.25), stack.models, strict=True)
    added = np.stack([weight * (model - stack.ancestor) for weight, model in weighted])
    sign = np.where(added.sum(axis=0) >= 0, 1, -1)
    exact = stack.ancestor + np.where(np.sign(added) == sign, added, 0).sum(axis=0)
    found = tiny.load(tmp_path / "out")[name].double().numpy()
    assert np.array_equal(found, rounded(exact, stack.dtype))
    assert verify(tmp_path / "out", deep=True, **places(case, models)).rows
    assert "method consensus (nobody)" in (tmp_path / "out" / "README.md").read_text()


# The model card


@pytest.mark.parametrize(
    ("licences", "front"),
    [
        ({"base": "mit", "donor": "mit"}, "mit"),
        ({"base": "mit", "text": "cc-by-nc-4.0"}, "other"),
        ({"ancestor": "mit"}, None),
    ],
)
def test_the_card_names_every_model_and_its_licence(
    licences: dict[str, str], front: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    copies = {name: shutil.copytree(path, tmp_path / name) for name, path in models.items()}
    for name, licence in licences.items():
        (copies[name] / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    card = model_card.make_card(plan_of(Case("ties", (1.0,)), copies), 1.0, {})
    data: Any = ModelCard(card).data
    assert data.base_model == ["base", "donor", "text", "ancestor"]
    assert data.get("license") == front
    for name in copies:
        assert f"- `{name}`: {licences.get(name, 'not stated')}\n" in card


# The same bits, however the work is cut


@pytest.mark.parametrize(
    "case",
    [Case("dare-ties", (0.8,)), Case("ties", (0.9,)), Case("metagpt", (1.0,))],
    ids=words_of,
)
def test_windows_do_not_matter(
    case: Case, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(plan_of(case, models), alpha_of(case), tmp_path / "usual")
    monkeypatch.setattr(loop, "WINDOW", 5000)
    merge(plan_of(case, models), alpha_of(case), tmp_path / "small")
    assert weights(tmp_path / "small") == weights(tmp_path / "usual")


def test_another_seed_drops_other_values(models: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        case = Case("dare-linear", (0.3, 0.2), seed=seed)
        merge(plan_of(case, models), (0.3, 0.2), tmp_path / str(seed))
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


@pytest.mark.parametrize("case", [Case("ties", (0.9,)), Case("metagpt", (1.0,))], ids=words_of)
def test_a_killed_merge_resumes_with_the_same_bytes(
    case: Case, forker: Forker, models: dict[str, Path], tmp_path: Path
) -> None:
    paths = [models["base"], *(models[name] for name in case.donors)]
    words = ["merge", *paths, "--method", case.method, "--ancestor", models["ancestor"]]
    forker.run_until_killed([*words, "-o", tmp_path / "killed" / "out"])
    assert run(*words, "-o", tmp_path / "killed" / "out") == 0
    assert run(*words, "-o", tmp_path / "whole" / "out") == 0
    assert seen(tmp_path / "killed" / "out") == seen(tmp_path / "whole" / "out")


def test_a_first_pass_is_made_once_for_all_alphas(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(Case("ties", (1.0,)), models)
    merge(plan, 1.0, tmp_path / "one")
    monkeypatch.setattr(first_pass, "_read", None)
    merge(plan, 0.5, tmp_path / "half")
    assert weights(tmp_path / "half") != weights(tmp_path / "one")


@pytest.mark.parametrize(
    "case",
    [Case("metagpt", (1.0,)), Case("ties", (0.9,), density=0.25, trim="model")],
    ids=words_of,
)
def test_what_is_true_of_the_whole_model_is_found_from_a_part_of_the_plan_too(
    case: Case, models: dict[str, Path], tmp_path: Path
) -> None:
    """As a streamed live model asks: layer by layer."""
    plan = plan_of(case, models)
    step = next(step for step in plan.steps if "layers.1.mlp" in step.name)
    out = Tensor()
    loop.run(replace(plan, steps=(step,)), alpha_of(case), out)
    merge(plan_of(case, models), alpha_of(case), tmp_path / "out")
    assert bytes(out.content) == weights(tmp_path / "out")[step.name]


class Tensor:
    """A sink of one tensor."""

    def __init__(self) -> None:
        self.content = bytearray()

    def wants(self, step: Step) -> bool:
        self.content = bytearray(step.nbytes)
        return True

    def copy(self, step: Step, offset: int, content: Any) -> None:
        self.content[offset : offset + len(content)] = bytes(content)

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        return np.frombuffer(self.content, np.uint8)[offset : offset + nbytes]

    def commit(self) -> None:
        pass


# What is said of it


def test_plan_and_papers_name_method_donors_and_ancestor(
    models: dict[str, Path], tmp_path: Path
) -> None:
    case = Case("ties", (0.9,), density=0.3)
    plan = plan_of(case, models)
    document = plan.to_json()
    assert document["mixture"] == {
        "method": "ties",
        "weights": [1.0, 1.0, 1.0],
        "densities": [0.3, 0.3, 0.3],
        "trim": "tensor",
    }
    assert [each["arch"] for each in document["donors"]] == ["LLaVA-OneVision", "Qwen2"]
    assert document["ancestor"]["donor"] == str(models["ancestor"])
    lost = f"{320 - ANCESTOR_ROWS} rows are not in the ancestor and stay the base's"
    assert sum(lost in note for note in plan.notes) == 2  # embedding and head
    merge(plan, 0.9, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_text())
    assert recipe["mixture"] == document["mixture"]
    assert (recipe["alpha"], recipe["donor"], recipe["donor 2"]) == (0.9, "donor", "text")
    assert recipe["ancestor"] == "ancestor"
    assert set(recipe["inputs"]) == set(recipe["kinships"]) | {"base"}
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("base + donor + text", "ties", "- alpha: 0.9", "`ancestor`", "0.3, 0.3, 0.3"):
        assert words in card


def test_a_changed_ancestor_is_found_out(models: dict[str, Path], tmp_path: Path) -> None:
    case = Case("task-arithmetic", (0.3,), ("donor",))
    merge(plan_of(case, models), 0.3, tmp_path / "out")
    other = tiny.make("qwen2", tmp_path / "other", ancestor=tiny.ancestor("qwen2"), seed=9)
    with pytest.raises(MergeError, match="not the file that was merged"):
        verify(tmp_path / "out", deep=True, **places(case, models) | {"ancestor": other})


def test_a_row_that_was_tampered_with_is_found(models: dict[str, Path], tmp_path: Path) -> None:
    case = Case("ties", (1.0,))
    merge(plan_of(case, models), 1.0, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_text())
    recipe["alpha"] = 0.5
    (tmp_path / "out" / "adamms.json").write_text(json.dumps(recipe))
    with pytest.raises(MergeError, match="differs from its recipe"):
        verify(tmp_path / "out", deep=True, **places(case, models))


# Refusals

Fields = dict[str, Any]
REFUSED: list[tuple[Fields, int, str]] = [
    ({"method": "ties"}, 1, "mixes what the models have learned since their ancestor"),
    ({"method": "linear", "ancestor": True}, 1, "linear has no use for `ancestor`"),
    ({"method": "slerp"}, 2, "slerp takes 1 donor, found 2"),
    ({"method": "linear", "density": 0.5}, 1, "linear keeps all values; leave out `density`"),
    ({"method": "ram", "ancestor": True, "trim": "model"}, 1, "ram ranks no values"),
    ({"method": "ties", "ancestor": True, "mask_seed": 3}, 1, "drops nothing at random"),
    ({"method": "ties", "ancestor": True, "density": 0}, 1, "above 0 and up to 1"),
    ({"method": "tise"}, 1, "method 'tise': expected linear or slerp or"),
]


@pytest.mark.parametrize(("fields", "count", "why"), REFUSED)
def test_settings_that_do_not_fit_the_method_are_refused(
    fields: Fields, count: int, why: str, models: dict[str, Path]
) -> None:
    if "ancestor" in fields:
        fields = fields | {"ancestor": models["ancestor"]}
    donors = [models["donor"], models["text"]][:count]
    with pytest.raises(RecipeError, match=why):
        make_plan(models["base"], donors, **fields)


@pytest.mark.parametrize(
    ("case", "alpha", "why"),
    [
        (Case("linear", ()), 0.3, "found 1 alphas, expected 2: one for each donor"),
        (Case("linear", ()), (0.7, 0.4), "add up to 1.1; expected 1 at most"),
        (Case("ties", ()), (0.3, 0.3), "found 2 alphas, expected 1: one for the merge"),
        (Case("linear", ()), (0.2, 1.5), "alpha is 1.5, expected a number in 0..1"),
    ],
)
def test_alphas_that_do_not_fit_are_refused(
    case: Case, alpha: Any, why: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=why):
        merge(plan_of(case, models), alpha, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stranger", ["donor", "ancestor"])
def test_a_stranger_among_donors_or_as_ancestor_is_refused(
    stranger: str, models: dict[str, Path], tmp_path: Path
) -> None:
    odd = tiny.make("qwen2", tmp_path / "odd", ancestor=tiny.ancestor("qwen2", seed=8))
    changed = models | ({"text": odd} if stranger == "donor" else {"ancestor": odd})
    case = Case("task-arithmetic", (0.3, 0.2))
    with pytest.raises(MappingError, match="odd look unrelated"):
        merge(plan_of(case, changed), (0.3, 0.2), tmp_path / "out")


# The command line

Words = Callable[[dict[str, Path]], list[Any]]


def test_the_commands_take_donors_weights_and_methods(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, donor, text = (models[name] for name in ("base", "donor", "text"))
    assert run("merge", "--alpha", "0.3", "0.2", base, donor, text, "-o", tmp_path / "two") == 0
    merge(make_plan(base, [donor, text]), (0.3, 0.2), tmp_path / "python")
    assert seen(tmp_path / "two") == seen(tmp_path / "python")
    assert "alpha 0.3 and 0.2, base <- donor + text" in capsys.readouterr().err
    check = ["verify", tmp_path / "two", "--deep", "--base", base, "--donor", donor]
    assert run(*check, "--donor", text) == 0
    assert run(*check, "--donor", text, "--donor", text) == 2
    assert "was merged from 2 donors, found 3" in capsys.readouterr().err
    assert run(*check, "--ancestor", models["ancestor"]) == 2
    assert "was merged without an ancestor" in capsys.readouterr().err
    method = ["--method", "ties", "--ancestor", models["ancestor"]]
    assert run(base, donor, "-o", tmp_path / "ties", *method) == 0  # at the method's own alpha
    assert json.loads((tmp_path / "ties" / "adamms.json").read_text())["alpha"] == 1.0
    check = ["verify", tmp_path / "ties", "--deep", "--base", base, "--donor", donor]
    assert run(*check, "--ancestor", models["ancestor"]) == 0
    capsys.readouterr()
    assert run("plan", base, donor, text, *method, "--json") == 0
    assert json.loads(capsys.readouterr().out)["mixture"]["method"] == "ties"
    assert run(base, donor, text, "-o", tmp_path / "none") == 2
    assert "give either --alpha" in capsys.readouterr().err
