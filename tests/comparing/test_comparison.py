"""Comparing two checkpoints: against plain arithmetic, both ways round, where little fits."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spelled
import tiny
import torch
from lowmem_adamms.kernels import reference
from spelled import SPELLERS

from lowmem_adamms.checkpoints.checkpoint import Checkpoint
from lowmem_adamms.comparing.comparison import Comparison, compare
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.comparing.similarity import Similarity, compare_bits
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.join import make_plan

Models = dict[str, Path]
Change = Callable[[str, torch.Tensor], "torch.Tensor | None"]
ALL = 1 << 30


def sampled(a: Path | Checkpoint, b: Path | Checkpoint, sample: int = ALL) -> Comparison:
    return compare(pair_checkpoints(a, b), sample=sample)


def rewritten(folder: Path, out: Path, tensors: tiny.Tensors) -> Path:
    """A checkpoint with other tensors beside the same sidecars."""
    return tiny.respell(folder, lambda name: None, out, extra=tensors)


def altered(folder: Path, out: Path, change: Change) -> Path:
    """A copy in which some tensors have other values (None: the same)."""
    tensors = {}
    for name, tensor in tiny.load(folder).items():
        new = change(name, tensor)
        tensors[name] = tensor if new is None else new
    return rewritten(folder, out, tensors)


def plain(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Cosine and relative distance of two lists of tensors, as the words mean."""
    x, y = (torch.cat([t.double().flatten() for t in side]) for side in (a, b))
    cosine = float(x @ y / (x.norm() * y.norm()))
    return cosine, float((x - y).norm() / x.norm())


def about(expected: tuple[float, float]) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def found(similarity: Similarity) -> tuple[float | None, float | None]:
    return similarity.cosine, similarity.distance


