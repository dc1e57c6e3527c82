"""Experts in any form on disk merged with experts in any other, against an oracle of forms alone.

The oracle writes the donor in the base's form, and blends byte for byte what lies in one place.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stacks
from lowmem_adamms.kernels import reference
from stacks import Arrays

from lowmem_adamms import merge
from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.checkpoints.arranged import Arranged
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.comparing.comparison import compare
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.errors import FormatError, MappingError, RecipeError
from lowmem_adamms.mapping import join, kinship
from lowmem_adamms.mapping.alphas import Alpha, parse_alpha_layers, resolve
from lowmem_adamms.mapping.plan import Plan, Step
from lowmem_adamms.merging import loop
from lowmem_adamms.merging.verify import verify

FORMS = sorted(stacks.FORMS)
NAMES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
GPT_OSS = next(arch for arch in ARCHS if arch.name == "gpt-oss")
DECLARED = (
    replace(GPT_OSS, name="rows", classes=("RowsForCausalLM",)),
    replace(GPT_OSS, name="stacked", classes=("StackedForCausalLM",), interleaved=()),
)
"""gpt-oss's names in a stack that is not transposed, or whose gate and up do not alternate."""
make_plan = functools.partial(join.make_plan, declared=DECLARED)
Write = Callable[..., Path]


@functools.cache
def text(seed: int) -> Arrays:
    return stacks.descend(stacks.ancestor(), seed)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write base (seed 1) or donor (seed 2) in a form and dtype, once."""

    @functools.cache
    def write(seed: int, form: str, dtype: str = "float32") -> Path:
        tensors = {n: a.astype(dtype) for n, a in stacks.spell(text(seed), form).items()}
        return stacks.write(tmp_path_factory.mktemp(form) / str(seed), tensors, form)

    return write


def blended(
    form: str, alpha: float, dtypes: tuple[str, str] = ("float32", "float32")
) -> dict[str, bytes]:
    """Every tensor of the merge, with the donor written in the base's form."""
    base, donor = (
        {name: array.astype(dtype) for name, array in stacks.spell(text(seed), form).items()}
        for seed, dtype in zip((1, 2), dtypes, strict=True)
    )
    out = {}
    for name, array in base.items():
        triple = (NAMES[array.dtype], NAMES[donor[name].dtype], NAMES[array.dtype])
        sides = (side[name].view(f"u{side[name].itemsize}") for side in (base, donor))
        out[name] = reference.blend(*sides, triple, alpha, True).tobytes()
    return out


class Memory:
    """A sink of byte arrays."""

    def __init__(self) -> None:
        self.content: dict[str, bytearray] = {}

    def wants(self, step: Step) -> bool:
        self.content[step.name] = bytearray(step.nbytes)
        return True

    def copy(self, step: Step, offset: int, content: Any) -> None:
        self.content[step.name][offset : offset + len(content)] = bytes(content)

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        return np.frombuffer(self.content[step.name], np.uint8)[offset : offset + nbytes]

    def commit(self) -> None:
        pass


