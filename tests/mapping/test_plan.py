"""The join's rules on small decoders, and a plan as data; families are in `test_families.py`."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import pytest
from described import NO_TAKER, described, step_of, whole
from families import (
    DecoderDims,
    Family,
    llama_decoder,
    mplug_decoder,
    rotary_buffers,
    typed,
    write_headers,
)

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import FormatError, MappingError
from lowmem_adamms.mapping import alphas
from lowmem_adamms.mapping.join import make_plan, step_kind
from lowmem_adamms.mapping.plan import Plan

Put: TypeAlias = Callable[..., Checkpoint]
Small: TypeAlias = Callable[..., Plan]

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a checkpoint without data: a name, tensors, and more of config.json."""

    def write(name: str, tensors: Any, **config: Any) -> Checkpoint:
        config = {"architectures": ["LlamaForCausalLM"], **config}
        write_headers(tmp_path / name, Family(name, config, tensors))
        return open_checkpoint(tmp_path / name)

    return write


@pytest.fixture
def small(put: Put) -> Callable[..., Plan]:
    """Plans two small decoders: changes of SMALL, tokens by id, and whether the config ties."""

    def write(name: str, change: Any, tokens: list[str] | None, tied: bool | None) -> Checkpoint:
        tensors = (
            change if "norm.weight" in str(change) else llama_decoder(replace(SMALL, **change))
        )
        config = {} if tied is None else {"tie_word_embeddings": tied}
        checkpoint = put(name, tensors, **config)
        if tokens:
            ids = {token: i for i, token in enumerate(tokens)}
            (checkpoint.path / "vocab.json").write_text(json.dumps(ids))
        return checkpoint

    def make(
        base: Any = MappingProxyType({}),
        donor: Any = MappingProxyType({}),
        *,
        tokens: tuple[Any, Any] = (None, None),
        tied: tuple[bool | None, bool | None] = (None, None),
        **options: Any,
    ) -> Plan:
        sides = (write("base", base, tokens[0], tied[0]), write("donor", donor, tokens[1], tied[1]))
        return make_plan(*sides, **options)

    return make


def test_kinds_of_roles() -> None:
    kinds = {
        "embed": "embedding",
        "head": "head",
        "norm": "norm",
        "layers.10.attn.k_norm.weight": "attention",
        "layers.3.mlp.gate.weight@vision": "MLP",
        "layers.3.attn_norm.weight@text": "norm",
    }
    assert {role: step_kind(role) for role in kinds} == kinds


# Tied heads; what counts as tied is in test_tied_head.py


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_tied_base_has_no_head_to_write(small: Small, on_disk: bool) -> None:
    """Transformers refuses to tie a head that differs from the embedding, which a blend makes."""
    plan = small({"tied": not on_disk}, tied=(True, None))
    assert HEAD not in {step.name for step in plan.steps}
    assert plan.counts == {"interpolate": 20, "copy": 0}
    assert described(plan, EMBED) == whole("embed", 20, EMBED)
    left_out = f"{HEAD} is left out: the base ties its head to the embedding"
    assert (left_out in plan.notes) == on_disk
    assert plan.leftover == {HEAD: NO_TAKER}


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_tied_donor_lends_its_embedding_as_head(small: Small, on_disk: bool) -> None:
    plan = small({"vocab": 24}, {"tied": not on_disk}, tied=(False, True))
    for name, role in ((HEAD, "head"), (EMBED, "embed")):
        assert described(plan, name) == [
            ((0, 20), role, EMBED, (0, 20)),
            ((20, 24), role, None, None),
        ]
    assert step_of(plan, HEAD).reason == (
        "tied donor lends its embedding; rows by position: 20 shared, 0 of them moved, 4 kept"
    )
    assert plan.leftover == ({HEAD: NO_TAKER} if on_disk else {})


def test_a_donor_that_says_nothing_lends_its_embedding_if_it_has_no_head(small: Small) -> None:
    assert described(small(donor={"tied": True}), HEAD) == whole("head", 20, EMBED)


