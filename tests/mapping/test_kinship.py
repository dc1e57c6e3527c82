"""Kinship: descendants of one language model pass, strangers do not, and odd values do no harm."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import tiny
import torch

from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.join import make_plan

LAYERS = {"layers.0", "layers.1"}
Change: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor | None]
Alter: TypeAlias = Callable[[Change], Path]


@pytest.fixture
def llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture
def alter(llama: Path, tmp_path: Path) -> Alter:
    """Makes a copy of the Llama in which the tensors have other values that are not None."""

    def make(change: Change) -> Path:
        tensors = tiny.load(llama)
        new = {name: change(name, tensor) for name, tensor in tensors.items()}
        replaced = {name: tensor for name, tensor in new.items() if tensor is not None}
        return tiny.respell(llama, lambda name: None, tmp_path / "new", extra=tensors | replaced)

    return make


def measure(base: Path, donor: Path) -> dict[str, float]:
    return kinship.measure(make_plan(base, donor)).cosines


def check(base: Path, donor: Path) -> kinship.Kinship:
    return kinship.check(make_plan(base, donor))


@pytest.mark.parametrize(
    ("base", "donor"),
    [("qwen2_vl", "llava_onevision"), ("cogvlm", "mplug_owl2"), ("mistral", "mistral")],
)
def test_descendants_of_one_ancestor_pass(
    tiny_models: dict[str, Path], base: str, donor: str
) -> None:
    found = check(tiny_models[base], tiny_models[donor])
    # Each differs from the ancestor by a tenth of its size: 1 / (1 + 0.01) between the two.
    # Rows of tokens that only one of them trained lie beyond the sampled middle
    assert set(found.cosines) == LAYERS | {"embed", "head"}
    for group in LAYERS:
        assert found.cosines[group] == pytest.approx(1.0 if base == donor else 0.990, abs=0.002)
    assert found.lowest[1] == min(found.cosines.values())


def test_strangers_are_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    stranger = tiny.make("mplug_owl2", tmp_path / "x", ancestor=tiny.ancestor("llama", seed=7))
    cosines = measure(tiny_models["cogvlm"], stranger)
    assert set(cosines) == LAYERS | {"embed", "head"}
    assert all(abs(cosine) < 0.25 for cosine in cosines.values())
    with pytest.raises(MappingError, match="look unrelated"):
        check(tiny_models["cogvlm"], stranger)


def test_one_foreign_layer_is_found_and_named(llama: Path, alter: Alter) -> None:
    stranger = tiny.ancestor("llama", seed=7)

    def swap(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        short = name.removeprefix("model.")
        return stranger[short].to(tensor.dtype) if short.startswith("layers.1.") else None

    donor = alter(swap)
    assert measure(llama, donor)["layers.0"] == pytest.approx(1.0)
    with pytest.raises(MappingError, match=r"cosine similarity of layers\.1 is -?0\.0"):
        check(llama, donor)


def test_the_negative_of_a_model_is_no_relative(llama: Path, alter: Alter) -> None:
    donor = alter(lambda name, tensor: -tensor)
    assert list(measure(llama, donor).values()) == pytest.approx([-1.0] * 4)
    with pytest.raises(MappingError):
        check(llama, donor)


def test_scale_and_dtype_do_not_matter(llama: Path, alter: Alter) -> None:
    """A float32 donor of a thousand times the size, against a bfloat16 base."""
    donor = alter(lambda name, tensor: 1000 * tensor.float())
    assert list(measure(llama, donor).values()) == pytest.approx([1.0] * 4, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_passed_over(
    llama: Path, alter: Alter, value: float
) -> None:
    """Every fifth element on one side only: the others still tell."""

    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[::5] = value
        return tensor

    sick = alter(poison)
    for pair in ((llama, sick), (sick, llama)):
        found = check(*pair)
        assert list(found.cosines.values()) == pytest.approx([1.0] * 4, abs=1e-4)


def test_nothing_but_nan_is_no_reason_to_refuse(llama: Path, alter: Alter) -> None:
    nothing = alter(lambda name, tensor: torch.full_like(tensor, math.nan))
    assert measure(nothing, nothing) == dict.fromkeys(LAYERS | {"embed", "head"}, 1.0)
    assert check(llama, nothing).lowest[1] == 1.0


def test_zeros_are_alike_on_both_sides_and_unlike_on_one(llama: Path, alter: Alter) -> None:
    zeroed = alter(lambda name, tensor: torch.zeros_like(tensor) if "layers.0." in name else None)
    assert check(zeroed, zeroed).cosines["layers.0"] == 1.0
    with pytest.raises(MappingError, match=r"layers\.0 is 0\.000"):
        check(llama, zeroed)


def test_one_zeroed_matrix_does_not_condemn_a_layer(llama: Path, alter: Alter) -> None:
    """Layer-skipping finetunes zero single projections; the rest of the layer outweighs it."""
    donor = alter(
        lambda name, tensor: torch.zeros_like(tensor) if "0.self_attn.o" in name else None
    )
    assert 0.8 < check(llama, donor).cosines["layers.0"] < 1.0


def test_the_middle_of_a_matrix_is_sampled(llama: Path, alter: Alter) -> None:
    """Its ends are where tokens lie that only one side has trained."""

    def upset(name: str, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(-1)
        outside = (flat.numel() - kinship.RUN_ELEMENTS) // 2
        if "embed_tokens" in name:
            flat[:outside] *= -1
            flat[-outside:] *= -1
        return tensor

    assert measure(llama, alter(upset))["embed"] == pytest.approx(1.0)


def test_norms_alone_prove_nothing(llama: Path, alter: Alter) -> None:
    """Norm weights lie near one in any model, so they are not sampled."""
    donor = alter(lambda name, tensor: -tensor if "norm" in name else None)
    assert list(measure(llama, donor).values()) == pytest.approx([1.0] * 4)


def test_kept_embeddings_are_not_compared(llama: Path) -> None:
    assert set(kinship.check(make_plan(llama, llama, embeddings="keep")).cosines) == LAYERS


def test_pickled_donors_are_sampled_too(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base, donor = tiny_models["cogvlm"], tiny_models["mplug_owl2"]
    assert measure(base, tiny.to_bin(donor, tmp_path / "bin")) == measure(base, donor)