class Counted(MappedFiles):
    """Mapped files that note which spans they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.prefetched: Counter[Span] = Counter()
        self.released: Counter[Span] = Counter()

    def view(self, span: Span) -> Any:
        assert self.prefetched[span] > self.released[span]
        return super().view(span)

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        self.prefetched[span] += 1
        return super().prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        self.released[span] += 1
        return super().release(span, evict=evict)


def merged(plan: Plan, alpha: Alpha, **options: Any) -> dict[str, bytes]:
    sink = Memory()
    loop.run(plan, alpha, sink, **options)
    return {name: bytes(content) for name, content in sink.content.items()}


@pytest.mark.parametrize("donor", FORMS)
@pytest.mark.parametrize("base", FORMS)
def test_each_form_takes_each_other(base: str, donor: str, write: Write) -> None:
    """At 0 the base's bytes, at 1 the donor's in the base's form, between them the reference's."""
    plan = make_plan(write(1, base), write(2, donor))
    assert not plan.leftover
    assert plan.counts["copy"] == 0
    for alpha in (0, 0.3, 1):
        assert merged(plan, alpha) == blended(base, alpha), alpha
    assert kinship.check(plan).lowest[1] > 0.9


@pytest.mark.parametrize("form", FORMS)
def test_alike_forms_stay_whole(form: str, write: Write) -> None:
    """No tensor is cut, and nothing is put together that lies together already."""
    plan = make_plan(write(1, form), write(2, form))
    assert all(len(step.parts) == 1 for step in plan.steps)
    assert not any(isinstance(part.donor, Arranged) for _, part in plan.parts)
    assert all(part.donor_rows == part.rows for _, part in plan.parts)


@pytest.mark.parametrize("window", [20, 100])
@pytest.mark.parametrize(("base", "donor"), [("transposed", "each"), ("stacked", "interleaved")])
def test_a_slab_is_cut_by_any_window(base: str, donor: str, window: int, write: Write) -> None:
    """Windows end within the rows of a slab; each span is read once and let go of once."""
    plan = make_plan(write(1, base), write(2, donor))
    for alpha in (0.3, 1.0):
        source = Counted()
        with source:
            assert merged(plan, alpha, source=source, window=window) == blended(base, alpha)
        assert source.prefetched == source.released


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")])
def test_dtypes_mix(dtypes: tuple[str, str], write: Write) -> None:
    plan = make_plan(write(1, "transposed", dtypes[0]), write(2, "each", dtypes[1]))
    assert merged(plan, 0.3) == blended("transposed", 0.3, dtypes)


@pytest.mark.parametrize("pair", [("transposed", "each"), ("stacked", "transposed")])
def test_a_written_merge_is_verified(pair: tuple[str, str], write: Write, tmp_path: Path) -> None:
    """Every part is recomputed: a single changed element is found."""
    base, donor = write(1, pair[0]), write(2, pair[1])
    out = tmp_path / "out"
    merge(make_plan(base, donor), 0.3, out)
    assert verify(out, deep=True, base=base, donor=donor).rows
    recipe = json.loads((out / "adamms.json").read_text())
    changed = recipe | {"alpha": 0.31}
    (out / "adamms.json").write_text(json.dumps(changed))
    with pytest.raises(FormatError, match="differs from its recipe"):
        verify(out, deep=True, base=base, donor=donor)


def test_routers_and_experts_have_alphas_of_their_own(write: Write) -> None:
    plan = make_plan(write(1, "transposed"), write(2, "each"))
    alpha = resolve(parse_alpha_layers("router:0,experts:1", stacks.LAYERS, 0.3), plan)
    found = merged(plan, alpha)
    for name, content in found.items():
        weight = 0 if ".mlp.gate." in name else 1 if ".experts." in name else 0.3
        assert content == blended("transposed", weight)[name], name
    for unknown in ("shared_expert:0.1",):
        with pytest.raises(RecipeError, match=r"shared_expert: .* has no such role"):
            resolve(parse_alpha_layers(unknown, stacks.LAYERS, 0.3), plan)


def test_experts_that_only_one_side_has_are_named(write: Write, tmp_path: Path) -> None:
    """One of those that lie interwoven in a stack cannot be left to the base."""
    tensors = stacks.spell(text(2), "each")
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    donor = stacks.write(tmp_path / "donor", tensors, "each")
    with pytest.raises(MappingError, match=r"1 has .*gate_up_proj, .*donor lacks that; declare"):
        make_plan(write(1, "transposed"), donor)
    with pytest.raises(
        MappingError, match=r"holds layers\.1\.mlp\.experts\.1 interwoven, of which"
    ):
        make_plan(write(1, "transposed"), donor, unmatched="keep")


def test_pieces_of_two_dtypes_are_named(write: Write, tmp_path: Path) -> None:
    tensors = stacks.spell(text(2), "each")
    odd = "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors[odd] = tensors[odd].astype(np.float16)
    donor = stacks.write(tmp_path / "donor", tensors, "each")
    with pytest.raises(
        MappingError, match=r"experts\.1\.gate_proj\.weight is F32, .*up_proj.* F16"
    ):
        make_plan(write(1, "transposed"), donor)
    assert merged(make_plan(write(1, "stacked"), donor), 0.3)


def test_many_experts_are_summed_up(tmp_path: Path) -> None:
    """In `plan --json`, whichever side has them one by one."""
    many = stacks.ancestor(experts=20)
    folders = {
        form: stacks.write(tmp_path / form, stacks.spell(many, form), form)
        for form in ("each", "transposed")
    }
    document = make_plan(folders["each"], folders["transposed"]).to_json()
    (gate,) = (step for step in document["steps"] if step["name"].endswith("*.gate_proj.weight"))
    assert gate["tensors"] == gate["parts"][0]["count"] == 20
    assert gate["parts"][0]["role"] == "layers.1.mlp.experts.*.gate.weight"
    assert len(document["steps"]) == 2 + 1 + 2 * 6 + 3 + 1 + 6
    document = make_plan(folders["transposed"], folders["each"]).to_json()
    (gate_up,) = (step for step in document["steps"] if step["name"].endswith("gate_up_proj"))
    (part,) = gate_up["parts"]
    stem = "model.layers.1.mlp.experts.*"
    assert part["donor"]["names"] == [f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"]
    assert (part["count"], part["role"]) == (20, "layers.1.mlp.experts.*")
    assert any("HARC" in note for note in document["notes"])


@pytest.mark.parametrize("pair", [("transposed", "each"), ("each", "stacked"), ("apart", "each")])
def test_a_comparison_counts_experts_once(pair: tuple[str, str], write: Write) -> None:
    """Whatever forms the two sides have, and whichever comes first."""
    both = (
        pair_checkpoints(write(1, a), write(2, b), make=make_plan) for a, b in (pair, pair[::-1])
    )
    for pairing in both:
        (experts,) = (each for each in pairing.pairs if each.kind == "experts")
        sizes = stacks.HIDDEN * stacks.INNER * 3 + stacks.INNER * 2 + stacks.HIDDEN
        assert experts.elements == stacks.EXPERTS * sizes
        assert experts.role == "layers.1.mlp.experts"
        assert not [left for side in (pairing.a, pairing.b) for left in side.unpaired]
        found = compare(pairing)
        assert found.ancestry.word == "same ancestor"
        cosine = found.cells["layers.1", "experts"].cosine
        assert cosine and 0.98 < cosine < 0.999
