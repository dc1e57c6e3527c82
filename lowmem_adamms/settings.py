"""Every setting of the method, declared once: its type, default, help and how it is written.

The command line (`cli/`) and the keyword arguments of `api.py` are both made from these classes. A
command takes one class; classes that several commands share are its bases. The wings take the
classes they need, never a namespace of argparse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from typing import Any, Literal, TypeVar, get_args

from .errors import RecipeError
from .methods import METHODS
from .values import (
    Tags,
    check_type,
    parse_count,
    parse_density,
    parse_dtype,
    parse_grid,
    parse_natural,
    parse_size,
    parse_size_or_zero,
    parse_tags,
)

S = TypeVar("S")
Embeddings = Literal["merge", "keep"]
Unmatched = Literal["stop", "keep"]
Rounding = Literal["stochastic", "nearest"]
Measure = Literal["relative", "pairwise", "joint", "nuclear", "entropy"]
Quantization = Literal["none", "int8", "nf4"]
Device = Literal["cpu", "cuda"]
Engine = Literal["transformers", "vllm"]
Trim = Literal["tensor", "model"]
Live = Literal["held", "streamed"]

DEFAULT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
DEFAULT_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting is given on a command line.

    parse: turns a word into a value. choices: the words that are allowed. off: the option is
    spelled `--no-NAME` and turns the setting off. repeated: it may be given several times.
    positional: it is no option but a word in its place; optional where `nargs` is "?".
    """

    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    off: bool = False
    repeated: bool = False
    positional: bool = False
    nargs: str | None = None
    short: str | None = None
    required: bool = False


