"""Tiny weights in every family's spelling: each ordered pair merged, against joins made in numpy.

A blend is made element by element, so blending two texts and then spelling the result must give
what merging the two spelled checkpoints gives, bit for bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spelled
from lowmem_adamms.kernels import reference
from safetensors.numpy import load_file
from spelled import SPELLERS, Arrays

from lowmem_adamms import make_plan, merge
from lowmem_adamms.architectures.layout import UNKNOWN
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.plan import Plan, Step

loop = importlib.import_module(
    "lowmem_adamms.merging.loop"
)  # the package's `merge` is the function
ALPHA = 0.3
PAIRS = [(line, a, b) for line, families in SPELLERS.items() for a in families for b in families]
SEEDS = {side: i for i, side in enumerate(("base", "donor", "stranger"), 1)}
Model = tuple[Path, Arrays, Arrays]  # the folder, its text and its vision experts'


class Memory:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.out: dict[str, bytearray] = {}

    def wants(self, step: Step) -> bool:
        self.out[step.name] = bytearray(step.nbytes)
        return True

    def copy(self, step: Step, offset: int, span: Span) -> None:
        data = span.path.read_bytes()[span.start : span.stop]
        self.out[step.name][offset : offset + len(data)] = data

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        return np.frombuffer(self.out[step.name], np.uint8)[offset : offset + nbytes]

    def commit(self) -> None:
        pass


def kernel(parts: Any, dtypes: tuple[str, str, str], alpha: float) -> None:
    for base, donor, out in parts:
        mixed = reference.blend(base.view(np.uint32), donor.view(np.uint32), dtypes, alpha)
        out[...] = mixed.view(np.uint8)


def blended(base: Arrays, donor: Arrays) -> Arrays:
    return {
        name: reference.blend(
            array.view(np.uint32), donor[name].view(np.uint32), ("F32", "F32", "F32"), ALPHA
        ).view(np.float32)
        for name, array in base.items()
    }


def merged(plan: Plan) -> Arrays:
    sink = Memory()
    loop.run(plan, ALPHA, sink, kernel=kernel)
    return {
        step.name: np.frombuffer(sink.out[step.name], np.float32).reshape(step.shape)
        for step in plan.steps
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Model]:
    """Every family's base, donor, and a stranger of another ancestor but the same shapes."""
    root, out = tmp_path_factory.mktemp("spelled"), {}
    for place, (line, families) in enumerate(SPELLERS.items()):
        for side, seed in SEEDS.items():
            parent = spelled.ancestor(line, 10 * place + (side == "stranger"))
            for number, (family, speller) in enumerate(families.items()):
                own = 1000 * seed + number
                text, vision = (spelled.descend(parent, own + 100 * way) for way in (0, 1))
                tensors = speller(text, vision, own)
                folder = speller.write(root / side / line / family, tensors)
                out[line, family, side] = (folder, text, vision)
    return out


def expected(models: dict[tuple[str, str, str], Model], line: str, base: str, donor: str) -> Arrays:
    (_, text, vision), (_, other, its_vision) = (
        models[line, name, side] for name, side in ((base, "base"), (donor, "donor"))
    )
    theirs = its_vision if SPELLERS[line][donor].experts else other
    own = 1000 * SEEDS["base"] + list(SPELLERS[line]).index(base)
    wanted = SPELLERS[line][base](blended(text, other), blended(vision, theirs), own)
    if SPELLERS[line][base].experts and SPELLERS[line][donor].experts:
        # The one kind of tensor that a speller draws itself and both sides have
        biases = {name: a for name, a in wanted.items() if name.endswith("query_key_value.bias")}
        wanted |= blended(biases, load_file(models[line, donor, "donor"][0] / "model.safetensors"))
    return wanted


def assert_equal(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name].view(np.uint32), array.view(np.uint32)), name


@pytest.mark.parametrize(("line", "base", "donor"), PAIRS)
def test_merging_spelled_texts_is_spelling_merged_texts(
    models: dict[tuple[str, str, str], Model], line: str, base: str, donor: str
) -> None:
    plan = make_plan(models[line, base, "base"][0], models[line, donor, "donor"][0])
    assert plan.base_layout.assumed is plan.donor_layout.assumed is None
    assert UNKNOWN not in {*plan.leftover.values(), *(step.kind for step in plan.steps)}
    assert_equal(merged(plan), expected(models, line, base, donor))
    kinship.check(plan)


@pytest.mark.parametrize(
    ("line", "base", "donor"),
    [
        ("internlm2", "InternVL2.5-8B", "split"),
        ("internlm2", "split", "InternLM2"),
        ("internlm2", "fused", "InternVL2.5-8B"),
        ("phi3", "Phi-3-vision", "up first"),
        ("llama3", "Mllama", "CogVLM2"),
    ],
)
def test_the_disk_writer_and_the_fast_kernel_agree(
    models: dict[tuple[str, str, str], Model], tmp_path: Path, line: str, base: str, donor: str
) -> None:
    plan = make_plan(models[line, base, "base"][0], models[line, donor, "donor"][0])
    merge(plan, ALPHA, tmp_path / "out")
    assert_equal(
        load_file(tmp_path / "out" / "model.safetensors"), expected(models, line, base, donor)
    )


@pytest.mark.parametrize(("line", "base", "donor"), PAIRS)
def test_another_ancestor_of_equal_shapes_is_refused(
    models: dict[tuple[str, str, str], Model], line: str, base: str, donor: str
) -> None:
    """As Qwen2-7B and Qwen2.5-7B, or Llama-3 and Llama-3.1, look alike by name and shape."""
    plan = make_plan(models[line, base, "base"][0], models[line, donor, "stranger"][0])
    with pytest.raises(MappingError, match="look unrelated"):
        kinship.check(plan)


def across() -> Iterator[tuple[str, str, str, str]]:
    lines = ("internlm2", "phi3", "llama3", "gemma")
    for one in lines:
        for other in lines:
            if one != other:
                for base in SPELLERS[one]:
                    for donor in SPELLERS[other]:
                        yield one, base, other, donor


@pytest.mark.parametrize(("one", "base", "other", "donor"), list(across()))
def test_lines_of_equal_shapes_are_told_apart(
    models: dict[tuple[str, str, str], Model], one: str, base: str, other: str, donor: str
) -> None:
    """InternLM2.5-7B has the sizes of Llama-3-8B; only the values tell."""
    plan = make_plan(models[one, base, "base"][0], models[other, donor, "donor"][0])
    with pytest.raises(MappingError, match="look unrelated"):
        kinship.check(plan)


def test_a_wrong_size_of_heads_does_not_pass_for_kin(
    models: dict[tuple[str, str, str], Model], tmp_path: Path
) -> None:
    """Half the heads said: wqkv would be taken apart in the wrong places."""
    speller = SPELLERS["internlm2"]["InternLM2"]
    folder, _, _ = models["internlm2", "InternLM2", "base"]
    wrong = speller.write(tmp_path / "wrong", load_file(folder / "model.safetensors"))
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(
        config.replace('"num_attention_heads": 4', '"num_attention_heads": 8')
    )
    plan = make_plan(wrong, models["internlm2", "split", "donor"][0])
    assert (
        kinship.measure(plan).lowest[1]
        < 0.8
        < kinship.measure(make_plan(folder, models["internlm2", "split", "donor"][0])).lowest[1]
    )
