"""Tiny weights in every family's spelling, merged in pairs, against joins made in numpy.

A blend is made element by element, so blending two texts and then spelling the result must give
what merging the two spelled checkpoints gives, bit for bit.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import spelled
from lowmem_adamms.kernels import reference
from safetensors.numpy import load_file
from spelled import SPELLERS, Arrays

from lowmem_adamms import make_plan, merge
from lowmem_adamms.architectures.arch import UNKNOWN
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship

ALPHA = 0.3
JOINING = {"InternLM2", "InternVL2.5-8B", "fused", "Phi-3", "up first", "CogVLM2", "Mllama"}
"""Families whose layers are not those of their ancestor under other names."""
PAIRS = [
    (line, base, donor)
    for line, families in SPELLERS.items()
    for base in families
    for donor in families
    if next(iter(families)) in (base, donor) or {base, donor} <= JOINING
]
"""Every family with the first of its line, either way round, and all of JOINING."""
SEEDS = {side: i for i, side in enumerate(("base", "donor", "stranger"), 1)}
Model = tuple[Path, Arrays, Arrays]  # the folder, its text and its vision experts'


def blended(base: Arrays, donor: Arrays) -> Arrays:
    return {
        name: reference.blend(
            array.view(np.uint32), donor[name].view(np.uint32), ("F32", "F32", "F32"), ALPHA
        ).view(np.float32)
        for name, array in base.items()
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


@pytest.mark.parametrize(("line", "base", "donor"), PAIRS)
def test_merging_spelled_texts_is_spelling_merged_texts(
    models: dict[tuple[str, str, str], Model], tmp_path: Path, line: str, base: str, donor: str
) -> None:
    plan = make_plan(models[line, base, "base"][0], models[line, donor, "donor"][0])
    assert UNKNOWN not in {*plan.leftover.values(), *(step.kind for step in plan.steps)}
    merge(plan, ALPHA, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = expected(models, line, base, donor)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name].view(np.uint32), array.view(np.uint32)), name
    kinship.check(plan)


@pytest.mark.parametrize("line", SPELLERS)
def test_another_ancestor_of_equal_shapes_is_refused(
    models: dict[tuple[str, str, str], Model], line: str
) -> None:
    """As Qwen2-7B and Qwen2.5-7B, or Llama-3 and Llama-3.1, look alike by name and shape."""
    base, *_, donor = SPELLERS[line]
    plan = make_plan(models[line, base, "base"][0], models[line, donor, "stranger"][0])
    with pytest.raises(MappingError, match="look unrelated"):
        kinship.check(plan)


@pytest.mark.parametrize(
    ("one", "other"), [*permutations(("internlm2", "phi3", "llama3", "gemma"), 2)]
)
def test_lines_of_equal_shapes_are_told_apart(
    models: dict[tuple[str, str, str], Model], one: str, other: str
) -> None:
    """InternLM2.5-7B has the sizes of Llama-3-8B; only the values tell."""
    base, *_, donor = *SPELLERS[one], *SPELLERS[other]
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
