"""A decoder under a given prefix, read with the declaration that explains most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .arch import Arch
from .families import UNDECLARED
from .layout import Layout, read_layout
from .names import Fit, Stem, measure_fit, read_stem


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An Arch that fits what is under a prefix; the best has the highest rank."""

    rank: tuple[int, ...]
    arch: Arch
    fit: Fit


class Reader:
    """Reads a checkpoint under any prefix; keeps the names under each prefix that is asked for."""

    def __init__(self, checkpoint: Checkpoint, archs: Sequence[Arch]) -> None:
        """archs: the declarations whose spellings are tried."""
        self.checkpoint = checkpoint
        self._archs = (*archs, UNDECLARED)
        self._stems: dict[str, Stem] = {}

    def stem(self, prefix: str) -> Stem:
        """What begins with a prefix."""
        if prefix not in self._stems:
            self._stems[prefix] = read_stem(self.checkpoint, prefix)
        return self._stems[prefix]

    def _has_embedding(self, prefix: str, arch: Arch) -> bool:
        """Whether there can be a decoder: a quick look, before the names are taken apart."""
        return any(f"{prefix}{name}" in self.checkpoint.tensors for name in arch.embed_names)

    def read(self, arch: Arch, prefix: str, head: str) -> Layout | None:
        """The layout as an Arch has it; None if that does not fit."""
        if not self._has_embedding(prefix, arch):
            return None
        return read_layout(self.checkpoint, arch, head, self.stem(prefix))

    def read_best(
        self, prefix: str, first: Sequence[Arch] = (), head: str = ""
    ) -> tuple[Arch, Layout] | None:
        """The Arch that explains most of what is under a prefix, and the layout by it.

        Of equals, those of `first`. MappingError if two others explain as much, but not the same;
        or if the sizes of fused tensors do not fit the only one that finds all that is essential.
        """
        best: tuple[_Candidate, Layout] | None = None
        misfit: MappingError | None = None
        for candidate in self._rank(prefix, first):
            if best and candidate.rank < best[0].rank:
                break
            if best and candidate.fit.unused != best[0].fit.unused:  # it names what is not there
                continue
            try:
                layout = self.read(candidate.arch, prefix, head)
            except MappingError as error:
                if candidate.fit.is_complete:
                    raise
                misfit = misfit or error
                continue
            assert layout is not None  # else it would not be ranked
            if best:
                _check_same(self.checkpoint, best[1], layout)
            else:
                best = candidate, layout
        if misfit and not best:
            raise misfit
        return (best[0].arch, best[1]) if best else None

    def _rank(self, prefix: str, first: Sequence[Arch]) -> list[_Candidate]:
        """The spellings that fit under a prefix, the best first; of equals, those of `first`."""
        own = {_spelling(arch) for arch in first}
        archs: dict[tuple[object, ...], Arch] = {}
        for arch in (*first, *self._archs):
            archs.setdefault(_spelling(arch), arch)
        found = []
        for spelling, arch in archs.items():
            if not self._has_embedding(prefix, arch):
                continue
            fit = measure_fit(self.stem(prefix), arch)
            if not fit.missing:
                rank = (*fit.score, spelling in own, arch is not UNDECLARED)
                found.append(_Candidate(rank, arch, fit))
        return sorted(found, key=lambda candidate: candidate.rank, reverse=True)


def _spelling(arch: Arch) -> tuple[object, ...]:
    """What two families that spell their decoders alike have in common."""
    return id(arch.decoder), arch.interleaved, arch.head_dim


def _check_same(checkpoint: Checkpoint, first: Layout, second: Layout) -> None:
    for name, blocks in first.blocks.items():
        if second.blocks.get(name) != blocks:
            raise MappingError(
                f"{checkpoint.path}: fits a {first.arch} and a {second.arch} decoder, which differ"
                f" in what {name} holds; declare which it is with `arch`"
            )
