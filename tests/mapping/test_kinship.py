"""Kinship: descendants of one language model pass, strangers do not, and odd values do no harm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.join import make_plan

LAYERS = {"layers.0", "layers.1"}


def measure(base: Path, donor: Path) -> dict[str, float]:
    return kinship.measure(make_plan(base, donor)).cosines


def altered(
    folder: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Path:
    """A copy of a checkpoint in which some tensors have other values."""
    tensors = tiny.load(folder)
    new = {name: change(name, tensor) for name, tensor in tensors.items()}
    replaced = {name: tensor for name, tensor in new.items() if tensor is not None}
    return tiny.respell(folder, lambda name: None, out, extra=tensors | replaced)


@pytest.mark.parametrize(
    ("base", "donor"),
    [
        ("qwen2_vl", "llava_onevision"),
        ("cogvlm", "llava"),
        ("cogvlm", "mplug_owl2"),
        ("mplug_owl2", "cogvlm"),
        ("llava", "mplug_owl2"),
        ("mistral", "mistral"),
    ],
)
def test_descendants_of_one_ancestor_pass(
    tiny_models: dict[str, Path], base: str, donor: str
) -> None:
    found = kinship.check(make_plan(tiny_models[base], tiny_models[donor]))
    # Each differs from the ancestor by a tenth of its size: 1 / (1 + 0.01) between the two.
    # Rows of tokens that only one of them trained lie beyond the sampled middle
    assert set(found.cosines) == LAYERS | {"embed", "head"}
    for group in LAYERS:
        assert found.cosines[group] == pytest.approx(1.0 if base == donor else 0.990, abs=0.002)
    assert found.lowest[1] == min(found.cosines.values())


@pytest.mark.parametrize(("base", "family"), [("cogvlm", "mplug_owl2"), ("mplug_owl2", "cogvlm")])
def test_strangers_are_refused_by_layer(
    tiny_models: dict[str, Path], tmp_path: Path, base: str, family: str
) -> None:
    donor = tiny.make(family, tmp_path / "stranger", ancestor=tiny.ancestor("llama", seed=7))
    plan = make_plan(tiny_models[base], donor)
    cosines = kinship.measure(plan).cosines
    assert set(cosines) == LAYERS | {"embed", "head"}
    assert all(abs(cosine) < 0.25 for cosine in cosines.values())
    with pytest.raises(
        MappingError, match=r"unrelated: cosine similarity of (layers\.\d|embed|head)"
    ):
        kinship.check(plan)


def test_one_foreign_layer_is_found_and_named(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    stranger = tiny.ancestor("llama", seed=7)

    def swap(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        short = name.removeprefix("model.")
        return stranger[short].to(tensor.dtype) if short.startswith("layers.1.") else None

    donor = altered(tiny_models["llama"], tmp_path / "half", swap)
    plan = make_plan(tiny_models["llama"], donor)
    cosines = kinship.measure(plan).cosines
    assert cosines["layers.0"] == pytest.approx(1.0)
    with pytest.raises(MappingError, match=r"cosine similarity of layers\.1 is -?0\.0"):
        kinship.check(plan)


def test_the_negative_of_a_model_is_no_relative(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    donor = altered(tiny_models["llama"], tmp_path / "minus", lambda name, tensor: -tensor)
    plan = make_plan(tiny_models["llama"], donor)
    assert list(kinship.measure(plan).cosines.values()) == pytest.approx([-1.0] * 4)
    with pytest.raises(MappingError):
        kinship.check(plan)


def test_scale_and_dtype_do_not_matter(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A float32 donor of a thousand times the size, against a bfloat16 base."""
    donor = altered(
        tiny_models["llama"], tmp_path / "large", lambda name, tensor: 1000 * tensor.float()
    )
    cosines = measure(tiny_models["llama"], donor)
    assert list(cosines.values()) == pytest.approx([1.0] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("bfloat16", float("nan")), ("float16", float("inf")), ("float32", float("-inf"))],
)
def test_values_that_are_not_finite_are_passed_over(
    tiny_models: dict[str, Path], tmp_path: Path, dtype: str, value: float
) -> None:
    """Every fifth element on one side only: the others still tell."""

    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(getattr(torch, dtype)).clone()
        tensor.view(-1)[::5] = value
        return tensor

    sick = altered(tiny_models["llama"], tmp_path / "sick", poison)
    for pair in ((tiny_models["llama"], sick), (sick, tiny_models["llama"])):
        cosines = kinship.check(make_plan(*pair)).cosines
        assert list(cosines.values()) == pytest.approx([1.0] * 4, abs=1e-4)


