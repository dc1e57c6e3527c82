"""One class tried: a tiny pair merged, and every number held against an oracle of the tests' own.

The oracle blends two models in memory, parameter by parameter. Which parameters are the language
model's it asks of transformers (`get_decoder`, `get_output_embeddings`), or reads in a table.
"""

from __future__ import annotations

import copy
import importlib
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from classes import (
    ANCESTORS,
    CONFIG_EXCEPTIONS,
    FILES,
    KEPT,
    LANGUAGE_MODULES,
    NO_TEXT_DONOR,
    NOT_DECODER_ONLY,
    NOT_IN_TEXT,
    SET_AT_LOADING,
    TEXT_CONFIGS,
    TEXT_EXCEPTIONS,
    TEXT_NAMES,
    multimodal_classes,
)
from safetensors.torch import load_file
from tiny_models import build, make_relative, save, tiny_config, transformers

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.checkpoints.safetensors_header import read_header
from lowmem_adamms.errors import MergeError
from lowmem_adamms.live.transformers_model import quiet

ALPHA = 0.3
State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one pair.

    merged: "full", "partial" (some language tensors stayed the base's), "wrong" or "refused".
    searched: the same of the live model, or "" where there was nothing to search.
    """

    merged: str
    searched: str = ""
    why: str = ""

    def __str__(self) -> str:
        return ", ".join(
            part
            for part in (self.merged, self.searched and f"live {self.searched}", self.why)
            if part
        )


@dataclass(frozen=True, slots=True)
class Case:
    """A class to be tried. name: what the tables know it by. config: a tiny one."""

    name: str
    model_class: Any
    config: Any


def multimodal_case(model_type: str) -> Case:
    """A multimodal class with its own language model."""
    config = tiny_config(model_type, CONFIG_EXCEPTIONS.get(model_type, {}))
    return Case(model_type, getattr(transformers(), multimodal_classes()[model_type]), config)


def llava_case(text_type: str) -> Case:
    """LLaVA around a text decoder; ValueError if transformers does not let it carry that."""
    try:
        config = transformers().LlavaConfig(
            text_config=tiny_config(text_type, CONFIG_EXCEPTIONS.get(text_type, {})),
            vision_config=tiny_config("clip_vision_model", {}),
        )
        model_class = transformers().LlavaForConditionalGeneration
        with torch.device("meta"):
            model_class(config)
    except Exception as error:
        raise ValueError(f"{text_type}: {error}") from error
    return Case(f"llava around {text_type}", model_class, config)


def try_case(case: Case, folder: Path, *, thorough: bool = True) -> dict[str, Outcome]:
    """Merge a base with donors of the same language weights; outcome by kind of donor.

    The donors: one of its class, the same with other tensor names (those of its modules), and a
    text-only model. thorough: all of them, and the first is searched as well; else one, text-only
    where there is such a class.
    """
    with quiet():
        base = build(case.model_class, case.config, seed=0)
        language = language_names(base, case.name)
        donor = make_relative(base, language, seed=1)
        buffer, number = SET_AT_LOADING.get(case.name, ("", 0.0))
        for name, tensor in (*base.state_dict().items(), *donor.state_dict().items()):
            if buffer and name.endswith(buffer):
                tensor[-1] = number
        donors = {}
        if (text := make_text_donor(donor, language, case.name)) is not None:
            donors["text only"] = save(text, folder / "text only")
        if thorough or not donors:
            donors = {"same class": save(donor, folder / "same class"), **donors}
            if thorough and not saved_names(folder / "same class") <= donor.state_dict().keys():
                donors["module names"] = save(donor, folder / "module names", hub_names=False)
        save(base, folder / "base")
    for name in FILES.get(case.name, ()):
        torch.save({}, folder / "base" / name)
    kept, _ = KEPT.get(case.name, ("", ""))
    expected = blend(base, donor, language, kept)
    first, *others = donors
    outcomes = {first: _try_merge(base, expected, folder, first, searched=thorough)}
    for name in others:
        different, _ = NOT_IN_TEXT.get(case.name, ("", "")) if name == "text only" else ("", "")
        outcomes[name] = _try_other(folder, name, first, different)
    return outcomes


def language_names(model: Any, case: str) -> set[str]:
    """The state's names that belong to the language model or its head."""
    paths = LANGUAGE_MODULES.get(case, ())
    if not paths:
        modules = [model.get_decoder(), model.get_output_embeddings()]
        named = model.named_modules()
        paths = tuple(name for name, module in named if any(module is m for m in modules))
    return {
        name for name in model.state_dict() if any(name.startswith(f"{path}.") for path in paths)
    }


def blend(base: Any, donor: Any, language: set[str], kept: str) -> State:
    """What the merged model must hold."""
    theirs = donor.state_dict()
    out: State = {}
    for name, ours in base.state_dict().items():
        out[name] = ours
        if name in language and ours.is_floating_point() and not (kept and re.search(kept, name)):
            mixed = (1 - ALPHA) * ours.double() + ALPHA * theirs[name].double()
            out[name] = mixed.to(ours.dtype)
    return out


def make_text_donor(donor: Any, language: set[str], case: str) -> Any:
    """A text-only model with the donor's language weights; None if there is no class for it."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    config = donor.config
    if path := TEXT_CONFIGS.get(case):
        for part in path.split("."):
            config = getattr(config, part)
    else:
        config = config.get_text_config(decoder=True)
    text_type = ANCESTORS.get(config.model_type, config.model_type)
    has_class = text_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not has_class or case in NO_TEXT_DONOR:
        return None
    if text_type in (donor.config.model_type, *NOT_DECODER_ONLY):
        return None
    text_class = transformers().CONFIG_MAPPING[text_type]
    if text_type == config.model_type:
        text_config = copy.deepcopy(config)
    else:
        text_config = _ancestor_config(text_class, config, TEXT_EXCEPTIONS.get(case, {}))
    model_class = getattr(transformers(), auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_type])
    text = build(model_class, text_config, seed=2)
    theirs = donor.state_dict()
    for name, tensor in text.state_dict().items():
        counterpart = _find_counterpart(name, language, TEXT_NAMES.get(case, ()))
        if counterpart:
            value = theirs[counterpart]
            tensor.copy_(value[: len(tensor)] if "embed_tokens" in name else value)
    return text


def _ancestor_config(text_class: Any, config: Any, exceptions: Mapping[str, Any]) -> Any:
    """The config of a text-only class with the sizes of a descendant's."""
    known = text_class().to_dict().keys() - {"architectures", "model_type", "dtype"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    for name, key in text_class.attribute_map.items():  # such as num_experts
        if key in known and hasattr(config, name):
            values[key] = getattr(config, name)
    return text_class(**{**values, **exceptions})


def _find_counterpart(
    text_name: str, language: set[str], renamings: Sequence[tuple[str, str]]
) -> str:
    """The parameter whose name shares most of its end with that of a text-only model's.

    "" for a head where there is none.
    """
    for text_part, part in renamings:
        text_name = text_name.replace(text_part, part)
    end = text_name
    last = "" if "layers." not in text_name else text_name.partition("layers.")[2]
    while end not in (last, "", "weight", "bias"):
        if found := [name for name in language if f".{name}".endswith(f".{end}")]:
            return min(found, key=len)
        _, _, end = end.partition(".")
    if "head" not in text_name:
        raise KeyError(text_name)
    return ""


def load_tensors(folder: Path) -> State:
    """Every tensor of a saved model."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def saved_names(folder: Path) -> set[str]:
    """Of every tensor of a saved model."""
    return {
        info.name for path in folder.glob("*.safetensors") for info in read_header(path).tensors
    }


def _try_other(folder: Path, donor: str, first: str, different: str) -> Outcome:
    """Merge another donor: the bytes of the first must come out, but for tensors in `different`."""
    out = folder / f"merged with {donor}"
    try:
        merge(make_plan(folder / "base", folder / donor), ALPHA, out)
    except MergeError as error:
        return Outcome("refused", why=str(error))
    except Exception as error:
        return Outcome("wrong", why=_last_line(error))
    if not (folder / f"merged with {first}").exists():
        return Outcome("untried", why="merged with nothing to compare it to")
    expected, found = load_tensors(folder / f"merged with {first}"), load_tensors(out)
    kept = {name for name in expected if different and re.search(different, name)}
    expected |= {name: found[name] for name in kept}
    return _compare(load_tensors(folder / "base"), expected, found)


def _try_merge(base: Any, expected: State, folder: Path, donor: str, *, searched: bool) -> Outcome:
    out = folder / f"merged with {donor}"
    try:
        plan = make_plan(folder / "base", folder / donor)
        merge(plan, ALPHA, out)
    except MergeError as error:
        return Outcome("refused", why=str(error))
    except Exception as error:
        return Outcome("wrong", why=_last_line(error))
    try:
        with quiet():
            loaded = type(base).from_pretrained(out, dtype=torch.float32)
    except Exception as error:
        return Outcome("wrong", why=f"the output does not load: {_last_line(error)}")
    outcome = _compare(base.state_dict(), expected, loaded.state_dict())
    if outcome.merged != "full" or not searched:
        return outcome
    return replace(outcome, **_try_live(plan, expected))


def _try_live(plan: Any, expected: State) -> dict[str, str]:
    try:
        with LiveModel(plan, device="cpu", quantize="none", dtype="fp32") as live:
            live.apply(ALPHA)
            state = live.model.state_dict()
            return {"searched": _compare({}, expected, state).merged}
    except MergeError as error:
        return {"searched": "refused", "why": str(error)}
    except Exception as error:
        return {"searched": "wrong", "why": _last_line(error)}


def _compare(base: State, expected: State, found: State) -> Outcome:
    """How a loaded model compares with the oracle's. base: before the merge."""
    if expected.keys() != found.keys():
        return Outcome("wrong", why=f"names differ: {min(expected.keys() ^ found.keys())}")
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    if not different:
        return Outcome("full")
    unmerged = [name for name in different if name in base and torch.equal(found[name], base[name])]
    merged = "partial" if len(unmerged) == len(different) else "wrong"
    names = (
        unmerged if merged == "partial" else [name for name in different if name not in unmerged]
    )
    return Outcome(merged, why=f"{len(names)} such as {names[0]}")


def _last_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({place})"
