"""Tied heads as they are found: what config.json says at which level, and what is on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer, use
from safetensors.numpy import load_file
from spelled import SPELLERS, Arrays, ancestor, descend

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.mapping import tied_head
from lowmem_adamms.mapping.plan import Plan

_TEXT = ancestor("qwen2", 7)
TEXT = _TEXT | {"head": _TEXT["embed"]}  # of a tied ancestor
BASE, DONOR = descend(TEXT, 1), descend(TEXT, 2)
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
INNER_TIED = UNTIED | {"text_config": TIED}


def put(folder: Path, kind: str, text: Arrays, head: bool | Any, config: Mapping[str, Any]) -> Path:
    """A checkpoint of that kind. head: whether it is on disk, or what is there instead of it."""
    speller = SPELLERS["qwen2"][kind]
    tensors = speller(text, {}, 1)
    if head is False:
        del tensors[speller.head]
    elif head is not True:
        tensors[speller.head] = head
    speller.write(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"architectures": [speller.cls], **config}))
    return folder


def plan_of(
    folder: Path, base: tuple[bool | Any, Any], donor: tuple[bool, Any] = (True, UNTIED)
) -> Plan:
    """Each side: its head on disk and its config."""
    return make_plan(
        put(folder / "base", "Qwen2-VL", BASE, *base),
        put(folder / "donor", "Qwen2", DONOR, *donor),
    )


def lender_of_head(plan: Plan) -> str | None:
    (step,) = (step for step in plan.steps if step.name == "lm_head.weight")
    return step.parts[0].donor_name


def test_the_language_models_part_of_a_config_may_tie(tmp_path: Path) -> None:
    """As in llava-hf/llava-onevision-qwen2-0.5b-ov-hf; transformers goes by that."""
    plan = plan_of(tmp_path, (True, UNTIED), (False, INNER_TIED))
    assert lender_of_head(plan) == "model.embed_tokens.weight"


@pytest.mark.parametrize("side", ["base", "donor"])
def test_a_head_that_differs_on_disk_is_not_taken_for_tied(tmp_path: Path, side: str) -> None:
    """The loader warns and keeps both; a merge that dropped the one would lose it."""
    said = {"base": UNTIED, "donor": UNTIED, side: TIED}
    plan = plan_of(tmp_path, (True, said["base"]), (True, said["donor"]))
    assert lender_of_head(plan) == "lm_head.weight"
    (note,) = (note for note in plan.notes if "differ" in note)
    assert note.startswith(str(tmp_path / side))


def test_a_head_that_is_the_embeddings_copy_is_tied(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, (BASE["embed"], TIED))
    assert "lm_head.weight" not in {step.name for step in plan.steps}


@pytest.mark.parametrize("change", ["its last element", "a row less"])
def test_a_head_that_is_nearly_a_copy_is_not_tied(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_head, "SAMPLE_ELEMENTS", 4)
    head = BASE["embed"].copy()
    head.flat[-1] += 1
    if change == "a row less":
        head = BASE["embed"][:-1]
    assert lender_of_head(plan_of(tmp_path, (head, TIED))) == "lm_head.weight"


def test_where_the_levels_disagree_a_copied_head_is_kept(tmp_path: Path) -> None:
    """Classes that go by the outer config alone (Qwen3-VL's) would miss it."""
    plan = plan_of(tmp_path, (BASE["embed"], INNER_TIED), (False, TIED))
    assert lender_of_head(plan) == "model.embed_tokens.weight"


def test_an_untied_head_that_is_missing_is_told(tmp_path: Path) -> None:
    """As lmms-lab/llava-onevision-qwen2-0.5b-ov once was; its embedding never was a head."""
    plan = plan_of(tmp_path, (True, UNTIED), (False, UNTIED))
    assert lender_of_head(plan) is None
    (note,) = (note for note in plan.notes if "tie_word_embeddings" in note)
    assert note.startswith(str(tmp_path / "donor"))


def test_a_head_on_the_hub_is_looked_at_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = plan_of(tmp_path, (True, TIED))
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        server.add("org/tied-in-word", local.base.path)
        plan = make_plan(open_checkpoint("org/tied-in-word", cache=False), local.donor)
    assert plan.base.remote_files()
    assert lender_of_head(plan) == "lm_head.weight"


# One tensor under two names


def test_a_second_name_of_a_merged_tensor_is_merged_alike(tmp_path: Path) -> None:
    """Phi-3-vision's `vision_embed_tokens.wte` is its embedding; a .bin of a fine-tune has both."""
    import torch

    text = ancestor("phi3", 1)
    sides: list[Path] = []
    for side in ("base", "donor"):
        arrays = SPELLERS["phi3"]["Phi-3-vision"](descend(text, len(sides)), {}, 1)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors["model.vision_embed_tokens.wte.weight"] = tensors["model.embed_tokens.weight"]
        sides.append(tmp_path / side)
        sides[-1].mkdir()
        torch.save(tensors, sides[-1] / "pytorch_model.bin")
    merged = load_file(merge(make_plan(*sides), 0.5, tmp_path / "out") / "model.safetensors")
    embed = merged["model.embed_tokens.weight"]
    assert np.array_equal(embed, merged["model.vision_embed_tokens.wte.weight"])
    own = torch.load(sides[0] / "pytorch_model.bin")["model.embed_tokens.weight"].numpy()
    assert not np.array_equal(embed, own)
