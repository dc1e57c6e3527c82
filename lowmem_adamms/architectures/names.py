"""The tensor names under a prefix, and how well an architecture explains them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from .arch import Arch
from .experts import EXPERT

ESSENTIAL = (
    *("attn_norm.weight", "mlp_norm.weight"),
    *(f"attn.{part}.weight" for part in "qkvo"),
    *(f"mlp.{part}.weight" for part in ("gate", "up", "down")),
)
"""What nearly every layer has: a decoder is read in the way that finds most of these."""
_FOREIGN_LAYERS = {
    "layers.#.eh_proj.weight": "multi-token prediction",
    "layers.#.cross_attn.q_proj.weight": "cross-attention layer",
    "layers.#.encoder_attn.q_proj.weight": "cross-attention layer",
}
"""By what sign layers are known that no decoder-only ancestor has."""
_LAYER = re.compile(r"([A-Za-z_.]+\.)(0|[1-9][0-9]{0,5})\.(.+)")
_EXPERT = re.compile(r"(?<=experts\.)(0|[1-9][0-9]{0,5})(?=\.)")


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name after a prefix, taken apart.

    key: as a declaration would spell it, its first number written `#`, an expert's EXPERT. stack
    and number: such as `layers.` and 3, or an empty stack outside of layers. expert: its number,
    if it is of one.
    """

    full: str
    key: str
    stack: str = ""
    number: int = 0
    expert: str = EXPERT


@dataclass(frozen=True, slots=True)
class Stem:
    """What of a checkpoint begins with a prefix.

    foreign: by stack and number, what a layer is that is none of the ancestor's; such layers lie
    between those of the ancestor, which are numbered without them. counts: how many names have a
    key, foreign layers left out. layers: the numbers that occur in each stack, as the ancestor has
    them.
    """

    prefix: str
    names: Sequence[Name]
    counts: Mapping[str, int]
    layers: Mapping[str, Collection[int]]
    foreign: Mapping[tuple[str, int], str]

    def find_embedding(self, arch: Arch) -> str | None:
        """The first of the names that an Arch gives the embedding which is there."""
        return next((name for name in arch.embed_names if name in self.counts), None)

    def stacks_of(self, arch: Arch) -> frozenset[str]:
        """The stacks of layers that an Arch declares; of one without spellings, the deepest."""
        declared = {key.partition("#")[0] for key in arch.decoder if "#" in key}
        beside = [stack for stack in self.layers if stack.count(".") == 1]
        if arch.spellings or not beside or not declared.isdisjoint(beside):
            return frozenset(declared)
        return frozenset([max(beside, key=lambda stack: len(self.layers[stack]))])

    def is_foreign(self, name: Name) -> bool:
        """Whether a name is in a layer that the ancestor lacks."""
        return (name.stack, name.number) in self.foreign

    def ancestors_number(self, stack: str, number: int) -> int:
        """The number that a layer has in the ancestor."""
        return number - sum(other == stack and before < number for other, before in self.foreign)


def read_stem(checkpoint: Checkpoint, prefix: str) -> Stem:
    """Take apart the names that begin with a prefix."""
    names = [_take_apart(full, prefix) for full in checkpoint.tensors if full.startswith(prefix)]
    foreign = {
        (name.stack, name.number): _FOREIGN_LAYERS[name.key]
        for name in names
        if name.key in _FOREIGN_LAYERS
    }
    layers: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    stem = Stem(prefix, names, counts, layers, foreign)
    own = [name for name in names if not stem.is_foreign(name)] if foreign else names
    counts.update(name.key for name in own)
    for stack, number in {(name.stack, name.number) for name in own if name.stack}:
        layers.setdefault(stack, set()).add(stem.ancestors_number(stack, number))
    return stem


def _take_apart(full: str, prefix: str) -> Name:
    suffix = full[len(prefix) :]
    layer = _LAYER.match(suffix)
    if layer is None:
        return Name(full, suffix)
    stack, number, rest = layer.groups()
    expert = _EXPERT.search(rest)
    if expert:
        rest = f"{rest[: expert.start()]}{EXPERT}{rest[expert.end() :]}"
    # One string in memory for thousands of experts
    key, stack = sys.intern(f"{stack}#.{rest}"), sys.intern(stack)
    return Name(full, key, stack, int(number), expert[0] if expert else EXPERT)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well an Arch explains the names under a prefix.

    essential: how many of the ESSENTIAL roles it finds. undeclared: how many tensors of the layers
    it does not name. unused: how many names it has that do not occur. missing: the first that is
    not there of what no decoder can do without.
    """

    essential: int
    undeclared: int
    unused: int
    layers: int
    missing: str | None

    @property
    def score(self) -> tuple[int, int]:
        """How much it explains: the greater, the better."""
        return self.essential, -self.undeclared

    @property
    def is_complete(self) -> bool:
        """Whether each layer has all that is essential."""
        return self.essential >= self.layers * len(ESSENTIAL)


def measure_fit(stem: Stem, arch: Arch) -> Fit:
    """Tell how well an Arch explains what is under a prefix."""
    stacks = stem.stacks_of(arch)
    layers = {number for stack in stacks for number in stem.layers.get(stack, ())}
    essential = undeclared = 0
    for key, count in stem.counts.items():
        roles = arch.roles_of(key, stacks)
        if roles is not None:
            essential += count * sum(map(_count_essential, roles.split()))
        elif key.partition("#")[0] in stacks and arch.kind_in_layer(key) is None:
            undeclared += count
    missing = None
    if stem.find_embedding(arch) is None:
        missing = f"{stem.prefix}{arch.embed_names[0]}"
    elif gaps := set(range(max(layers, default=0) + 1)) - layers:
        missing = f"{stem.prefix}{min(stacks, default='layers.')}{min(gaps)}."
    unused = len(arch.decoder.keys() - stem.counts.keys())
    return Fit(essential, undeclared, unused, len(layers), missing)


def _count_essential(role: str) -> int:
    """How many ESSENTIAL roles a role stands for: a router for a whole MLP."""
    plain = role.partition("@")[0].removeprefix("layers.#.")
    return 3 if plain == "mlp.router.weight" else int(plain in ESSENTIAL)
