"""What an architecture is, as data: which roles the tensors of a family hold.

Roles: `embed`, `norm`, `head`, and for each layer `layers.N.` + one of
`attn.{q,k,v,o}.{weight,bias}`, `attn.{q,k}_norm.weight`, `mlp.{gate,up,down}.{weight,bias}`,
`attn_norm.weight`, `mlp_norm.weight` (and `attn_post_norm.weight`, `mlp_post_norm.weight` where a
layer norms what it adds as well). Of experts, for each expert K:
`mlp.experts.K.{gate,up,down}.{weight,bias}`, beside `mlp.router.{weight,bias,correction_bias}`,
`mlp.shared_expert.{gate,up,down}.weight` and `mlp.shared_expert_gate.weight`. Any other tensor of
the decoder is a role by its own name, such as `layers.N.linear_attn.A_log`: two decoders that are
spelled alike need no declaration. A stream may follow: `@text`, `@vision` (a copy that only those
tokens use), `@vision_expert` (what only visual tokens use and is no copy).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from .experts import EXPERT_ROLES
from .respelling import FUSED, respell

BUFFER = "rotary buffer"
UNKNOWN = "no known role"
_OTHER_PARTS = (
    ("cross-attention layer", "cross_attn"),
    ("multi-token prediction", r"(^|\.)mtp(\b|_)"),
    ("talker", "talker|token2wav|code2wav|codec|depth_decoder"),
    ("action expert", r"action|gemma_expert|\bdit\b"),
    ("image newline", "newline"),
    (
        "connector",
        r"projector|connector|merger|resampler|abstractor|mm_|view_sep|linear_proj|\bvte\b|\bmlp1\b"
        "|image_pooling|pad_embed",
    ),
    ("audio tower", "audio|speech|acoustic"),
    (
        "vision tower",
        r"vision|visual|image|video|patch|\bvit|\bvpm\b|\bsam_|siglip|clip|pos_embed|vqmodel",
    ),
)
"""What a tensor outside the decoder is by a word in its name, where no declaration tells."""
_COMMON_NAMES = {
    f"layers.#.{name}": " ".join(f"layers.#.{role}" for role in roles.split())
    for name, roles in {**EXPERT_ROLES, **FUSED}.items()
}


@dataclass(frozen=True, slots=True)
class Arch:
    """One family of checkpoints.

    Attributes:
        name: What it is called in plans.
        source: Where its names come from.
        classes: What `architectures` in config.json may say.
        spellings: Pairs of the decoder's prefix and the head's full name, as found on disk.
        decoder: Tensor name after the prefix, layer number written `#` and expert number `*`, to
            the roles it holds in memory order: space-separated when fused, empty for a buffer that
            is never blended. Several names may stand for one role. A name without `*` whose roles
            have it is a stack of all experts; of a name with `*` and several roles, each role is
            that of an equal share of the experts. What is not named is a role by its own name.
        others: Prefixes of all other tensors, and what they are; with `#`, of what layers have
            that the ancestor's lack.
        shared_ids: How many leading token ids all descendants of its ancestor share.
        interleaved: Those fused names of `decoder` in which q, k and v alternate head by head (the
            query rows of one key-value head, its key's, its value's, then the next head's), or gate
            and up of stacked experts row by row.
        head_dim: Rows of a head, for these, where config.json does not tell.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]
    decoder: Mapping[str, str]
    others: Mapping[str, str] = field(default_factory=dict)
    shared_ids: int | None = None
    interleaved: tuple[str, ...] = ()
    head_dim: int | None = None

    @property
    def embed_names(self) -> list[str]:
        """What the embedding may be called after the prefix."""
        return [name for name, roles in self.decoder.items() if roles == "embed"]

    def roles_of(self, key: str, stacks: Collection[str]) -> str | None:
        """The roles that a name holds, as declared or as all families have it; None if neither.

        stacks: those of the decoder's layers.
        """
        roles = self.decoder.get(key)
        stack, in_layer, rest = key.partition("#.")
        if roles is not None or (in_layer and stack not in stacks):
            return roles
        if not in_layer:
            return self.decoder.get(respell(key))
        for name in (f"layers.#.{rest}", f"layers.#.{respell(rest)}"):
            roles = self.decoder.get(name, _COMMON_NAMES.get(name))
            if roles is not None:
                break
        return roles

    def kind_in_layer(self, key: str) -> str | None:
        """What a tensor of a layer is that the ancestor's layers lack, if `others` says so."""
        kinds = (kind for name, kind in self.others.items() if "#" in name and key.startswith(name))
        return next(kinds, None)

    def kind_outside(self, name: str) -> str:
        """What a tensor outside the decoder is: the longest declared prefix wins."""
        if is_buffer(name):
            return BUFFER
        prefixes = [prefix for prefix in self.others if name.startswith(prefix)]
        return self.others[max(prefixes, key=len)] if prefixes else UNKNOWN

    def respelled(self, other: Arch) -> Arch:
        """The same family around a decoder that is spelled as another's."""
        return replace(
            self,
            spellings=self.spellings if other.spellings else (),
            decoder=other.decoder,
            interleaved=other.interleaved,
            head_dim=other.head_dim,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `declare.parse_declaration` reads. What has its default is left out."""
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value or each.default is MISSING:
                values[each.name] = _to_lists(value)
        return values


def _to_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


# What is no part of the decoder


def is_buffer(name: str) -> bool:
    """Whether a tensor is a rotary buffer, which no merge blends."""
    return name.endswith("rotary_emb.inv_freq")


def guess_kind(name: str) -> str | None:
    """What a tensor outside the decoder may be by a word in its name."""
    return next((kind for kind, words in _OTHER_PARTS if re.search(words, name)), None)