# Embedding and head by token


def test_rows_follow_their_tokens(small: Small) -> None:
    tokens = (["a", "b", "c", "<box>", "d"], ["a", "b", "<image>", "d", "c"])
    plan = small(donor={"vocab": 10}, tokens=tokens)
    for name, role in ((EMBED, "embed"), (HEAD, "head")):
        assert described(plan, name) == [
            ((0, 2), role, name, (0, 2)),
            ((2, 3), role, name, (4, 5)),
            ((3, 4), role, None, None),
            ((4, 5), role, name, (3, 4)),
            ((5, 20), role, None, None),
        ]
        assert step_of(plan, name).reason == "rows by token: 4 shared, 2 of them moved, 16 kept"
    count = {"shared": 4, "moved": 2, "kept": 16}
    assert plan.to_json()["tokens"] == {EMBED: count, HEAD: count}
    assert plan.notes == ()


def test_no_token_in_common_leaves_the_rows_alone(small: Small) -> None:
    plan = small(tokens=(["a", "b"], ["x", "y"]))
    assert described(plan, HEAD) == [((0, 20), "head", None, None)]
    assert step_of(plan, "model.layers.0.mlp.up_proj.weight").action == "interpolate"
    assert plan.leftover == {EMBED: NO_TAKER, HEAD: NO_TAKER}


@pytest.mark.parametrize("tokens", [(["a", "b"], None), (None, ["a", "b"])])
def test_a_tokenizer_on_one_side_only_is_of_no_use(small: Small, tokens: Any) -> None:
    plan = small(donor={"vocab": 16}, tokens=tokens)
    assert described(plan, HEAD) == [
        ((0, 16), "head", HEAD, (0, 16)),
        ((16, 20), "head", None, None),
    ]
    (note,) = plan.notes
    assert "first 16 rows" in note and "assumed" in note and "4 are kept" in note


def test_a_broken_tokenizer_is_refused(small: Small, tmp_path: Path) -> None:
    plan = small(tokens=(["a", "b"], ["a", "b"]))
    (tmp_path / "donor" / "vocab.json").write_text("{")
    with pytest.raises(FormatError, match=str(tmp_path / "donor")):
        make_plan(plan.base, plan.donor)


def test_shared_ids_limit_what_is_joined_by_position(put: Put) -> None:
    """Mistral's 32000 of 32008 rows are pretrained; the rest each descendant used as it liked."""
    tensors = llama_decoder(replace(SMALL, vocab=32008))
    model = put("model", tensors, architectures=["MistralForCausalLM"])
    assert described(make_plan(model, model), EMBED) == [
        ((0, 32000), "embed", EMBED, (0, 32000)),
        ((32000, 32008), "embed", None, None),
    ]


@pytest.mark.parametrize("head_first", [True, False])
def test_a_head_with_fewer_rows_than_the_embedding(small: Small, head_first: bool) -> None:
    """Mllama has 8 more rows in its embedding; which of the two comes first on disk is chance."""
    rest = {name: spec for name, spec in llama_decoder(SMALL).items() if name != HEAD}
    head = typed("", "BF16", {HEAD: (16, 8)})
    tensors = head | rest if head_first else rest | head
    plan = small(tensors, tensors)
    assert described(plan, EMBED) == whole("embed", 20, EMBED)
    assert described(plan, HEAD) == whole("head", 16, HEAD)


def test_moved_rows_end_where_a_short_head_does(small: Small) -> None:
    """Tokens 4 to 19 of the base are 0 to 15 of the donor, 0 to 3 are 16 to 19."""
    full = llama_decoder(SMALL)
    short = full | typed("", "BF16", {HEAD: (16, 8)})
    tokens = [f"t{i}" for i in range(20)]
    moved = [*tokens[4:], *tokens[:4]]
    plan = small(short, full, tokens=(tokens, moved))
    assert step_of(plan, HEAD).reason == "rows by token: 16 shared, 16 of them moved, 0 kept"
    assert described(plan, HEAD) == [
        ((0, 4), "head", HEAD, (16, 20)),
        ((4, 16), "head", HEAD, (0, 12)),
    ]
    assert described(small(full, short, tokens=(tokens, moved)), HEAD) == [
        ((0, 4), "head", None, None),
        ((4, 20), "head", HEAD, (0, 16)),
    ]