def test_nothing_but_nan_is_no_reason_to_refuse(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    nothing = altered(
        tiny_models["llama"], tmp_path / "nan", lambda name, t: torch.full_like(t, float("nan"))
    )
    assert measure(nothing, nothing) == dict.fromkeys(
        ["embed", "head", "layers.0", "layers.1"], 1.0
    )
    (note,) = kinship.check(make_plan(tiny_models["llama"], nothing)).notes
    assert re.fullmatch(
        rf"{nothing}/\S+: embed is NaN .* and so are \d+ more: a damaged file\?", note
    )


def test_a_matrix_of_nan_is_noted_and_one_nan_in_it_is_not(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if "layers.1.self_attn.k_proj" in name:
            return torch.full_like(tensor, float("inf"))
        spoilt = tensor.clone()
        spoilt.view(-1)[tensor.numel() // 2] = float("nan")
        return spoilt

    base = altered(tiny_models["llama"], tmp_path / "inf", spoil)
    (note,) = kinship.check(make_plan(base, tiny_models["llama"])).notes
    assert re.fullmatch(rf"{base}/\S+: layers\.1\.attn\.k\.weight is NaN or infinite .*", note)
    assert "more" not in note
    assert kinship.check(make_plan(tiny_models["llama"], tiny_models["llama"])).notes == ()


def test_zeros_are_alike_on_both_sides_and_unlike_on_one(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def zero(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if "layers.0." in name else None

    zeroed = altered(tiny_models["llama"], tmp_path / "zero", zero)
    assert kinship.check(make_plan(zeroed, zeroed)).cosines["layers.0"] == 1.0
    with pytest.raises(MappingError, match=r"layers\.0 is 0\.000"):
        kinship.check(make_plan(tiny_models["llama"], zeroed))


def test_one_zeroed_matrix_does_not_condemn_a_layer(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Layer-skipping finetunes zero single projections; the rest of the layer outweighs it."""

    def zero(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if "layers.0.self_attn.o_proj" in name else None

    donor = altered(tiny_models["llama"], tmp_path / "zero", zero)
    cosines = kinship.check(make_plan(tiny_models["llama"], donor)).cosines
    assert 0.8 < cosines["layers.0"] < 1.0


def test_the_middle_of_a_matrix_is_sampled(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Its ends are where tokens lie that only one side has trained."""

    def upset(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        flat = tensor.clone().view(-1)
        outside = (flat.numel() - kinship.RUN_ELEMENTS) // 2
        if "embed_tokens" not in name:
            return None
        flat[:outside] *= -1
        flat[-outside:] *= -1
        return flat.view_as(tensor)

    donor = altered(tiny_models["llama"], tmp_path / "upset", upset)
    assert measure(tiny_models["llama"], donor)["embed"] == pytest.approx(1.0)


def test_norms_alone_prove_nothing(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Norm weights lie near one in any model, so they are not sampled."""

    def shift(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return -tensor if "norm" in name else None

    donor = altered(tiny_models["llama"], tmp_path / "norms", shift)
    assert list(measure(tiny_models["llama"], donor).values()) == pytest.approx([1.0] * 4)


def test_kept_embeddings_are_not_compared(tiny_models: dict[str, Path]) -> None:
    plan = make_plan(tiny_models["qwen2_vl"], tiny_models["llava_onevision"], embeddings="keep")
    assert set(kinship.check(plan).cosines) == LAYERS


def test_pickled_donors_are_sampled_too(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    pickled = tiny.to_bin(tiny_models["mplug_owl2"], tmp_path / "bin")
    assert measure(tiny_models["cogvlm"], pickled) == measure(
        tiny_models["cogvlm"], tiny_models["mplug_owl2"]
    )
