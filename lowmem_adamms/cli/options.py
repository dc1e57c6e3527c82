"""What the command line takes: every command and its options. The other rooms carry them out.

What the word after an option means is in `values.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, get_args

from ..errors import RecipeError
from ..home import at_home
from ..searching.scoring import Measure
from ..version import __version__
from . import values

if TYPE_CHECKING:
    _Options: TypeAlias = argparse._ActionsContainer
    _Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"

COMMANDS = ("plan", "compare", "merge", "search", "verify", "push", "archs", "demo")
OF_A_SEARCH = (
    *("question", "split", "text_column", "image_column", "samples", "seed", "alphas", "refine"),
    *("refine_layers", "measure", "max_new_tokens", "no_drafts", "no_vision_cache", "no_noise"),
    *("device", "live_quantize", "live_dtype", "vram", "ram", "batch_size"),
)
"""What a merge at a given alpha has no use for. --trust-remote-code is a permission, not a wish."""
NEED_A_MODEL = (
    *("base", "donor", "embeddings", "dtype", "quantize", "arch", "prompts", "journal", "force"),
    *(name for name in OF_A_SEARCH if name not in ("seed", "measure")),
    "trust_remote_code",
)
"""What `search` takes but recorded answers have no use for."""


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one of ours, and text around the options keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; `command` in what it parses is the command's name."""
    root = _Parser(
        prog="python -m lowmem_adamms",
        description=_ABOUT,
        epilog=_EXAMPLES,
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


def given(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the options whose value is not the one that they have unasked, as they are spelled.

    names: as attributes of `arguments`.
    """
    asked = [n for n in names if getattr(arguments, n) != arguments.parser.get_default(n)]
    positional = ("base", "donor")
    return [n.upper() if n in positional else f"--{n.replace('_', '-')}" for n in asked]


_ABOUT = """\
Merges two multimodal LLMs of different architecture whose language models share
an ancestor (AdaMMS, arXiv 2503.23733), in constant memory. BASE keeps its
architecture, vision encoder, tokenizer and processor; DONOR's language weights
are blended into it: out = (1 - alpha) * base + alpha * donor."""

_EXAMPLES = """\
examples:
  python -m lowmem_adamms demo
  python -m lowmem_adamms plan BASE DONOR
  python -m lowmem_adamms BASE DONOR -o OUT --prompts questions.jsonl
  python -m lowmem_adamms BASE DONOR -o OUT --alpha 0.3

BASE and DONOR are folders, files or Hub ids (org/name[@revision]). Without a
command, BASE DONOR ... is short for merge BASE DONOR ...
COMMAND --help tells what a command takes.
Exit codes: 0 done, 2 something you can mend, said in a line, 130 interrupted."""

_MERGE_EXAMPLES = """\
examples:
  alpha is known (0.1 to 0.3 is usual):
    %(prog)s BASE DONOR -o OUT --alpha 0.3
  alpha is searched for, with questions that need no answers:
    %(prog)s BASE DONOR -o OUT --prompts questions.jsonl
  of the Hub, with no more than 20 GB of it on the disk at a time:
    %(prog)s org/base org/donor@main -o OUT --alpha 0.3 --disk-budget 20GB

A line of questions.jsonl: {"prompt": "What is this?", "image": "cat.png"}
Killed or interrupted, the same command goes on where it was."""

_SEARCH_EXAMPLES = """\
examples:
  %(prog)s BASE DONOR --prompts questions.jsonl --report report.html
  %(prog)s BASE DONOR --prompts photos/ --question "What is this?" --samples 50
  %(prog)s --answers OUT/answers.jsonl --measure joint
  %(prog)s --answers 0=a.jsonl 0.2=b.jsonl 0.4=c.jsonl"""


def _add_plan(commands: _Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="what would be done, from headers alone",
        description="Shows what a merge would do with each tensor, what it would take, and where a"
        "\nsearch would run. Reads headers only and writes nothing.",
    )
    _pair_options(plan)
    _no_cache_option(plan)
    plan.add_argument(
        "-o", "--out", metavar="OUT", type=values.path, help="whose disk's free space to show"
    )
    plan.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _placement_options(plan)


def _add_compare(commands: _Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="how far apart two checkpoints are, and whether of one ancestor",
        description="Compares the weights of two checkpoints tensor by tensor, layer by layer,"
        " without\nmerging them.",
    )
    compare.add_argument(
        "a", metavar="A", type=at_home, help="folder, file or org/name[@revision] of a checkpoint"
    )
    compare.add_argument(
        "b", metavar="B", type=at_home, help="another; distances are relative to A"
    )
    compare.add_argument("--json", action="store_true", help="one JSON document on stdout")
    compare.add_argument("--html", metavar="FILE", type=values.path, help="write it as a page too")
    amount = compare.add_mutually_exclusive_group()
    amount.add_argument(
        "--sample",
        metavar="N",
        type=values.count,
        default=4096,
        help="elements read of each tensor; default: 4096",
    )
    amount.add_argument("--full", action="store_true", help="read everything")
    _arch_option(compare)


def _add_merge(commands: _Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="map and merge, at a given alpha or a searched one",
        usage="%(prog)s BASE DONOR -o OUT (--alpha ALPHA | --prompts SET) [options]",
        epilog=_MERGE_EXAMPLES,
    )
    merge.set_defaults(parser=merge)
    merge.add_argument(
        "-o", "--out", metavar="OUT", type=values.path, required=True, help="a new folder"
    )
    _weight_options(merge)
    _pair_options(merge, nargs="?")
    merge.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=values.size,
        help="of the files of the output, such as 5GB; default: the base's own",
    )
    merge.add_argument("--force", action="store_true", help="merge also what looks unrelated")
    _trust_option(merge)
    hub = merge.add_argument_group("the Hub")
    _no_cache_option(hub)
    hub.add_argument(
        "--disk-budget",
        metavar="SIZE",
        type=values.size,
        help="of Hub ids: fetch file by file, at most this much at a time, and delete each",
    )
    hub.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload too, file by file as they are finished; one commit when all is there",
    )
    _repository_options(hub)
    _search_options(merge)


def _weight_options(merge: argparse.ArgumentParser) -> None:
    merge.add_argument(
        "--alpha",
        type=values.alpha,
        help="the donor's weight: 0 is the base, 1 the donor; without it give --prompts",
    )
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
        type=values.path,
        help="instead of BASE, DONOR and --alpha: mergekit's recipe of a linear merge of two models"
        " (the base is its base_model, else its first model); --dtype goes before its dtype",
    )


def _add_search(commands: _Commands) -> None:
    search = commands.add_parser(
        "search",
        help="find alpha by the consistency of the answers",
        usage="%(prog)s BASE DONOR --prompts SET [options]\n"
        "       %(prog)s --answers [ALPHA=]FILE ... [options]",
        description="Answers unlabelled questions at each alpha of a grid, with one loaded model,"
        " and takes\nthe alpha at which the answers change least (D) from one step to the next."
        " Writes no\ncheckpoint: merge does the same and then merges.",
        epilog=_SEARCH_EXAMPLES,
    )
    search.set_defaults(parser=search)
    _pair_options(search, nargs="?")
    search.add_argument(
        "--answers",
        metavar="[ALPHA=]FILE",
        type=values.answers,
        nargs="+",
        help="instead of BASE, DONOR and --prompts: score answers that were recorded, in sample"
        " logs of lmms-eval, predictions of VLMEvalKit, or an answers.jsonl of ours",
    )
    search.add_argument("--json", action="store_true", help="one JSON document on stdout")
    search.add_argument(
        "--report", metavar="FILE", type=values.path, help="write the report, an HTML page, here"
    )
    search.add_argument(
        "--journal",
        metavar="FILE",
        type=values.path,
        help="keep the answers here; the same command then goes on from them",
    )
    search.add_argument("--force", action="store_true", help="search also what looks unrelated")
    _trust_option(search)
    _search_options(search)


def _add_verify(commands: _Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="check a merged folder",
        description="Checks that a merged folder is whole and loads as what it says it is.",
    )
    verify.add_argument("out", metavar="OUT", type=values.path, help="what merge wrote")
    verify.add_argument(
        "--deep",
        action="store_true",
        help="also the digests of its files, and sampled rows, recomputed from BASE and DONOR",
    )


def _add_push(commands: _Commands) -> None:
    push = commands.add_parser(
        "push",
        help="upload a merged folder, or finish its upload",
        description="Uploads a merged folder to the Hub in one commit. HF_TOKEN or a login of"
        " huggingface_hub\nmust allow it.",
    )
    push.add_argument("out", metavar="OUT", type=values.path, help="what merge wrote")
    push.add_argument("push_to_hub", metavar="ORG/NAME", help="a repository of models on the Hub")
    _repository_options(push)


def _add_archs(commands: _Commands) -> None:
    archs = commands.add_parser(
        "archs",
        help="the known families, or one as a file for --arch",
        description="Lists the families of models that are known, or prints one as TOML, to start"
        " from for --arch.",
    )
    archs.add_argument("name", metavar="NAME", nargs="?", help="print this one's declaration")
    archs.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _arch_option(archs)


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole method on the embedded pair, offline",
        description="Maps, searches and merges a pair of tiny models that comes with the package,"
        " and tells\nhow many questions base, donor and result answer right. Takes about a minute.",
    )
    demo.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        type=values.path,
        help="keep pair, questions and result here; default: a new folder for temporary files",
    )
    demo.add_argument("--alpha", type=values.alpha, help="merge at this; default: search for it")
    demo.add_argument(
        "--export",
        metavar="DIR",
        type=values.path,
        help="only write pair and questions there, for the other commands",
    )


def _pair_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    options: dict[str, Any] = {"type": at_home, **({"nargs": nargs} if nargs else {})}
    where = "folder, file or Hub id, org/name[@revision], of the model"
    parser.add_argument("base", metavar="BASE", help=f"{where} that is kept", **options)
    parser.add_argument("donor", metavar="DONOR", help=f"{where} that is blended in", **options)
    parser.add_argument(
        "--embeddings",
        choices=("merge", "keep"),
        default="merge",
        help="join embedding and head rows by token (default), or keep the base's",
    )
    parser.add_argument(
        "--dtype",
        type=values.dtype,
        help="of the output: bf16, fp16 or fp32; default: each base tensor's own",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "nf4"),
        help="the output's linear layers, with bitsandbytes, and the search's model; default: none",
    )
    _arch_option(parser)


def _arch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        metavar="FILE",
        type=at_home,
        action="append",
        help="a family declared in TOML, as `archs NAME` prints them; goes before the known ones;"
        " may be repeated",
    )


def _no_cache_option(parser: _Options) -> None:
    parser.add_argument(
        "--no-cache", action="store_true", help="of Hub ids: stream the tensors and store nothing"
    )


def _trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that lies beside the base's weights, where a search or --quantize"
        " needs it",
    )


def _repository_options(parser: _Options) -> None:
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--replace-repo",
        action="store_true",
        help="upload also to a repository that holds other files, and delete those",
    )


def _placement_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "where the search's model goes", "By default what fits best into the memory that is free."
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda if it fits there, in 4 bit if need be",
    )
    group.add_argument(
        "--live-quantize",
        choices=("none", "int8", "nf4"),
        help="of the loaded model alone; default: --quantize, or what fits",
    )
    group.add_argument(
        "--live-dtype",
        metavar="DTYPE",
        type=values.dtype,
        help="of the loaded model alone; default: the output's",
    )
    group.add_argument(
        "--vram",
        metavar="SIZE",
        type=values.size_or_zero,
        help="plan with so much memory of the card, such as 8GB; 0: without a card",
    )
    group.add_argument(
        "--ram",
        metavar="SIZE",
        type=values.size,
        help="plan with so much main memory, such as 16GB",
    )
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=values.count,
        help="questions answered at a time; default: 8, or what fits",
    )


def _search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    _prompt_options(group)
    _grid_options(group)
    _answer_options(group)
    _placement_options(parser)


def _prompt_options(group: _Options) -> None:
    group.add_argument(
        "--prompts",
        metavar="SET",
        type=at_home,
        help="unlabelled questions: JSON Lines, a folder of images, Parquet, or a Hub dataset"
        " (org/name[:config][@revision])",
    )
    group.add_argument("--question", metavar="TEXT", help="asked of each image of a folder")
    group.add_argument(
        "--split", metavar="NAME", help="of a Hub dataset; default: test, validation or train"
    )
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="of Parquet or a Hub dataset; default: prompt, question, query, instruction or text",
    )
    group.add_argument(
        "--image-column",
        metavar="NAME",
        action="append",
        help="of Parquet or a Hub dataset; may be repeated; default: image, images, image_1, ...",
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=values.count,
        default=100,
        help="ask so many of the questions, drawn at random; default: 100",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=values.natural,
        default=0,
        help="of drawing and resampling questions; default: 0",
    )


def _grid_options(group: _Options) -> None:
    group.add_argument(
        "--alphas",
        type=values.grid,
        help="those to try: 0,0.1,0.2 or start:stop:step; default: 0:0.6:0.1",
    )
    group.add_argument(
        "--refine",
        metavar="N",
        type=values.natural,
        default=0,
        help="then halve the step around the best alpha, N times; two more alphas each; default: 0",
    )
    group.add_argument(
        "--refine-layers",
        metavar="N",
        type=values.count,
        help="then find an alpha for each of N groups of layers: 4 more passes over the prompts"
        " a group",
    )
    group.add_argument(
        "--measure",
        choices=get_args(Measure),
        default="pairwise",
        help="the paper's Algorithm 1 (default), its Appendix B, embedding distance, or ours:"
        " Algorithm 1's D relative to how many answers have left the base's",
    )


def _answer_options(group: _Options) -> None:
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=values.count,
        default=64,
        help="of an answer, at most; default: 64",
    )
    group.add_argument(
        "--no-drafts",
        action="store_true",
        help="generate every token anew, not only from where an answer differs from the last",
    )
    group.add_argument(
        "--no-vision-cache",
        action="store_true",
        help="encode the images again at every alpha",
    )
    group.add_argument(
        "--no-noise",
        action="store_true",
        help="do not ask twice at the chosen alpha, to see how many answers differ by chance",
    )
