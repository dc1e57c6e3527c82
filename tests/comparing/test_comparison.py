"""Comparing two checkpoints: against plain arithmetic, both ways round, where little fits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spelled
import tiny
import torch
from spelled import SPELLERS

from lowmem_adamms.checkpoints.checkpoint import Checkpoint
from lowmem_adamms.comparing import pairing
from lowmem_adamms.comparing import similarity as likeness
from lowmem_adamms.comparing.comparison import Comparison, Run, bytes_read, compare
from lowmem_adamms.comparing.similarity import Measure
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping import kinship

Models = dict[str, Path]
Change = Callable[[str, torch.Tensor], "torch.Tensor | None"]


def full(a: Path | Checkpoint, b: Path | Checkpoint) -> Comparison:
    return compare(pairing.join(a, b), sample=None)


def sampled(a: Path | Checkpoint, b: Path | Checkpoint, sample: int = 4096) -> Comparison:
    return compare(pairing.join(a, b), sample=sample)


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


def found(measure: Measure) -> tuple[float | None, float | None]:
    return measure.cosine, measure.distance


# Numbers

SINGLES = {
    "embed": ["model.embed_tokens.weight"],
    "norm": ["model.norm.weight"],
    "head": ["lm_head.weight"],
}


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_everything_read_agrees_with_plain_arithmetic(
    tiny_models: Models, tmp_path: Path, dtypes: tuple[str, str]
) -> None:
    random = torch.Generator().manual_seed(3)

    def as_dtype(name: str) -> Change:
        return lambda _, tensor: tensor.to(getattr(torch, name))

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        scale = 0.3 if "layers.1" in name else 0.01
        return (tensor.float() + scale * noise).to(getattr(torch, dtypes[1]))

    a = altered(tiny_models["llama"], tmp_path / "a", as_dtype(dtypes[0]))
    b = altered(tiny_models["llama"], tmp_path / "b", moved)
    x, y = tiny.load(a), tiny.load(b)
    result = full(a, b)
    for (group, kind), measure in result.cells.items():
        names = SINGLES.get(group) or [
            name
            for name in x
            if f".{group}." in name and ("norm" if kind == "norms" else f".{kind}_proj.") in name
        ]
        assert len(names) == (2 if kind == "norms" else 1)
        assert found(measure) == about(plain([x[n] for n in names], [y[n] for n in names]))
        assert measure.read == measure.total == sum(x[name].numel() for name in names)
    assert len(result.cells) == 2 * 8 + 3
    layer = result.by(lambda pair: pair.group)["layers.1"]
    names = [name for name in x if ".layers.1." in name]
    assert found(layer) == about(plain([x[n] for n in names], [y[n] for n in names]))


def test_many_small_windows_give_the_same_as_one(
    tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairing.join(tiny_models["qwen2_vl"], tiny_models["llava_onevision"])
    whole = compare(pair, sample=None)
    monkeypatch.setattr(likeness, "WINDOW", 1000)
    seen: list[int] = []
    pieces = compare(pair, sample=None, progress=seen.append)
    assert sum(seen) == bytes_read(pair)
    assert len(seen) > 2 * len(pair.pairs)
    for one, other in zip(whole.measures, pieces.measures, strict=True):
        assert (one.equal, one.finite, one.read) == (other.equal, other.finite, other.read)
        assert found(other) == about((one.cosine or 0.0, one.distance or 0.0))


def test_a_sample_of_all_is_all_and_a_smaller_one_is_near(tiny_models: Models) -> None:
    a, b = tiny_models["qwen2_5_vl"], tiny_models["qwen2"]
    whole, every, some = full(a, b), sampled(a, b, 1 << 30), sampled(a, b, 1000)
    for one, two, three in zip(whole.measures, every.measures, some.measures, strict=True):
        assert two.read == one.read == one.total
        assert found(two) == about((one.cosine or 0.0, one.distance or 0.0))
        assert three.read == min(1000, one.total)
        assert three.cosine == pytest.approx(one.cosine, abs=0.03)


def test_a_small_sample_lies_where_kinship_looks(tiny_models: Models) -> None:
    from lowmem_adamms.mapping.join import make_plan

    a, b = tiny_models["llava"], tiny_models["mplug_owl2"]
    result = sampled(a, b, kinship.RUN_ELEMENTS)
    groups: dict[str, Measure] = {}
    for pair, measure in result.items:
        if pair.tells and "@" not in pair.role:
            groups[pair.group] = groups.get(pair.group, Measure()) + measure
    cosines = kinship.measure(make_plan(a, b)).cosines
    assert {group: m.cosine for group, m in groups.items()} == pytest.approx(cosines, rel=1e-12)


def test_equal_tensors_are_called_identical(tiny_models: Models, tmp_path: Path) -> None:
    def one(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if name != "model.layers.0.self_attn.k_proj.weight":
            return None
        tensor = tensor.clone()
        tensor[3, 5] += 1
        return tensor

    same = full(tiny_models["llama"], tiny_models["llama"])
    assert (same.verdict.word, same.verdict.same) == ("identical", True)
    b = altered(tiny_models["llama"], tmp_path / "b", one)
    result = full(tiny_models["llama"], b)
    assert [pair.role for pair, m in result.items if not m.identical] == ["layers.0.attn.k.weight"]
    (changed,) = (m for m in result.measures if not m.identical)
    assert changed.equal == changed.read - 1
    assert result.verdict.word == "same ancestor"


def test_the_same_values_in_another_dtype_are_equal(tiny_models: Models, tmp_path: Path) -> None:
    wide = altered(tiny_models["llama"], tmp_path / "wide", lambda _, tensor: tensor.float())
    result = full(tiny_models["llama"], wide)
    assert result.verdict.word == "identical"
    assert all(found(m) == (1.0, 0.0) for m in result.measures)
    assert result.a.traits["dtype"] != result.b.traits["dtype"]


def test_what_is_not_finite_is_counted_and_left_out(tiny_models: Models, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    x = tiny.load(tiny_models["llama"])[name]
    sick, worse = x.clone(), x.clone()
    sick[0, :3] = float("nan")
    worse[0, 2], worse[1] = float("inf"), float("-inf")
    whole = tiny.load(tiny_models["llama"])
    a = rewritten(tiny_models["llama"], tmp_path / "a", whole | {name: sick})
    b = rewritten(tiny_models["llama"], tmp_path / "b", whole | {name: worse})
    for result in (full(a, b), sampled(a, b, 1 << 30)):
        (measure,) = (m for pair, m in result.items if pair.role == "layers.0.mlp.up.weight")
        assert (measure.odd_a, measure.odd_b) == (3, 1 + x.shape[1])
        assert measure.finite == measure.read - 3 - x.shape[1]
        assert found(measure) == (1.0, 0.0)
        assert not measure.identical
    assert full(a, a).verdict.word == "identical"  # NaN of the same bits


def test_nothing_finite_has_no_cosine(tiny_models: Models, tmp_path: Path) -> None:
    nothing = altered(
        tiny_models["llama"], tmp_path / "nan", lambda _, t: torch.full_like(t, float("nan"))
    )
    result = full(tiny_models["llama"], nothing)
    assert {found(measure) for measure in result.measures} == {(None, None)}
    assert (result.verdict.word, result.verdict.same) == ("not comparable", None)
    assert "finite" in result.verdict.reason
    json.dumps(result.to_json(), allow_nan=False)


def test_zeros_have_no_direction_but_zeros_are_equal(tiny_models: Models, tmp_path: Path) -> None:
    def zero(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(tensor) if "o_proj" in name else None

    zeroed = altered(tiny_models["llama"], tmp_path / "zero", zero)
    cells = full(zeroed, tiny_models["llama"]).cells
    assert found(cells["layers.0", "o"]) == (0.0, None)
    assert found(full(tiny_models["llama"], zeroed).cells["layers.0", "o"]) == (0.0, 1.0)
    assert found(full(zeroed, zeroed).cells["layers.0", "o"]) == (1.0, 0.0)


# Spellings


def test_fused_rows_are_told_apart(tiny_models: Models, tmp_path: Path) -> None:
    """CogVLM's q, k and v lie in one tensor; only the middle third is changed."""
    tensors = tiny.load(tiny_models["cogvlm"])
    name = "model.layers.1.self_attn.language_expert_query_key_value.weight"
    other = tensors[name].clone()
    rows = other.shape[0] // 3
    other[rows : 2 * rows] *= -1
    b = rewritten(tiny_models["cogvlm"], tmp_path / "b", tensors | {name: other})
    cells = full(tiny_models["cogvlm"], b).cells
    assert {cell for cell, measure in cells.items() if not measure.identical} == {("layers.1", "k")}
    assert found(cells["layers.1", "k"]) == about((-1.0, 2.0))
    llava = tiny_models["llava"]
    split = next(n for n in tiny.load(llava) if "language_model" in n and "1.self_attn.k_p" in n)
    expected = plain([other[rows : 2 * rows]], [tiny.load(llava)[split]])
    assert found(full(b, llava).cells["layers.1", "k"]) == about(expected)


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
            result = sampled(one, two, 1 << 30)
            odd = {cell: found(m) for cell, m in result.cells.items() if not m.identical}
            odd.pop(("layers.0", "k@vision"), None)
            assert odd == {("layers.0", "k"): about((-1.0, 2.0))}, (family, one == a)
            assert {*"qkvo", "gate", "up", "down"} <= set(result.kinds)
            assert len(result.layers) == spelled.LAYERS