def test_embeddings_can_be_kept(small: Small) -> None:
    plan = small(embeddings="keep")
    for name, role in ((EMBED, "embed"), (HEAD, "head")):
        assert described(plan, name) == [((0, 20), role, None, None)]
        assert step_of(plan, name).reason == "kept, as asked for"
    assert plan.counts == {"interpolate": 19, "copy": 2}
    assert set(plan.leftover) == {EMBED, HEAD}
    assert plan.options["embeddings"] == "keep"
    assert plan.notes == ()  # nothing was assumed of tokens


# What does not belong together


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "layer counts differ: {base} has 2 decoder layers, {donor} has 3; "),
        (
            {"hidden": 16},
            rf"widths differ: {EMBED} in {{base}} is \[20, 8\], {EMBED} in {{donor}} is \[20, 16\]",
        ),
        (
            {"intermediate": 13},
            r"shapes differ for layers\.0\.mlp\.gate\.weight: model\.\S+\.gate_proj\.weight in"
            r" {base} is \[12, 8\], model\.\S+ in {donor} is \[13, 8\]",
        ),
    ],
)
def test_sizes_that_differ_are_refused_with_names(
    small: Small, tmp_path: Path, change: Any, message: str
) -> None:
    wanted = message.format(base=tmp_path / "base", donor=tmp_path / "donor")
    with pytest.raises(MappingError, match=wanted):
        small(donor=change)


def test_what_only_one_side_has_stops_the_plan(small: Small) -> None:
    with pytest.raises(MappingError) as caught:
        small({"bias": True}, {"qk_norm": True})
    found = re.sub(r"/\S+/", "", str(caught.value))
    name = "model.layers.0.self_attn."
    assert found == (
        f"base has {name}q_proj.bias, {name}k_proj.bias, {name}v_proj.bias and 3 more, donor lacks"
        f" that; donor has {name}q_norm.weight, {name}k_norm.weight and 2 more, base lacks that;"
        " declare with `arch` how they are spelled if they belong together, or keep the base's"
        " with `unmatched='keep'`"
    )


def test_what_only_one_side_has_stays_the_bases_if_the_user_says_so(small: Small) -> None:
    plan = small({"bias": True}, {"qk_norm": True}, unmatched="keep")
    assert any("and 3 more" in note and "the base's are kept" in note for note in plan.notes)
    assert plan.options["unmatched"] == "keep"
    name = "model.layers.0.self_attn.q_proj.bias"
    assert described(plan, name) == [((0, 8), "layers.0.attn.q.bias", None, None)]
    assert step_of(plan, name).reason == "no counterpart in the donor"
    assert set(plan.leftover) == {
        f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in (0, 1) for part in "qk"
    }


def test_misfits_are_listed_where_they_are_allowed(small: Small) -> None:
    """As for a comparison: what does not fit stays the base's, the rest is joined."""
    plan = small(donor={"intermediate": 13}, allow_misfits=True)
    assert [text.partition(":")[0] for text in plan.misfits] == [
        f"shapes differ for layers.{layer}.mlp.{part}.weight"
        for layer in (0, 1)
        for part in ("gate", "up", "down")
    ]
    step = step_of(plan, "model.layers.1.mlp.down_proj.weight")
    assert (step.action, step.reason) == ("copy", "another shape in the donor")
    assert plan.counts == {"interpolate": 15, "copy": 6}
    plan = small(donor={"layers": 3, "hidden": 16}, allow_misfits=True)
    assert plan.misfits[0].startswith("layer counts differ")
    assert plan.counts["interpolate"] == 0
    assert small(allow_misfits=True).misfits == ()


