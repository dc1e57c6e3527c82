"""What the command line takes: every command and its options. The other rooms carry them out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from .. import __version__, dtypes
from ..errors import RecipeError

if TYPE_CHECKING:
    from ..dtypes import DType

    _Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"

COMMANDS = ("plan", "compare", "merge", "search", "verify", "push", "archs", "demo")
NEED_A_MODEL = (
    *("base", "donor", "dtype", "arch", "prompts", "question", "split", "text_column"),
    *("image_column", "alphas", "refine", "refine_layers", "no_drafts", "no_vision_cache"),
    *("no_noise", "trust_remote_code", "device", "quantize", "live_quantize", "live_dtype"),
    *("vram", "ram", "batch_size", "journal", "force"),
)
"""What `search` takes but recorded answers have no use for; each is falsy if not given."""
_PLACES = (
    *("base", "donor", "a", "b", "out", "prompts"),
    *("config", "journal", "report", "html", "export"),
)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; `command` in what it parses is the command's name."""
    root = _Parser(
        prog="python -m lowmem_adamms",
        description="Merge two multimodal LLMs of different architecture whose language models"
        " share an ancestor (AdaMMS, arXiv 2503.23733), in constant memory. BASE keeps its"
        " architecture, vision encoder, tokenizer and processor; DONOR's language weights are"
        " blended in.",
        epilog="python -m lowmem_adamms BASE DONOR -o OUT …   is short for   merge BASE DONOR …",
    )
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for add in (_add_plan, _add_compare, _add_merge, _add_search):
        add(commands)
    for add in (_add_verify, _add_push, _add_archs, _add_demo):
        add(commands)
    return root