def test_both_experts_are_set_against_the_one_they_came_from(tiny_models: Models) -> None:
    a, b = tiny_models["cogvlm"], tiny_models["llama"]
    for result, (one, two) in ((full(a, b), (a, b)), (full(b, a), (b, a))):
        x, y = tiny.load(one), tiny.load(two)
        cog, llama = (x, y) if one == a else (y, x)
        experts = {
            kind: [cog[f"model.layers.0.mlp.{expert}_mlp.up_proj.weight"]]
            for kind, expert in (("up", "language"), ("up@vision", "vision"))
        }
        plainly = [llama["model.layers.0.mlp.up_proj.weight"]]
        for kind, expert in experts.items():
            sides = (expert, plainly) if one == a else (plainly, expert)
            assert found(result.cells["layers.0", kind]) == about(plain(*sides))
        assert "q@vision" in result.kinds
        assert result.kinds.index("down") < result.kinds.index("q@vision")


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
    for one, two in ((a, b), (b, a)):
        result = full(one, two)
        groups = result.by(lambda pair: pair.group)
        assert groups["embed"].identical and groups["head"].identical
        assert groups["embed"].total == (tiny.ROWS - 1) * tiny.HIDDEN
        assert result.verdict.same
        for side in (result.a, result.b):
            assert {only.what: only.share.elements for only in side.only} == {
                "rows of embed": tiny.HIDDEN,
                "rows of head": tiny.HIDDEN,
            }