def setting(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field with the Option that describes it."""
    return field(default=default, metadata={"option": Option(help, **how)})


def combine(kind: type[S], settings: S | None, fields: Mapping[str, Any]) -> S:
    """Settings of one kind: those given, or the defaults, with `fields` replaced, all checked.

    Values may be words, as on a command line: `ram="16GB"`, `dtype=torch.bfloat16`.
    TypeError for a field that the kind does not have, or a value of a wrong type; RecipeError for
    one that is out of range.
    """
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(fields) - set(known)):
        raise TypeError(f"no setting is called {unknown[0]!r}; there are {', '.join(known)}")
    if settings is not None:
        check_type("settings", settings, kind, f"a {kind.__name__}, or its fields as keywords")
    settings = settings or kind()
    given = {name: getattr(settings, name) for name in known} | dict(fields)
    values = {name: _check(known[name], value) for name, value in given.items()}
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


def _check(item: dataclasses.Field[Any], value: Any) -> Any:
    """A value that was given in Python, as the setting holds it."""
    option: Option = item.metadata["option"]
    if value is None or value == item.default:
        return value
    if option.choices and value not in option.choices:
        raise RecipeError(f"{item.name} {value!r}: expected {' or '.join(option.choices)}")
    if isinstance(item.default, bool) and not isinstance(value, bool):
        raise TypeError(f"{item.name} is {value!r}, expected True or False")
    if option.repeated:
        return (value,) if isinstance(value, str) else tuple(value)
    if option.parse:
        try:
            return option.parse(value)
        except (RecipeError, TypeError) as error:
            named = str(error).startswith(item.name)
            raise type(error)(f"{'' if named else f'{item.name}: '}{error}") from None
    if not isinstance(item.default, bool):
        check_type(item.name, value, str, "a text")
    return value


def changed(settings: object, *kinds: type) -> list[dataclasses.Field[Any]]:
    """The fields of these kinds that differ from their defaults."""
    return [
        item
        for kind in kinds
        for item in dataclasses.fields(kind)
        if getattr(settings, item.name) != item.default
    ]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How the models become one."""

    method: str = setting(
        "linear",
        "linear (default) is the paper's; of the others all but slerp mix what base and donors have"
        " learned since an ancestor",
        choices=tuple(METHODS),
    )
    ancestor: str | None = setting(
        None,
        "folder, file or Hub id of the language model that base and donors were trained from",
        metavar="ANCESTOR",
        parse=expanduser,
    )
    density: float | None = setting(
        None,
        "share of each model's difference from the ancestor that is kept; default: 0.2 of ties, 0.8"
        " of dare-linear and dare-ties, 0.9 of breadcrumbs",
        metavar="SHARE",
        parse=parse_density,
    )
    trim: Trim = setting(
        "tensor",
        "rank the values of a difference within each tensor (default), or within the whole model as"
        " the authors of ties do",
        choices=("tensor", "model"),
    )
    mask_seed: int = setting(0, "of what dare drops; default: 0", metavar="N", parse=parse_natural)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(MethodSettings):
    """What the output is made of."""

    embeddings: Embeddings = setting(
        "merge",
        "merge the rows of embedding and head that stand for the same token (default), or keep the"
        " base's",
        choices=("merge", "keep"),
    )
    unmatched: Unmatched = setting(
        "stop",
        "stop where only one of the two language models has a weight (default), or keep the base's",
        choices=("stop", "keep"),
    )
    dtype: str | None = setting(
        None,
        "dtype of the output: bf16, fp16 or fp32; default: that of each tensor of the base",
        parse=parse_dtype,
    )
    rounding: Rounding = setting(
        "stochastic",
        "how bf16 and fp16 are rounded: stochastic is right in the mean (default); by nearest,"
        " weights that lie one step apart stay the base's up to alpha 0.5",
        choices=("stochastic", "nearest"),
    )
    arch: tuple[str, ...] = setting(
        (),
        "a TOML file that declares a family of models, as `archs NAME` prints them; it is tried"
        " before those that are known; may be repeated",
        metavar="FILE",
        parse=expanduser,
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Whether the output is quantized."""

    quantize: Quantization | None = setting(
        None,
        "quantize the linear layers with bitsandbytes, of the output and of the model that the"
        " search loads; default: none",
        choices=("none", "int8", "nf4"),
    )


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How weights that lie on the Hub are read."""

    no_cache: bool = setting(
        False, "stream models of the Hub as they are merged, and keep no copy on the disk"
    )


@dataclass(frozen=True, kw_only=True)
class PermissionSettings:
    """What is not done unless the user says so."""

    force: bool = setting(
        False, "merge also two models that look unrelated, and search a base without chat template"
    )
    trust_remote_code: bool = setting(
        False,
        "allow the base's own Python code to run, if a search or --quantize needs it",
    )


@dataclass(frozen=True, kw_only=True)
class PlacementSettings:
    """Where the search's model goes. By default, what fits best into the memory that is free."""

    device: Device | None = setting(
        None,
        "where the model runs; default: cuda, if it fits there",
        choices=("cpu", "cuda"),
    )
    live: Live | None = setting(
        None,
        "hold the model in memory, or blend its layers as they run, two at a time; default: held"
        " if that fits",
        choices=("held", "streamed"),
    )
    live_quantize: Quantization | None = setting(
        None,
        "quantize the model that the search loads, not the output; default: as --quantize says, or"
        " not if it fits",
        choices=("none", "int8", "nf4"),
    )
    live_dtype: str | None = setting(
        None,
        "dtype of the model that the search loads; default: that of the output",
        metavar="DTYPE",
        parse=parse_dtype,
    )
    vram: int | None = setting(
        None,
        "use at most this much memory of the card, such as 8GB; 0: do not use the card",
        metavar="SIZE",
        parse=parse_size_or_zero,
    )
    ram: int | None = setting(
        None, "use at most this much main memory, such as 16GB", metavar="SIZE", parse=parse_size
    )
    batch_size: int | None = setting(
        None,
        "answer this many questions at a time; default: 8, or what fits",
        metavar="N",
        parse=parse_count,
    )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What runs the search's model. vLLM batches and spreads it by itself."""

    engine: Engine = setting(
        "transformers",
        "what answers the questions: transformers (default), or vllm if it is installed",
        choices=("transformers", "vllm"),
    )
    tensor_parallel: int = setting(
        1, "vLLM: split each layer over this many cards; default: 1", metavar="N", parse=parse_count
    )
    pipeline_parallel: int = setting(
        1,
        "vLLM: split the layers into this many groups, each on its own cards; default: 1",
        metavar="N",
        parse=parse_count,
    )
    data_parallel: int = setting(
        1,
        "vLLM: run this many copies of the model, if its version allows it; default: 1",
        metavar="N",
        parse=parse_count,
    )
    ray: bool = setting(False, "vLLM: use the machines of a Ray cluster")
    vllm_option: tuple[str, ...] = setting(
        (),
        "vLLM: hand this on to vllm.LLM, such as max_model_len=4096; may be repeated",
        metavar="NAME=VALUE",
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which unlabelled questions are asked."""

    question: str | None = setting(
        None, "what to ask about each image, if SET is a folder of images", metavar="TEXT"
    )
    split: str | None = setting(
        None, "which split of a Hub dataset; default: test, validation or train", metavar="NAME"
    )
    text_column: str | None = setting(
        None,
        "which column of a table or Hub dataset holds the question; default: prompt, question,"
        " query, instruction or text",
        metavar="NAME",
    )
    image_column: tuple[str, ...] = setting(
        (),
        "which column holds an image; may be repeated; default: image, images, image_1, ...",
        metavar="NAME",
        repeated=True,
    )
    samples: int = setting(
        100,
        "ask this many of the questions, drawn at random; default: 100",
        metavar="N",
        parse=parse_count,
    )
    seed: int = setting(0, "seed of random draws; default: 0", metavar="N", parse=parse_natural)


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Which alphas are tried, and how they are scored."""

    alphas: tuple[float, ...] = setting(
        DEFAULT_ALPHAS,
        "which alphas to try: 0,0.1,0.2 or start:stop:step; default: 0:0.6:0.1",
        metavar="ALPHAS",
        parse=parse_grid,
    )
    refine: int = setting(
        0,
        "then try the alphas halfway between the best one and its neighbours, N times over;"
        " default: 0",
        metavar="N",
        parse=parse_natural,
    )
    measure: Measure | None = setting(
        None,
        "what D is: the answers that differ from the previous alpha's and those that differ from"
        " the next one's (pairwise, the paper's Algorithm 1), or these in per cent of the answers"
        " that are no longer the base's (relative); answers that differ from either (joint, its"
        " Appendix B); how far the answers are from being sure and all different, in per cent"
        " (nuclear, by their nuclear norm); or how unsure the model is of them, in nats per token"
        " (entropy). By the last two the grid's ends may be chosen too. Default: relative, or"
        " pairwise where probabilities are not known",
        choices=get_args(Measure),
    )
    noise: bool = setting(
        True,
        "do not ask a second time at the chosen alpha to see how many answers differ by chance, as"
        " the measures that compare answers do (pairwise, joint, relative)",
        off=True,
    )
    donor_answers: bool = setting(
        False, "ask at alpha 1 too, to show the donor's answers in the report; takes one more pass"
    )


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are made. Two runs are comparable if these and the prompts are the same."""

    max_new_tokens: int = setting(
        64, "longest answer, in tokens; default: 64", metavar="N", parse=parse_count
    )
    drafts: bool = setting(
        True,
        "do not start from the answer at the previous alpha; slower, with the same answers",
        off=True,
    )
    vision_cache: bool = setting(
        True, "encode the images again at every alpha; slower, with the same answers", off=True
    )
    reasoning_tags: Tags | None = setting(
        DEFAULT_TAGS,
        "compare what follows the reasoning between these two; default: '<think> </think>'; '':"
        " compare whole answers",
        metavar="TAGS",
        parse=parse_tags,
    )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(
    PromptSettings,
    GridSettings,
    AnswerSettings,
    EngineSettings,
    PlacementSettings,
    PermissionSettings,
):
    """A search for alpha on a live model."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings(QuantizeSettings, StreamSettings, PermissionSettings):
    """How a merge is written."""

    allow_nonfinite: bool = setting(
        False, "write the output even if blended values are NaN or infinite"
    )

    overwrite: bool = setting(
        False,
        "replace a complete merge in OUT, which stays until the new one is complete beside it",
    )
    max_shard_size: int | None = setting(
        None,
        "largest size of a file of the output, such as 5GB; default: that of the base's files",
        metavar="SIZE",
        parse=parse_size,
    )


@dataclass(frozen=True, kw_only=True)
class UploadSettings:
    """Where the output is uploaded to."""

    push_to_hub: str | None = setting(
        None,
        "upload the output too, each file as soon as it is finished, in one commit",
        metavar="ORG/NAME",
    )
    private: bool = setting(False, "make a new repository private")
    replace_repo: bool = setting(
        False, "allow a repository that holds other files, and delete those"
    )