def at_home(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same with `~/` as the shell means it where it left it: in quotes, or in `--out=~/x`."""
    for name in _PLACES:
        value = getattr(arguments, name, None)
        if value is not None and str(value).startswith("~/"):
            setattr(arguments, name, type(value)(Path(value).expanduser()))
    return arguments


def _add_plan(commands: _Commands) -> None:
    plan = commands.add_parser("plan", help="what would be done, from headers alone")
    _pair_options(plan)
    _no_cache_option(plan)
    plan.add_argument("-o", "--out", metavar="OUT", type=Path, help="where it would be written")
    plan.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _placement_options(plan)


def _add_compare(commands: _Commands) -> None:
    compare = commands.add_parser(
        "compare", help="how far apart two checkpoints are, and whether of one ancestor"
    )
    compare.add_argument("a", metavar="A", help="folder, file or Hub id of a checkpoint")
    compare.add_argument("b", metavar="B", help="another; distances are relative to A")
    compare.add_argument("--json", action="store_true", help="one JSON document on stdout")
    compare.add_argument("--html", metavar="FILE", type=Path, help="write a page here")
    amount = compare.add_mutually_exclusive_group()
    amount.add_argument(
        "--sample", metavar="N", type=_count, default=4096, help="elements a tensor; default: 4096"
    )
    amount.add_argument("--full", action="store_true", help="read everything")
    _arch_option(compare)


def _add_merge(commands: _Commands) -> None:
    merge = commands.add_parser("merge", help="map and merge, at a given alpha or a searched one")
    _pair_options(merge, nargs="?")
    merge.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="a new folder")
    merge.add_argument("--alpha", type=float, help="the donor's weight: 0 is the base, 1 the donor")
    merge.add_argument(
        "--alpha-layers",
        metavar="ALPHAS",
        help="by layer: 0.1,0.3,0.5 is interpolated from the first layer to the last (the embedding"
        " takes the first, norm and head the last, or --alpha); 0-9:0.2,10-27:0.5,head:0 names"
        " layers, embed, norm and head, and the rest takes --alpha",
    )
    merge.add_argument(
        "--config",
        metavar="YAML",
        type=Path,
        help="instead of BASE, DONOR and --alpha: mergekit's recipe of a linear merge of two models"
        " (the base is its base_model, else its first model); --dtype goes before its dtype",
    )
    merge.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; default: the base's")
    merge.add_argument("--force", action="store_true", help="merge also what looks unrelated")
    _no_cache_option(merge)
    merge.add_argument(
        "--disk-budget",
        metavar="SIZE",
        help="of Hub ids: fetch shard by shard, at most this much at a time, and delete each",
    )
    merge.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload too, shard by shard as they are finished; one commit when all is there",
    )
    _repository_options(merge)
    _search_options(merge)


def _add_search(commands: _Commands) -> None:
    search = commands.add_parser("search", help="find alpha by the consistency of the answers")
    _pair_options(search, nargs="?")
    search.add_argument(
        "--answers",
        metavar="[ALPHA=]FILE",
        nargs="+",
        help="score recorded answers instead: lmms-eval sample logs, VLMEvalKit predictions,"
        " an answers.jsonl",
    )
    search.add_argument("--json", action="store_true", help="one JSON document on stdout")
    search.add_argument("--report", metavar="FILE", type=Path, help="write the HTML report here")
    search.add_argument("--journal", metavar="FILE", type=Path, help="keep answers, to resume from")
    search.add_argument("--force", action="store_true", help="search also what looks unrelated")
    _search_options(search)


def _add_verify(commands: _Commands) -> None:
    verify = commands.add_parser("verify", help="check a merged folder")
    verify.add_argument("out", metavar="OUT", type=Path)
    verify.add_argument(
        "--deep", action="store_true", help="also digests, and sampled rows against the inputs"
    )


def _add_push(commands: _Commands) -> None:
    push = commands.add_parser("push", help="upload a merged folder, or finish its upload")
    push.add_argument("out", metavar="OUT", type=Path)
    push.add_argument("push_to_hub", metavar="ORG/NAME", help="a repository of models on the Hub")
    _repository_options(push)


def _add_archs(commands: _Commands) -> None:
    archs = commands.add_parser("archs", help="the known families, or one as a file for --arch")
    archs.add_argument("name", metavar="NAME", nargs="?", help="print this one's declaration")
    archs.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _arch_option(archs)


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser("demo", help="the whole method on the embedded pair, offline")
    demo.add_argument("-o", "--out", metavar="OUT", type=Path, help="keep everything here")
    demo.add_argument("--alpha", type=float, help="merge at this alpha; default: search for it")
    demo.add_argument("--export", metavar="DIR", type=Path, help="only write the pair there")


def _pair_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    options: dict[str, Any] = {"nargs": nargs} if nargs else {}
    parser.add_argument(
        "base", metavar="BASE", help="folder, file or org/name[@revision] of the base", **options
    )
    parser.add_argument(
        "donor", metavar="DONOR", help="folder, file or org/name[@revision] of the donor", **options
    )
    parser.add_argument(
        "--embeddings",
        choices=("merge", "keep"),
        default="merge",
        help="join embedding and head rows by token (default), or keep the base's",
    )
    parser.add_argument("--dtype", type=_dtype, help="of the output: bf16, fp16, fp32")
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "nf4"),
        help="of the output's linear layers, with bitsandbytes, and of the search's model",
    )
    _arch_option(parser)


def _arch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        metavar="FILE",
        action="append",
        help="a family declared in TOML, as `archs NAME` prints them; goes before the known ones;"
        " may be repeated",
    )


def _no_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-cache", action="store_true", help="of Hub ids: stream the tensors and store nothing"
    )


def _repository_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--replace-repo",
        action="store_true",
        help="upload also to a repository that holds other files, and delete those",
    )


def _dtype(text: str) -> DType:
    try:
        return dtypes.from_user(text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _placement_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the search's model goes (default: what fits best)")
    group.add_argument("--device", choices=("cpu", "cuda"))
    group.add_argument(
        "--live-quantize", choices=("none", "int8", "nf4"), help="default: --quantize, or what fits"
    )
    group.add_argument("--live-dtype", metavar="DTYPE", type=_dtype, help="default: the output's")
    group.add_argument("--vram", metavar="SIZE", help="plan with this much; 0: without a card")
    group.add_argument("--ram", metavar="SIZE", help="plan with this much")
    group.add_argument("--batch-size", metavar="N", type=_count, help="default: 8, or what fits")


def _search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--prompts",
        metavar="SET",
        help="unlabelled questions: JSON Lines, a folder of images, Parquet, a Hub dataset",
    )
    group.add_argument("--question", help="what to ask of each image of a folder")
    group.add_argument("--split", help="of a Hub dataset")
    group.add_argument("--text-column", metavar="NAME", help="of Parquet or a Hub dataset")
    group.add_argument("--image-column", metavar="NAME", action="append", help="may be repeated")
    group.add_argument("--samples", metavar="N", type=_count, default=100, help="default: 100")
    group.add_argument(
        "--seed", type=_natural, default=0, help="of sampling and resampling prompts"
    )
    group.add_argument("--alphas", help="such as 0,0.1,0.2 or 0:0.6:0.1; default: 0 to 0.6 by 0.1")
    group.add_argument(
        "--refine", metavar="N", type=_natural, default=0, help="rounds of halving around the best"
    )
    group.add_argument(
        "--refine-layers",
        metavar="N",
        type=_count,
        help="then find an alpha for each of N groups of layers: 4 more passes over the prompts"
        " a group",
    )
    group.add_argument(
        "--measure",
        choices=("pairwise", "joint", "embedding", "relative"),
        default="pairwise",
        help="the paper's Algorithm 1 (default), its Appendix B, embedding distance, or ours:"
        " Algorithm 1's D relative to how many answers have left the base's",
    )
    group.add_argument("--max-new-tokens", metavar="N", type=_count, default=64)
    group.add_argument("--no-drafts", action="store_true", help="generate every token anew")
    group.add_argument("--no-vision-cache", action="store_true", help="encode images every time")
    group.add_argument("--no-noise", action="store_true", help="do not measure the noise floor")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the base brings"
    )
    _placement_options(parser)


def _count(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text) if text.strip().isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return number
