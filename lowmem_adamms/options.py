"""What the command line takes: every command and its options. `cli.py` carries them out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, dtypes
from .errors import RecipeError

if TYPE_CHECKING:
    from .dtypes import DType

COMMANDS = ("plan", "merge", "search", "verify", "push", "demo")
NEED_A_MODEL = (
    *("base", "donor", "dtype", "prompts", "question", "split", "text_column", "image_column"),
    *("alphas", "refine", "no_drafts", "no_vision_cache", "no_noise", "trust_remote_code"),
    *("device", "quantize", "live_dtype", "vram", "ram", "batch_size", "journal", "force"),
)
"""What `search` takes but recorded answers have no use for; each is falsy if not given."""


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

    plan = commands.add_parser("plan", help="what would be done, from headers alone")
    _add_pair(plan)
    plan.add_argument("-o", "--out", metavar="OUT", type=Path, help="where it would be written")
    plan.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _add_placement(plan)

    merge = commands.add_parser("merge", help="map and merge, at a given alpha or a searched one")
    _add_pair(merge)
    merge.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="a new folder")
    merge.add_argument("--alpha", type=float, help="the donor's weight: 0 is the base, 1 the donor")
    merge.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; default: the base's")
    merge.add_argument("--force", action="store_true", help="merge also what looks unrelated")
    merge.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload too, shard by shard as they are finished; one commit when all is there",
    )
    _add_repository(merge)
    _add_search(merge)

    search = commands.add_parser("search", help="find alpha by the consistency of the answers")
    _add_pair(search, nargs="?")
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
    _add_search(search)

    verify = commands.add_parser("verify", help="check a merged folder")
    verify.add_argument("out", metavar="OUT", type=Path)
    verify.add_argument(
        "--deep", action="store_true", help="also digests, and sampled rows against the inputs"
    )

    push = commands.add_parser("push", help="upload a merged folder, or finish its upload")
    push.add_argument("out", metavar="OUT", type=Path)
    push.add_argument("push_to_hub", metavar="ORG/NAME", help="a repository of models on the Hub")
    _add_repository(push)

    demo = commands.add_parser("demo", help="the whole method on a tiny pair made on the spot")
    demo.add_argument("-o", "--out", metavar="OUT", type=Path, help="keep everything here")
    demo.add_argument("--alpha", type=float, help="merge at this alpha; default: search for it")
    return root


def _add_pair(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    options: dict[str, Any] = {"nargs": nargs} if nargs else {}
    parser.add_argument(
        "base", metavar="BASE", help="folder or file of the base checkpoint", **options
    )
    parser.add_argument(
        "donor", metavar="DONOR", help="folder or file of the donor checkpoint", **options
    )
    parser.add_argument(
        "--embeddings",
        choices=("merge", "keep"),
        default="merge",
        help="join embedding and head rows by token (default), or keep the base's",
    )
    parser.add_argument("--dtype", type=_dtype, help="of the output: bf16, fp16, fp32")


def _add_repository(parser: argparse.ArgumentParser) -> None:
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


def _add_placement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the search's model goes (default: what fits best)")
    group.add_argument("--device", choices=("cpu", "cuda"))
    group.add_argument("--quantize", choices=("none", "int8", "nf4"), help="with bitsandbytes")
    group.add_argument("--live-dtype", metavar="DTYPE", type=_dtype, help="default: the output's")
    group.add_argument("--vram", metavar="SIZE", help="plan with this much; 0: without a card")
    group.add_argument("--ram", metavar="SIZE", help="plan with this much")
    group.add_argument("--batch-size", metavar="N", type=_count, help="default: 8, or what fits")


def _add_search(parser: argparse.ArgumentParser) -> None:
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
        "--measure",
        choices=("pairwise", "joint", "embedding"),
        default="pairwise",
        help="the paper's Algorithm 1 (default), its Appendix B, or embedding distance",
    )
    group.add_argument("--max-new-tokens", metavar="N", type=_count, default=64)
    group.add_argument("--no-drafts", action="store_true", help="generate every token anew")
    group.add_argument("--no-vision-cache", action="store_true", help="encode images every time")
    group.add_argument("--no-noise", action="store_true", help="do not measure the noise floor")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the base brings"
    )
    _add_placement(parser)


def _count(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text) if text.strip().isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return number