def test_a_tied_side_lends_its_embedding_as_head(
    tmp_path: Path, ancestors: dict[str, tiny.Tensors]
) -> None:
    tied = tiny.make_qwen2(tmp_path / "tied", ancestor=ancestors["qwen2"], tied=True)
    own = tiny.make_qwen2(tmp_path / "own", ancestor=ancestors["qwen2"])
    for result in (full(tied, own), full(own, tied)):
        assert {pair.role for pair, _ in result.items} >= {"head", "embed"}
        names = next(pair.pieces[0].names for pair, _ in result.items if pair.role == "head")
        assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_what_is_outside_the_decoder_is_joined_by_name(tiny_models: Models, tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return 2 * tensor if "merger" in name else None

    b = altered(tiny_models["qwen2_vl"], tmp_path / "b", change)
    result = full(tiny_models["qwen2_vl"], b)
    assert result.by_name["vision tower"].identical
    assert found(result.by_name["connector"]) == about((1.0, 1.0))
    assert result.verdict.word == "identical"  # of the language models
    whole, mapped, named = result.a.whole, result.a.mapped, result.a.by_name
    assert whole.elements == mapped.elements + named.elements
    assert whole.tensors == mapped.tensors + named.tensors


def test_pickled_checkpoints_are_compared_too(tiny_models: Models, tmp_path: Path) -> None:
    pickled = tiny.to_bin(tiny_models["mplug_owl2"], tmp_path / "bin")
    assert full(tiny_models["mplug_owl2"], pickled).verdict.word == "identical"


# Verdicts

LINES = [
    ("qwen2_vl", "llava_onevision"),
    ("qwen2_5_vl", "qwen2"),
    ("cogvlm", "llava"),
    ("cogvlm", "mplug_owl2"),
    ("llava_next", "llama"),
    ("qwen3", "qwen3_vl"),
]


@pytest.mark.parametrize("read", [full, sampled])
@pytest.mark.parametrize(("a", "b"), LINES)
def test_the_answer_does_not_hang_on_who_comes_first(
    tiny_models: Models, a: str, b: str, read: Callable[[Path, Path], Comparison]
) -> None:
    forth, back = read(tiny_models[a], tiny_models[b]), read(tiny_models[b], tiny_models[a])
    assert forth.verdict.word == back.verdict.word == "same ancestor"
    assert forth.verdict.reason == back.verdict.reason
    assert forth.cells.keys() == back.cells.keys()
    for cell, measure in forth.cells.items():
        other = back.cells[cell]
        assert measure.cosine == pytest.approx(other.cosine, rel=1e-12)
        assert (measure.equal, measure.total) == (other.equal, other.total)
        ratio = math.sqrt(measure.aa / measure.bb)  # each distance is relative to its first side
        assert (measure.distance or 0) * ratio == pytest.approx(other.distance, rel=1e-9)
    for one, other_side in ((forth.a, back.b), (forth.b, back.a)):
        assert (one.mapped, one.whole) == (other_side.mapped, other_side.whole)
        assert sorted(map(repr, one.only)) == sorted(map(repr, other_side.only))


@pytest.mark.parametrize("read", [full, sampled])
def test_strangers_are_a_result(
    tiny_models: Models, tmp_path: Path, read: Callable[[Path, Path], Comparison]
) -> None:
    stranger = tiny.make_mplug_owl2(tmp_path / "other", ancestor=tiny.ancestor("llama", seed=7))
    for a, b in ((tiny_models["cogvlm"], stranger), (stranger, tiny_models["cogvlm"])):
        result = read(a, b)
        assert (result.verdict.word, result.verdict.same) == ("unrelated", False)
        assert all(
            abs(measure.cosine or 0) < 0.2
            for (_, kind), measure in result.cells.items()
            if "norm" not in kind
        )
        assert result.cells["layers.0", "q"].distance == pytest.approx(math.sqrt(2), abs=0.1)
        assert any("not alike" in obstacle for obstacle in result.obstacles)


def test_one_foreign_layer_is_named(tiny_models: Models, tmp_path: Path) -> None:
    stranger = tiny.ancestor("llama", seed=7)

    def swap(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        short = name.removeprefix("model.")
        return stranger[short].to(tensor.dtype) if short.startswith("layers.1.") else None

    b = altered(tiny_models["llama"], tmp_path / "half", swap)
    result = sampled(tiny_models["llama"], b)
    assert (result.verdict.word, result.verdict.same) == ("related in part", None)
    assert "layers.1" in result.verdict.reason
    assert result.verdict.lowest is not None and result.verdict.lowest[0] == "layers.1"


def test_layers_at_other_numbers_are_found(tmp_path: Path) -> None:
    """B has A's six layers with two foreign ones after the second, as a grown model has."""
    ancestor = tiny.ancestor("llama", layers=6)
    grown = tiny.ancestor("llama", seed=5, layers=8)
    grown |= {name: tensor for name, tensor in ancestor.items() if "layers." not in name}
    for i in range(6):
        new = i if i < 2 else i + 2
        for name in [name for name in ancestor if name.startswith(f"layers.{i}.")]:
            grown[name.replace(f"layers.{i}.", f"layers.{new}.")] = ancestor[name]
    a = tiny.make_llama(tmp_path / "a", ancestor=ancestor)
    b = tiny.make_llava(tmp_path / "b", ancestor=grown)
    there = sampled(a, b).verdict
    assert (there.word, there.runs) == ("same ancestor", (Run(0, 0, 2), Run(2, 4, 4)))
    assert "layers 2 to 5 of A are alike to layers 4 to 7 of B" in there.reason
    back = sampled(b, a)
    assert back.verdict.same
    assert back.verdict.runs == (Run(0, 0, 2), Run(4, 2, 4))
    assert [(only.what, only.why) for only in back.a.only if "layers" in only.what] == [
        ("layers 6 and up", "6 layers there")
    ]
    assert any("layer counts differ" in obstacle for obstacle in back.obstacles)


def test_layers_cut_off_the_end_leave_the_rest_alike(tmp_path: Path) -> None:
    deep = tiny.ancestor("llama", layers=4)
    short = {name: t for name, t in deep.items() if not name.startswith(("layers.2", "layers.3"))}
    a = tiny.make_llama(tmp_path / "a", ancestor=deep)
    b = tiny.make_llama(tmp_path / "b", ancestor=short, seed=9)
    result = full(a, b)
    assert (result.verdict.word, result.verdict.runs) == ("same ancestor", ())
    assert result.layers == [0, 1, 2, 3]
    assert ("layers.3", "q") not in result.cells


def test_other_widths_say_what_differs(true_size: dict[str, Checkpoint]) -> None:
    result = sampled(true_size["qwen2.5-vl-3b"], true_size["qwen2.5-vl-7b"], 16)
    assert (result.verdict.word, result.verdict.same) == ("not comparable", None)
    assert "width 2048 against 3584" in result.verdict.reason
    assert "decoder layers 36 against 28" in result.verdict.reason
    assert result.a.mapped.elements == result.b.mapped.elements == 0
    assert {only.why for only in result.b.only if only.what == "gate"} == {"another shape there"}
    assert {only.what for only in result.a.only} >= {"q", "down", "layers 28 and up", "embed"}
    assert set(result.by_name) == {"vision tower", "connector"}


def test_true_sizes_are_accounted_for(true_size: dict[str, Checkpoint]) -> None:
    """Qwen2-VL-7B and LLaVA-OneVision: all of the decoder but the rows beyond the shared tokens."""
    pair = pairing.join(true_size["qwen2-vl-7b"], true_size["llava-onevision-qwen2-7b-ov-hf"])
    decoder = 7_615_616_512  # Qwen2-7B
    missing = 2 * (152064 - 151646) * 3584
    assert pair.a.mapped.elements == pair.b.mapped.elements == decoder - missing
    assert pair.a.mapped.tensors == pair.b.mapped.tensors == 28 * 12 + 3
    for side in (pair.a, pair.b):
        alone = sum(only.share.elements for only in side.only)
        assert side.mapped.elements + side.by_name.elements + alone == side.whole.elements
    assert {only.what for only in pair.b.only} == {
        *("vision tower", "connector", "image newline", "rows of embed", "rows of head")
    }


def test_a_folder_without_a_decoder_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    tower = rewritten(tiny_models["llama"], tmp_path / "tower", {"visual.w": torch.zeros(4, 4)})
    with pytest.raises(MappingError, match="no decoder found"):
        pairing.join(tiny_models["llama"], tower)


# JSON


def test_the_document_has_one_form(tiny_models: Models) -> None:
    result = sampled(tiny_models["cogvlm"], tiny_models["llava"], 700)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) == {
        *("a", "b", "sample", "verdict", "obstacles", "differs", "decoder", "kinds", "groups"),
        *("by_name", "tensors", "notes"),
    }
    assert document["sample"] == 700
    verdict = document["verdict"]
    assert set(verdict) == {"word", "same_ancestor", "reason", "threshold", "lowest", "layers"}
    assert verdict["same_ancestor"] is True and verdict["threshold"] == kinship.THRESHOLD
    assert set(verdict["lowest"]) == {"group", "cosine"}
    for side in ("a", "b"):
        share = {"tensors", "elements", "bytes"}
        assert set(document[side]) == {
            *("name", "path", "arch", "traits", "whole", "mapped", "by_name", "only")
        }
        assert set(document[side]["mapped"]) == share
        assert all(set(only) == {"what", "why"} | share for only in document[side]["only"])
    measure = {
        *("elements", "read", "equal", "identical", "cosine", "distance", "norms", "not_finite")
    }
    assert set(document["decoder"]) == measure
    assert all(set(kind) == measure for kind in document["kinds"].values())
    assert set(document["groups"]) == {"embed", "norm", "head", "layers.0", "layers.1"}
    assert set(document["groups"]["layers.0"]["kinds"]) == set(result.kinds)
    assert len(document["tensors"]) == len(result.measures)
    fused = next(t for t in document["tensors"] if t["role"] == "layers.0.attn.q.weight")
    assert set(fused) == {"role", "a", "b"} | measure
    assert fused["a"] == ["model.layers.0.self_attn.language_expert_query_key_value.weight"]