# Numbers


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_numbers_agree_with_plain_arithmetic(
    tiny_models: Models, tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    random = torch.Generator().manual_seed(3)

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        scale = 0.3 if "layers.1" in name else 0.01
        return (tensor.float() + scale * noise).to(getattr(torch, dtypes[1]))

    llama = tiny_models["llama"]
    a = altered(llama, tmp_path / "a", lambda _, tensor: tensor.to(getattr(torch, dtypes[0])))
    b = altered(llama, tmp_path / "b", moved)
    x, y = tiny.load(a), tiny.load(b)
    result = sampled(a, b)

    def assert_agrees(similarity: Similarity, pattern: str, count: int) -> None:
        names = [name for name in x if re.search(pattern, name)]
        assert len(names) == count
        assert found(similarity) == about(plain([x[n] for n in names], [y[n] for n in names]))
        elements = sum(x[name].numel() for name in names)
        assert similarity.read == similarity.elements == elements

    assert len(result.cells) == 2 * 8 + 3
    for layer in ("layers.0", "layers.1"):
        for kind in (*"qkvo", "gate", "up", "down"):
            assert_agrees(result.cells[layer, kind], rf"\.{layer}\..*\.{kind}_proj", 1)
        assert_agrees(result.cells[layer, "norms"], rf"\.{layer}\..*norm", 2)
        assert_agrees(result.groups[layer], rf"\.{layer}\.", 9)
    for group, pattern in (
        ("embed", "embed_tokens"),
        ("norm", r"model\.norm"),
        ("head", "lm_head"),
    ):
        assert_agrees(result.groups[group], pattern, 1)


def test_a_smaller_sample_is_spread_evenly(tiny_models: Models, tmp_path: Path) -> None:
    def ends(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if "layers.0.mlp.up" not in name:
            return None
        changed = tensor.clone().flatten()
        changed[0], changed[-512] = changed[0] + 1, changed[-512] + 1  # the last run is shorter
        return changed.view_as(tensor)

    b = altered(tiny_models["llama"], tmp_path / "b", ends)
    up = sampled(tiny_models["llama"], b, 3 * 512 - 100).cells["layers.0", "up"]
    assert (up.read, up.read - up.equal) == (3 * 512 - 100, 2)


def test_a_small_sample_lies_where_kinship_looks(tiny_models: Models) -> None:
    a, b = tiny_models["llava"], tiny_models["mplug_owl2"]
    groups: dict[str, Similarity] = {}
    for pair, similarity in sampled(a, b, kinship.RUN_ELEMENTS).items:
        if pair.shows_descent and "@" not in pair.role:
            groups[pair.group] = groups.get(pair.group, Similarity()) + similarity
    cosines = kinship.measure(make_plan(a, b)).cosines
    assert {group: s.cosine for group, s in groups.items()} == pytest.approx(cosines, rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "dtypes", "equal", "finite"),
    [
        ([0, 0x7FC0], [0x8000, 0x7FC1], ("BF16", "BF16"), 0, 1),  # -0, another NaN
        ([0x3F80, 0x7FC0], [0x3F80, 0x7FC0], ("BF16", "BF16"), 2, 1),
        ([0x3F80, 0x7FC0, 0], [0x3F800000, 0x7FC00001, 0x80000000], ("BF16", "F32"), 3, 2),
        ([0x3C00], [0x3F800001], ("F16", "F32"), 0, 1),
    ],
)
def test_equal_means_the_same_bits_or_of_two_dtypes_the_same_value(
    a: list[int], b: list[int], dtypes: tuple[str, str], equal: int, finite: int
) -> None:
    bits = [np.array(s, reference.STORAGE[d]) for s, d in zip((a, b), dtypes, strict=True)]
    similarity = compare_bits(bits[0], bits[1], dtypes)
    assert (similarity.equal, similarity.finite, similarity.read) == (equal, finite, len(a))


def test_a_cosine_stays_within_its_bounds() -> None:
    """Whatever the rounding of sums."""
    assert Similarity(finite=1, ab=1 + 1e-15, aa=1.0, bb=1.0, dd=1e-30).cosine == 1
    assert Similarity(finite=1, ab=-1 - 1e-15, aa=1.0, bb=1.0, dd=4.0).cosine == -1


def test_equal_tensors_are_called_identical(tiny_models: Models, tmp_path: Path) -> None:
    def one(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if name != "model.layers.0.self_attn.k_proj.weight":
            return None
        tensor = tensor.clone()
        tensor[3, 5] += 1
        return tensor

    llama = tiny_models["llama"]
    same = sampled(llama, llama).ancestry
    assert (same.word, same.is_shared) == ("identical", True)
    result = sampled(llama, altered(llama, tmp_path / "b", one))
    ((pair, similarity),) = ((p, s) for p, s in result.items if not s.is_identical)
    assert pair.role == "layers.0.attn.k.weight"
    assert similarity.equal == similarity.read - 1
    assert result.ancestry.word == "same ancestor"
    wide = altered(llama, tmp_path / "wide", lambda _, tensor: tensor.float())
    result = sampled(llama, wide)
    assert result.ancestry.word == "identical"
    assert all(found(similarity) == (1.0, 0.0) for similarity in result.similarities)
    assert result.a.traits["dtype"] != result.b.traits["dtype"]


def test_what_is_not_finite_is_counted_and_left_out(tiny_models: Models, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    whole = tiny.load(tiny_models["llama"])
    sick, worse = whole[name].clone(), whole[name].clone()
    sick[0, :3] = float("nan")
    worse[0, 2], worse[1] = float("inf"), float("-inf")
    a = rewritten(tiny_models["llama"], tmp_path / "a", whole | {name: sick})
    b = rewritten(tiny_models["llama"], tmp_path / "b", whole | {name: worse})
    similarity = sampled(a, b).cells["layers.0", "up"]
    columns = sick.shape[1]
    assert (similarity.nonfinite_a, similarity.nonfinite_b) == (3, 1 + columns)
    assert similarity.finite == similarity.read - 3 - columns
    assert found(similarity) == (1.0, 0.0)
    assert not similarity.is_identical
    assert sampled(a, a).ancestry.word == "identical"  # NaN of the same bits


def test_nothing_finite_has_no_cosine(tiny_models: Models, tmp_path: Path) -> None:
    nothing = altered(
        tiny_models["llama"], tmp_path / "nan", lambda _, t: torch.full_like(t, float("nan"))
    )
    result = sampled(tiny_models["llama"], nothing)
    assert {found(similarity) for similarity in result.similarities} == {(None, None)}
    assert (result.ancestry.word, result.ancestry.is_shared) == ("not comparable", None)
    assert "finite" in result.ancestry.reason
    json.dumps(result.to_json(), allow_nan=False)


def test_zeros_have_no_direction_but_zeros_are_equal(tiny_models: Models, tmp_path: Path) -> None:
    def zero(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if "o_proj" in name else None

    llama, zeroed = tiny_models["llama"], altered(tiny_models["llama"], tmp_path / "zero", zero)
    cell = ("layers.0", "o")
    assert found(sampled(zeroed, llama).cells[cell]) == (0.0, None)
    assert found(sampled(llama, zeroed).cells[cell]) == (0.0, 1.0)
    assert found(sampled(zeroed, zeroed).cells[cell]) == (1.0, 0.0)


# Spellings


@pytest.mark.parametrize("line", SPELLERS)
def test_no_spelling_hides_what_differs(line: str, tmp_path: Path) -> None:
    """The line's first family against each other one, both ways: only k of layer 0 is changed."""
    text = spelled.ancestor(line, 1)
    changed = text | {"0.k": -text["0.k"]}
    first, *others = SPELLERS[line]
    a = SPELLERS[line][first].write(tmp_path / "a", SPELLERS[line][first](text, text, 1))
    for number, family in enumerate(others, 2):
        speller = SPELLERS[line][family]
        b = speller.write(tmp_path / str(number), speller(changed, changed, number))
        for one, two in ((a, b), (b, a)):
            result = sampled(one, two)
            odd = {cell: found(s) for cell, s in result.cells.items() if not s.is_identical}
            odd.pop(("layers.0", "k@vision"), None)
            assert odd == {("layers.0", "k"): about((-1.0, 2.0))}, (family, one == a)
            assert {*"qkvo", "gate", "up", "down"} <= set(result.layer_kinds)
            assert len(result.layers) == spelled.LAYERS


def test_both_experts_are_compared_with_the_one_they_came_from(tiny_models: Models) -> None:
    a, b = tiny_models["cogvlm"], tiny_models["llama"]
    cog, llama = tiny.load(a), tiny.load(b)
    theirs = [llama["model.layers.0.mlp.up_proj.weight"]]
    forth, back = sampled(a, b), sampled(b, a)
    for kind, expert in (("up", "language"), ("up@vision", "vision")):
        ours = [cog[f"model.layers.0.mlp.{expert}_mlp.up_proj.weight"]]
        assert found(forth.cells["layers.0", kind]) == about(plain(ours, theirs))
        assert found(back.cells["layers.0", kind]) == about(plain(theirs, ours))
    for result in (forth, back):
        assert result.layer_kinds.index("down") < result.layer_kinds.index("q@vision")


def test_rows_are_joined_by_token(tiny_models: Models, tmp_path: Path) -> None:
    words = [f"word {i}" for i in range(tiny.ROWS)]
    order = torch.randperm(tiny.ROWS, generator=torch.Generator().manual_seed(1))
    a = shutil.copytree(tiny_models["llama"], tmp_path / "a")

    def shuffled(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor[order] if "embed" in name or "lm_head" in name else None

    b = altered(a, tmp_path / "b", shuffled)
    (a / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    theirs = {words[int(old)]: new for new, old in enumerate(order) if int(old) != 7}
    (b / "vocab.json").write_text(json.dumps(theirs))
    for result in (sampled(a, b), sampled(b, a)):
        assert result.groups["embed"].is_identical and result.groups["head"].is_identical
        assert result.groups["embed"].elements == (tiny.ROWS - 1) * tiny.HIDDEN
        assert result.ancestry.is_shared
        for side in (result.a, result.b):
            assert {left.what: left.totals.elements for left in side.unpaired} == {
                "rows of embed": tiny.HIDDEN,
                "rows of head": tiny.HIDDEN,
            }


def test_a_tied_side_lends_its_embedding_as_head(
    tmp_path: Path, ancestors: dict[str, tiny.Tensors]
) -> None:
    tied = tiny.make("qwen2", tmp_path / "tied", ancestor=ancestors["qwen2"], tied=True)
    own = tiny.make("qwen2", tmp_path / "own", ancestor=ancestors["qwen2"])
    for result in (sampled(tied, own), sampled(own, tied)):
        roles = {pair.role: pair for pair, _ in result.items}
        assert "embed" in roles
        names = [*roles["head"].names(0), *roles["head"].names(1)]
        assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]
    tensors = tiny.load(tied)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    (left,) = sampled(rewritten(tied, tmp_path / "copied", tensors | copy), own).a.unpaired
    assert (left.what, left.why) == ("head", "a copy of the embedding it is tied to")


def test_what_is_outside_the_decoder_is_paired_by_name(tiny_models: Models, tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return 2 * tensor if "merger" in name else None

    b = altered(tiny_models["qwen2_vl"], tmp_path / "b", change)
    result = sampled(tiny_models["qwen2_vl"], b)
    assert result.by_name["vision tower"].is_identical
    assert found(result.by_name["connector"]) == about((1.0, 1.0))
    assert result.ancestry.word == "identical"  # of the language models
    whole, mapped, named = result.a.whole, result.a.mapped, result.a.by_name
    assert whole.elements == mapped.elements + named.elements
    assert whole.tensors == mapped.tensors + named.tensors
    with_buffers = sampled(tiny_models["mplug_owl2"], tiny_models["mplug_owl2"])
    assert "rotary buffer" not in with_buffers.by_name


# Verdicts


@pytest.mark.parametrize(
    ("a", "b"), [("qwen2_5_vl", "qwen2"), ("cogvlm", "mplug_owl2"), ("qwen3", "qwen3_vl")]
)
def test_the_answer_does_not_depend_on_which_comes_first(
    tiny_models: Models, a: str, b: str
) -> None:
    forth = sampled(tiny_models[a], tiny_models[b], 4096)
    back = sampled(tiny_models[b], tiny_models[a], 4096)
    assert forth.ancestry.word == back.ancestry.word == "same ancestor"
    assert forth.ancestry.reason == back.ancestry.reason
    assert forth.cells.keys() == back.cells.keys()
    for cell, one in forth.cells.items():
        other = back.cells[cell]
        assert one.cosine == pytest.approx(other.cosine, rel=1e-12)
        assert (one.equal, one.elements) == (other.equal, other.elements)
        ratio = math.sqrt(one.aa / one.bb)  # each distance is relative to its first side
        assert (one.distance or 0) * ratio == pytest.approx(other.distance, rel=1e-9)
    for side, same in ((forth.a, back.b), (forth.b, back.a)):
        assert (side.mapped, side.whole) == (same.mapped, same.whole)
        assert sorted(map(repr, side.unpaired)) == sorted(map(repr, same.unpaired))


def test_strangers_are_a_result(tiny_models: Models, tmp_path: Path) -> None:
    stranger = tiny.make("mplug_owl2", tmp_path / "other", ancestor=tiny.ancestor("llama", seed=7))
    for a, b in ((tiny_models["cogvlm"], stranger), (stranger, tiny_models["cogvlm"])):
        result = sampled(a, b, 4096)
        assert (result.ancestry.word, result.ancestry.is_shared) == ("unrelated", False)
        assert all(
            abs(similarity.cosine or 0) < 0.2
            for (_, kind), similarity in result.cells.items()
            if "norm" not in kind
        )
        assert result.cells["layers.0", "q"].distance == pytest.approx(math.sqrt(2), abs=0.1)
        assert any("not alike" in obstacle for obstacle in result.obstacles)


def test_a_grown_model_is_related_in_part(tmp_path: Path) -> None:
    """B has A's four layers with a foreign one after the second: layers are compared by number."""
    ancestor = tiny.ancestor("llama", layers=4)
    grown = tiny.ancestor("llama", seed=5, layers=5)
    grown |= {name: tensor for name, tensor in ancestor.items() if "layers." not in name}
    for i in range(4):
        new = i if i < 2 else i + 1
        for name in [name for name in ancestor if name.startswith(f"layers.{i}.")]:
            grown[name.replace(f"layers.{i}.", f"layers.{new}.")] = ancestor[name]
    a = tiny.make("llama", tmp_path / "a", ancestor=ancestor)
    b = tiny.make("llava", tmp_path / "b", ancestor=grown)
    there, back = sampled(a, b, 4096), sampled(b, a, 4096)
    assert (there.ancestry.word, there.ancestry.is_shared) == ("related in part", None)
    assert "cosine is below 0.5 in layers.2, layers.3" in there.ancestry.reason
    assert any("layer counts differ" in obstacle for obstacle in back.obstacles)
    alone = {left.what: left.why for left in back.a.unpaired if left.in_decoder}
    assert alone["layers 4 and up"] == "4 layers there"


def test_layers_cut_off_the_end_leave_the_rest_alike(tmp_path: Path) -> None:
    """Equal, but A has more: one ancestor, not identical."""
    a = tiny.make("llama", tmp_path / "a", ancestor=tiny.ancestor("llama", layers=4))
    layers = {name: t for name, t in tiny.load(a).items() if not re.search(r"layers\.[23]", name)}
    b = rewritten(a, tmp_path / "b", layers)
    config = json.loads((a / "config.json").read_text()) | {"num_hidden_layers": 2}
    (b / "config.json").write_text(json.dumps(config))
    result = sampled(a, b)
    assert result.ancestry.word == "same ancestor"
    assert result.layers == [0, 1, 2, 3]
    assert ("layers.3", "q") not in result.cells


def test_other_widths_say_what_differs(true_size: dict[str, Checkpoint]) -> None:
    result = sampled(true_size["qwen2.5-vl-3b"], true_size["qwen2.5-vl-7b"], 16)
    assert (result.ancestry.word, result.ancestry.is_shared) == ("not comparable", None)
    assert "width 2048 against 3584" in result.ancestry.reason
    assert "decoder layers 36 against 28" in result.ancestry.reason
    assert result.a.mapped.elements == result.b.mapped.elements == 0
    gates = {left.why for left in result.b.unpaired if left.what == "gate"}
    assert gates == {"another shape there"}
    assert {left.what for left in result.a.unpaired} >= {"q", "down", "layers 28 and up", "embed"}
    assert set(result.by_name) == {"vision tower", "connector"}


def test_true_sizes_are_accounted_for(true_size: dict[str, Checkpoint]) -> None:
    """Qwen2-VL-7B and LLaVA-OneVision: all of the decoder but the rows beyond the shared tokens."""
    names = ("qwen2-vl-7b", "llava-onevision-qwen2-7b-ov-hf")
    pairing = pair_checkpoints(*(true_size[name] for name in names))
    decoder = 7_615_616_512  # Qwen2-7B
    missing = 2 * (152064 - 151646) * 3584
    for side in (pairing.a, pairing.b):
        assert side.mapped.elements == decoder - missing
        assert side.mapped.tensors == 28 * 12 + 3
        alone = sum(left.totals.elements for left in side.unpaired)
        assert side.mapped.elements + side.by_name.elements + alone == side.whole.elements
    assert {left.what for left in pairing.b.unpaired} == {
        *("vision tower", "connector", "image newline", "rows of embed", "rows of head")
    }


def test_a_folder_without_a_decoder_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    tower = rewritten(tiny_models["llama"], tmp_path / "tower", {"visual.w": torch.zeros(4, 4)})
    with pytest.raises(MappingError, match="no decoder found"):
        pair_checkpoints(tiny_models["llama"], tower)


# JSON


def test_the_document_has_one_form(tiny_models: Models) -> None:
    result = sampled(tiny_models["cogvlm"], tiny_models["llava"], 700)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))

    def keys(*path: Any) -> str:
        found = document
        for key in path:
            found = found[key]
        return " ".join(found)

    numbers = "elements read equal identical cosine distance norms not_finite"
    assert (
        keys() == "a b sample verdict obstacles differs decoder kinds groups by_name tensors notes"
    )
    assert keys("verdict") == "word same_ancestor reason threshold lowest"
    assert keys("verdict", "lowest") == "group cosine"
    for side in "ab":
        assert keys(side) == "name path arch traits whole mapped by_name only"
        assert keys(side, "mapped") == "tensors elements bytes"
        assert keys(side, "only", 0) == "what why tensors elements bytes"
    assert keys("decoder") == keys("kinds", "q") == numbers
    assert keys("groups", "layers.0") == f"{numbers} kinds"
    assert keys("tensors", 0) == f"role a b {numbers}"
    assert set(document["groups"]) == {"embed", "norm", "head", "layers.0", "layers.1"}
    assert set(document["groups"]["layers.0"]["kinds"]) == set(result.layer_kinds)
    assert (document["sample"], document["verdict"]["same_ancestor"]) == (700, True)
    assert len(document["tensors"]) == len(result.similarities)
    fused = next(t for t in document["tensors"] if t["role"] == "layers.0.attn.q.weight")
    assert fused["a"] == ["model.layers.0.self_attn.language_expert_query_key_value.weight"]
