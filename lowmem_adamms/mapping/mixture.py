"""A mixture: what the merge of a base with one or several donors does by any of the methods.

It is a plan whose parts name everything that is mixed: each donor's plan is made by roles as for it
alone, the ancestor's too, and their parts are cut wherever one of them ends. Rows that no donor has
stay the base's. Rows that a donor has and the ancestor lacks have no difference to mix, so they
stay the base's as well: the authors' code of TIES and DARE, too, mixes only what the ancestor has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..architectures.arch import Arch
from ..checkpoints.arranged import Arranged
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.span import Span
from ..errors import MappingError, RecipeError
from ..methods import METHODS, Method
from ..settings import Embeddings, MethodSettings, Rounding, Trim, Unmatched
from .alphas import Alpha, Alphas, OneAlpha, alpha_of, as_tuple
from .join import make_plan
from .plan import Part, Plan, Step

ModelRef = str | Path | Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPart(Part):
    """Rows of one output tensor that are mixed, or none of whose donors has a counterpart.

    donors: each donor's span, or None. ancestor: None also where the method needs none. `donor` is
    the first of the donors; None where the base is copied, for want of donors or of the ancestor.
    """

    donors: tuple[Span | Arranged | None, ...]
    ancestor: Span | Arranged | None = None

    @property
    def sides(self) -> tuple[Span | Arranged, ...]:
        """Everything that is mixed: base, donors, ancestor."""
        if self.donor is None:
            return (self.base,)
        return tuple(side for side in (self.base, *self.donors, self.ancestor) if side)


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of which models goes into a part; model 0 is the base, model n the nth donor."""

    models: tuple[int, ...]
    weights: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Mixture(Plan):
    """A plan by any method, with one or several donors.

    method: as in `METHODS`. plans: the base with each donor. ancestor_plan: with the ancestor.
    weights: of base and donors, beside what alpha says. densities: of each, the share that is kept.
    trim: within what values are ranked. mask_seed: of the random choice.
    found: what first passes found, by tensor; filled as it is needed, for later merges.
    """

    method: Method
    plans: tuple[Plan, ...]
    ancestor_plan: Plan | None
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    trim: Trim = "tensor"
    mask_seed: int = 0
    found: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """All inputs, by the name that adamms.json gives them."""
        named = {"base": self.base, "donor": self.donor}
        more = {f"donor {i}": plan.donor for i, plan in enumerate(self.plans[1:], 2)}
        ancestor = {"ancestor": self.ancestor_plan.donor} if self.ancestor_plan else {}
        return named | more | ancestor

    @property
    def coefficients(self) -> int:
        """How many alphas it takes: one for each donor, or one for all."""
        return len(self.plans) if self.method.alpha_of_each else 1

    @property
    def starts_at_base(self) -> bool:
        """Whether alpha 0 is the base, with all that it has learned."""
        return self.method.alpha_of_each and (self.weights[0], self.densities[0]) == (1.0, 1.0)

    @property
    def donor_plans(self) -> tuple[Plan, ...]:
        """The base with each donor."""
        return self.plans

    @property
    def pairs(self) -> tuple[Plan, ...]:
        """The base with each other model."""
        return (*self.plans, *([self.ancestor_plan] if self.ancestor_plan else []))

    @property
    def dtypes(self) -> set[tuple[str, str, str]]:
        """None: nothing is blended by the kernel of two models."""
        return set()

    def shares(self, part: MixedPart, alpha: Alpha) -> Shares:
        """What goes into a part at an alpha; models of weight 0 are left out."""
        alphas = [alpha_of(each, part.role) for each in as_tuple(alpha)]
        present = [0, *(i for i, donor in enumerate(part.donors, 1) if donor)]
        if not self.method.alpha_of_each:
            return Shares(tuple(present), tuple(self.weights[i] for i in present), alphas[0])
        lent = {i: self.weights[i] * alphas[i - 1] for i in present[1:]}
        own = self.weights[0] if self.method.relative else max(0.0, 1.0 - sum(lent.values()))
        used = {i: weight for i, weight in {0: own, **lent}.items() if weight}
        return Shares(tuple(used), tuple(used.values()))

    def find_lone(self, part: MixedPart, shares: Shares) -> Span | Arranged | None:
        """The one span that the shares leave as it is, if that is what they do."""
        if len(shares.models) != 1 or (*shares.weights, shares.scale) != (1.0, 1.0):
            return None
        (model,) = shares.models
        is_whole = self.densities[model] == 1 and self.method.smallest < 0
        return (part.base, *part.donors)[model] if is_whole or not self.method.relative else None

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps of the whole merge, also where `steps` has only some of them."""
        return tuple(_mix_steps(self.plans, self.ancestor_plan))

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs that a merge reads, with its first pass if the method makes one."""
        passes = 2 if self.method.measure else 1
        return passes * sum(span.nbytes for span in self.spans)

    def check_alphas(self, alphas: Sequence[OneAlpha]) -> None:
        """RecipeError where donors together have a weight above 1 in a linear merge."""
        if self.method.relative or len(alphas) < 2:
            return
        names = {name for each in alphas if isinstance(each, Alphas) for name in each.values}
        for role in (None, *sorted(names)):
            total = sum(alpha_of(each, role) for each in alphas)
            if total > 1 + 1e-9:
                raise RecipeError(
                    f"the donors' alphas{f' of {role}' if role else ''} add up to {total:g};"
                    " expected 1 at most: the rest is the base's"
                )

    def identity(self) -> list[Any]:
        """Plain data that differs between any two plans, or after a checkpoint changed."""
        return [*Plan.identity(self), self.parameters()]

    def parameters(self) -> dict[str, Any]:
        """The method and its settings, as adamms.json holds them."""
        settings: dict[str, Any] = {"method": self.method.name, "weights": list(self.weights)}
        if self.method.takes_density:
            settings["densities"] = list(self.densities)
        if self.method.measure == "magnitudes":
            settings["trim"] = self.trim
        if self.method.by_chance:
            settings["mask_seed"] = self.mask_seed
        return settings

    def options_of_method(self) -> list[str]:
        """The words of the command line that choose the method."""
        settings, method = self.parameters(), self.method
        words = [] if method.name == "linear" else ["--method", method.name]
        if self.ancestor_plan:
            words += ["--ancestor", self.ancestor_plan.donor.ref]
        if method.takes_density and self.densities[0] != method.density:
            words += ["--density", f"{self.densities[0]:g}"]
        words += ["--trim", self.trim] if settings.get("trim") == "model" else []
        return words + (["--mask-seed", str(self.mask_seed)] if self.mask_seed else [])

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`: that of the first donor's plan, and of each donor."""
        document = Plan.to_json(self) | {"mixture": self.parameters()}
        document["donors"] = [_describe(plan) for plan in self.plans]
        if self.ancestor_plan:
            document["ancestor"] = _describe(self.ancestor_plan)
        return document


def _describe(plan: Plan) -> dict[str, Any]:
    document = plan.to_json()
    keys = ("donor", "donor_arch", "counts", "tokens", "leftover")
    return {key.removeprefix("donor_"): document[key] for key in keys}


def make_mixture(
    base: ModelRef,
    donors: Sequence[ModelRef],
    settings: MethodSettings,
    *,
    ancestor: ModelRef | None = None,
    embeddings: Embeddings = "merge",
    dtype: str | None = None,
    unmatched: Unmatched = "stop",
    rounding: Rounding = "stochastic",
    declared: Sequence[Arch] = (),
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
) -> Mixture:
    """Plan a merge by any method, with any number of donors, from headers alone.

    RecipeError if the settings do not fit the method, MappingError if a model does not fit.

    ancestor: what the models were trained from. embeddings, dtype, unmatched, rounding,
    declared: as for `make_plan`. weights: of base and donors, beside alpha; default: 1 for each.
    densities: of base and donors; default: that of the settings, else the method's.
    """
    method = METHODS[settings.method]
    _check_settings(method, settings, ancestor is not None, len(donors))
    opened = open_checkpoint(base)
    how: Any = {
        "embeddings": embeddings,
        "dtype": dtype,
        "unmatched": unmatched,
        "rounding": rounding,
        "declared": declared,
    }
    plans = tuple(make_plan(opened, donor, **how) for donor in donors)
    ancestor_plan = None if ancestor is None else make_plan(opened, ancestor, **how)
    steps = tuple(_mix_steps(plans, ancestor_plan))
    if all(step.action == "copy" for step in steps):
        raise MappingError(f"no donor of {opened.path} has a parameter in common with the ancestor")
    first = plans[0]
    count = len(donors) + 1
    taken = {each.name: getattr(first, each.name) for each in fields(Plan)}
    notes = (*_merge_notes(plans, ancestor_plan), *_note_lost_rows(steps))
    return Mixture(
        **taken | {"steps": steps, "notes": notes},
        method=method,
        plans=plans,
        ancestor_plan=ancestor_plan,
        weights=tuple(weights or (1.0,) * count),
        densities=tuple(densities or (settings.density or method.density,) * count),
        trim=settings.trim,
        mask_seed=settings.mask_seed,
    )


def _check_settings(
    method: Method, settings: MethodSettings, has_ancestor: bool, donors: int
) -> None:
    if method.relative and not has_ancestor:
        raise RecipeError(
            f"{method.name} mixes what the models have learned since their ancestor; give it as"
            " `ancestor`, such as the language model that they were built on"
        )
    if has_ancestor and not method.relative:
        raise RecipeError(f"{method.name} has no use for `ancestor`; leave it out")
    if method.max_donors is not None and donors > method.max_donors:
        raise RecipeError(f"{method.name} takes {method.max_donors} donor, found {donors}")
    if settings.density is not None and not method.takes_density:
        raise RecipeError(f"{method.name} keeps all values; leave out `density`")
    if settings.trim != "tensor" and method.measure != "magnitudes":
        raise RecipeError(f"{method.name} ranks no values; leave out `trim`")
    if settings.mask_seed and not method.by_chance:
        raise RecipeError(f"{method.name} drops nothing at random; leave out `mask_seed`")


# Steps


def _mix_steps(plans: Sequence[Plan], ancestor: Plan | None) -> Iterator[Step]:
    """The steps of all plans as one, which have the base's tensors in the same order."""
    everything = [*plans, ancestor] if ancestor else list(plans)
    for steps in zip(*(plan.steps for plan in everything), strict=True):
        first = steps[0]
        lent = steps[: len(plans)]
        reasons = dict.fromkeys(step.reason for step in lent)
        parts = tuple(_mix_parts(lent, steps[-1] if ancestor else None))
        yield Step(first.name, first.dtype, first.shape, first.kind, "; ".join(reasons), parts)


def _mix_parts(steps: Sequence[Step], ancestor: Step | None) -> Iterator[Part]:
    """The parts of one tensor, cut wherever a part of any plan ends."""
    everything = [*steps, ancestor] if ancestor else list(steps)
    row_elements = steps[0].elements // max(1, sum(p.rows[1] - p.rows[0] for p in steps[0].parts))
    for start, stop, parts in _cut_alike([step.parts for step in everything]):
        cut = [_slice(part, offset, stop - start) for part, offset in parts]
        lent = cut[: len(steps)]
        old = cut[-1].donor if ancestor else None
        is_mixed = any(part.donor for part in lent) and (old is not None or ancestor is None)
        source = next((part for part in lent if part.donor), lent[0])
        rows = (start // row_elements, stop // row_elements) if row_elements else source.rows
        yield MixedPart(
            rows=rows,
            role=source.role,
            base=source.base,
            donor=source.donor if is_mixed else None,
            donor_name=source.donor_name if is_mixed else None,
            donor_rows=source.donor_rows if is_mixed else None,
            donors=tuple(part.donor for part in lent),
            ancestor=old,
        )


def _cut_alike(
    lists: Sequence[Sequence[Part]],
) -> Iterator[tuple[int, int, list[tuple[Part, int]]]]:
    """Stretches of elements within which no list changes parts.

    Each with the part of every list that holds it, and where in that part it begins.
    """
    places = [0] * len(lists)
    starts = [0] * len(lists)
    position = 0
    while all(place < len(parts) for place, parts in zip(places, lists, strict=True)):
        current = [parts[place] for place, parts in zip(places, lists, strict=True)]
        ends = [start + part.base.elements for start, part in zip(starts, current, strict=True)]
        stop = min(ends)
        offsets = [position - start for start in starts]
        yield position, stop, list(zip(current, offsets, strict=True))
        position = stop
        for i, end in enumerate(ends):
            if end == stop:
                places[i] += 1
                starts[i] = stop


def _slice(part: Part, first: int, count: int) -> Part:
    """Some elements of a part, which are whole rows."""
    if (first, count) == (0, part.base.elements):
        return part
    donor_rows = part.donor_rows
    if donor_rows is not None:
        row = part.base.elements // (donor_rows[1] - donor_rows[0])
        donor_rows = (donor_rows[0] + first // row, donor_rows[0] + (first + count) // row)
    return Part(
        part.rows,
        part.role,
        part.base.flat_slice(first, count),
        part.donor.flat_slice(first, count) if part.donor else None,
        part.donor_name,
        donor_rows,
    )


def _merge_notes(plans: Sequence[Plan], ancestor: Plan | None) -> Iterator[str]:
    """The notes of every plan, each once; those of further models with their name."""
    told = set(plans[0].notes)
    yield from plans[0].notes
    for plan in (*plans[1:], *([ancestor] if ancestor else [])):
        for note in plan.notes:
            if note not in told:
                told.add(note)
                yield f"{plan.donor.name}: {note}"


def _note_lost_rows(steps: Sequence[Step]) -> Iterator[str]:
    """Which rows stay the base's because the ancestor lacks them."""
    for step in steps:
        lost = sum(
            part.rows[1] - part.rows[0]
            for part in step.parts
            if isinstance(part, MixedPart) and any(part.donors) and part.donor is None
        )
        if lost:
            yield f"{step.name}: {lost} rows are not in the ancestor and stay the base's"