def test_no_decoder_on_either_side_is_refused(put: Put) -> None:
    model = put("model", llama_decoder(SMALL))
    other = put("other", {"encoder.weight": ("F32", (2, 2))})
    for pair in ((model, other), (other, model)):
        with pytest.raises(MappingError, match=f"{other.path}: no decoder found"):
            make_plan(*pair)


@pytest.mark.parametrize("shape", [(), (20, 8, 1)])
def test_an_embedding_that_is_no_matrix_is_a_misfit(small: Small, shape: tuple[int, ...]) -> None:
    odd = llama_decoder(SMALL) | typed("", "BF16", {EMBED: shape})
    for sides in ({"base": odd}, {"donor": odd}):
        with pytest.raises(MappingError, match=f"widths differ: {EMBED}"):
            small(**sides)
    assert small(odd, odd).counts["copy"] == 0


@pytest.mark.parametrize("side", ["base", "donor"])
def test_decoder_weights_that_are_no_floats_are_refused_by_name(small: Small, side: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    integers = llama_decoder(SMALL) | {name: ("I64", (12, 8))}
    with pytest.raises(
        FormatError, match=rf"{side}: model\.layers\.1\.mlp\.up_proj\.weight is I64"
    ):
        small(**{side: integers})


def test_an_unknown_family_is_planned_and_the_plan_says_so(put: Put) -> None:
    base = put("base", llama_decoder(SMALL), architectures=["LlamaForCausalLM"])
    foreign = llama_decoder(SMALL, "foo.bar.", "foo.bar.lm_head") | {
        "foo.eyes.weight": ("BF16", (3, 3))
    }
    other = put("other", foreign, architectures=["FooForCausalLM"])
    plan = make_plan(base, other)
    assert any(re.match("donor: .*FooForCausalLM.*'foo.bar.'", note) for note in plan.notes)
    assert plan.counts == {"interpolate": 21, "copy": 0}
    assert plan.leftover == {"foo.eyes.weight": "no known role"}
    back = make_plan(other, base)
    assert any(note.startswith("base: ") for note in back.notes)
    assert described(back, "foo.eyes.weight") == [((0, 3), None, None, None)]


# Output dtype


def test_dtype_changes_floating_tensors_only(put: Put) -> None:
    """Not rotary buffers, not integers, not float64."""
    tensors = llama_decoder(SMALL) | rotary_buffers(SMALL)
    tensors |= {
        "visual.patch_embed.weight": ("F16", (4, 2)),
        "visual.norm.weight": ("F32", (4,)),
        "visual.position_ids": ("I64", (4,)),
        "visual.table": ("F64", (4,)),
    }
    model = put("model", tensors)
    kept = make_plan(model, model)
    assert all(step.dtype.name == tensors[step.name][0] for step in kept.steps)
    plan = make_plan(model, model, dtype="fp16")
    dtypes = {step.name: step.dtype.name for step in plan.steps}
    assert {dtypes.pop(name) for name in rotary_buffers(SMALL)} == {"F32"}
    assert (dtypes.pop("visual.position_ids"), dtypes.pop("visual.table")) == ("I64", "F64")
    assert set(dtypes.values()) == {"F16"}
    # 4 bytes of float32 became 2 in the one norm; inputs are read as they are
    assert plan.bytes_written == kept.bytes_written - 8
    assert plan.bytes_read == kept.bytes_read
    assert plan.options["dtype"] == "F16"


# plan --json


def test_json_contract(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["cogvlm-chat-7b"], true_size["mplug-owl2-llama2-7b"])
    document = json.loads(json.dumps(plan.to_json()))
    steps = {step["name"]: step for step in document.pop("steps")}
    assert document.pop("leftover") == dict(plan.leftover)
    assert document == {
        "base": str(true_size["cogvlm-chat-7b"].path),
        "donor": str(true_size["mplug-owl2-llama2-7b"].path),
        "base_arch": "CogVLM",
        "donor_arch": "mPLUG-Owl2",
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "counts": {"interpolate": 387, "copy": 3},
        "tokens": {
            name: {"shared": 32000, "moved": 0, "kept": 0} for name in (EMBED, "lm_head.weight")
        },
        "notes": list(plan.notes),
    }
    stem = "model.layers.2.self_attn"
    name = f"{stem}.vision_expert_query_key_value.weight"
    donors = ("q_proj", "k_proj.multiway.1", "v_proj.multiway.1")
    assert steps[name] == {
        "name": name,
        "dtype": "BF16",
        "shape": [12288, 4096],
        "action": "interpolate",
        "reason": "vision copy takes the plain weight; same role",
        "parts": [
            {
                "rows": [4096 * i, 4096 * (i + 1)],
                "role": f"layers.2.attn.{part}.weight@vision",
                "donor": {"name": f"{stem}.{donor}.weight", "rows": [0, 4096]},
            }
            for i, (part, donor) in enumerate(zip("qkv", donors, strict=True))
        ],
    }
    assert steps["model.vision.boi"]["action"] == "copy"
    assert steps["model.vision.boi"]["parts"] == [{"rows": [0, 16], "role": None, "donor": None}]


def test_a_plan_shows_itself_in_one_line(small: Small) -> None:
    assert repr(small(embeddings="keep")) == (
        "<Plan: donor into base, 19 tensors interpolated, 2 copied, 2.64 kB>"
    )


def test_many_runs_of_rows_are_told_as_tokens(small: Small) -> None:
    documents = {}
    for runs in (16, 17):
        tokens = [f"t{i}" for i in range(runs)]
        step, *_ = small(tokens=(tokens, tokens[::-1])).to_json()["steps"]
        assert step["name"] == EMBED
        documents[runs] = step["parts"]
    assert len(documents[16]) == 17  # and the rows without a token
    donor = {"name": EMBED, "rows": "tokens"}
    assert documents[17] == [{"rows": "tokens", "count": 17, "role": "embed", "donor": donor}]


def test_two_orders_of_many_rows_are_two_plans(small: Small) -> None:
    """Their documents are equal: they only count such rows."""
    tokens = [f"t{i}" for i in range(20)]
    reverse = small(tokens=(tokens, tokens[::-1]))
    swapped = small(tokens=(tokens, [tokens[i ^ 1] for i in range(20)]))
    assert reverse.to_json() == swapped.to_json()
    swapped = replace(swapped, base=reverse.base, donor=reverse.donor)
    assert reverse.identity() != swapped.identity()


# Use from Python


def test_the_example_of_alphas_runs() -> None:
    assert doctest.testmod(alphas) == doctest.TestResults(failed=0, attempted=4)


def test_planning_imports_neither_torch_nor_numpy_nor_transformers(put: Put) -> None:
    dims = replace(SMALL, kv_heads=2)
    base = put("base", llama_decoder(dims))
    donor = put("donor", mplug_decoder(dims), architectures=["MPLUGOwl2LlamaForCausalLM"])
    for side in (base, donor):
        (side.path / "vocab.json").write_text('{"a": 0, "b": 1}')
    code = (
        "import sys\n"
        "from lowmem_adamms import make_plan\n"
        "assert make_plan(sys.argv[1], sys.argv[2]).counts['interpolate'] == 21\n"
        "heavy = ('torch', 'numpy', 'transformers', 'numba', 'safetensors', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base.path), str(donor.path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_paths_and_bare_files_are_planned(small: Small) -> None:
    plan = small()
    assert make_plan(str(plan.base.path), plan.donor.path).to_json() == plan.to_json()
    bare = make_plan(*(side.path / "model.safetensors" for side in (plan.base, plan.donor)))
    assert bare.counts == plan.counts
    assert sum("no config.json" in note for note in bare.notes) == 2
