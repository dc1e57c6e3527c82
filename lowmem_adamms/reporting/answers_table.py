"""The search report's answers: those that change over the grid, with images, and those that do not.

Leaves to others: which answers count as equal (`answers.py`).
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..prompts import Prompt
from ..searching.answer_text import normalise
from .markup import cell, counted, css, marked, plain, prose, row
from .view import Run, View, runs

SHOWN_CHANGING = 200  # prompts in the table of changes; each may bring images
SHOWN_STEADY = 500  # prompts in the list of those that never change
SHOWN_IMAGES = 4  # of one prompt
SHORT_ANSWER, SHORT_PROMPT = 160, 260
THUMBNAIL = 96  # pixels, the longer side
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # those that run no other program


def answers(view: View, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts whose answers change, most changeable first; then those that never change."""
    grid = [view.result.answers.get(alpha, ()) for alpha in view.alphas]
    count = min(map(len, grid), default=0)
    if not count:
        return []
    chosen = view.alphas.index(view.result.alpha) if view.result.alpha in view.alphas else None
    asked = [*prompts[:count], *(Prompt("") for _ in range(count - len(prompts)))]
    every = [(i, p, runs([row[i] for row in grid], chosen)) for i, p in enumerate(asked)]
    changing = sorted(
        (item for item in every if len(item[2]) > 1),
        key=lambda item: (-len(item[2]), -len({normalise(run.answer) for run in item[2]}), item[0]),
    )
    steady = [item for item in every if len(item[2]) == 1]
    return [
        '<section class="changes"><h2>Answers that change</h2>',
        *_changing(view, changing, chosen),
        *_steady(steady),
        "</section>",
    ]


_Item = tuple[int, Prompt, tuple[Run, ...]]


def _changing(view: View, items: Sequence[_Item], chosen: int | None) -> list[str]:
    if not items:
        return ["<p>No answer changes over the grid.</p>"]
    shown, cache = items[:SHOWN_CHANGING], dict[Path, str]()
    left = len(items) - len(shown)
    said = (
        f"{counted(len(items), 'prompt')} of {view.result.prompts:,}, those that change most first."
    )
    if left:
        said += f" The {left:,} that change least are left out here."
    heads = "".join(
        f'<th scope="col"{css(i == chosen, "chosen")}>{view.name(alpha)}</th>'
        for i, alpha in enumerate(view.alphas)
    )
    return [
        f'<div class="bar-above"><p class="muted">{said} Neighbouring alphas with the same answer'
        " share a cell; the chosen alpha's is marked.</p>",
        '<label id="filter" hidden>Filter <input type="search" autocomplete="off"></label></div>',
        '<table class="answers"><caption>Answers by prompt and alpha</caption>',
        f'<colgroup><col class="asked"><col span="{len(view.alphas)}"></colgroup>',
        f'<thead><tr><th scope="col">prompt</th>{heads}</tr></thead><tbody>',
        *(_change(view, item, chosen, cache) for item in shown),
        "</tbody></table>",
    ]


def _change(view: View, item: _Item, chosen: int | None, cache: dict[Path, str]) -> str:
    i, prompt, found = item
    cells = [
        f'<td colspan="{run.last - run.first + 1}"'
        f"{css(chosen is not None and run.first <= chosen <= run.last, 'chosen')}>"
        f'<span class="range">{view.span(run)}</span>'
        f"{prose(run.answer, SHORT_ANSWER, _parting(run.answer, other.answer))}</td>"
        for run, other in zip(found, (found[1], *found), strict=False)
    ]
    images = "".join(
        _image(image, k, cache) for k, image in enumerate(prompt.images[:SHOWN_IMAGES])
    )
    if (more := len(prompt.images) - SHOWN_IMAGES) > 0:
        images += f'<span class="file">and {more} more</span>'
    return (
        f'<tr><th scope="row"><div class="asked"><div class="images">{images}</div>'
        f"<div>{_asked(i, prompt)}</div></div></th>{''.join(cells)}</tr>"
    )


def _parting(text: str, other: str) -> int:
    """Where an answer parts from its neighbour's."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _asked(i: int, prompt: Prompt) -> str:
    """A prompt's text, and where it stands unless that is the text (recorded answers)."""
    text = prose(prompt.text, SHORT_PROMPT) if prompt.text else ""
    if prompt.id and prompt.id == prompt.text:
        return text
    return f'{text}<p class="muted">{marked(prompt.id[:SHORT_PROMPT]) or f"prompt {i + 1}"}</p>'


def _image(image: Path | bytes, position: int, cache: dict[Path, str]) -> str:
    """A thumbnail as a data URI, or the file's name where it cannot be shown."""
    name = image.name if isinstance(image, Path) else f"image {position + 1}"
    if not isinstance(image, Path):
        uri = _thumbnail(image)
    elif image in cache:
        uri = cache[image]
    else:
        uri = cache[image] = _thumbnail(image)
    if not uri:
        return f'<span class="file">{plain(name)}</span>'
    return f'<img src="{uri}" alt="{plain(name)}" title="{plain(name)}">'


def _thumbnail(image: Path | bytes) -> str:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = image if isinstance(image, Path) else io.BytesIO(image)
            with Image.open(source, formats=FORMATS) as opened:
                opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
                small = ImageOps.exif_transpose(opened).convert("RGBA")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        paper = Image.new("RGB", small.size, "white")
        paper.paste(small, mask=small.getchannel("A"))
        out = io.BytesIO()
        paper.save(out, "JPEG", quality=80)
    except Exception:  # a broken file raises whatever its decoder stumbled on; the name will do
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _steady(items: Sequence[_Item]) -> list[str]:
    if not items:
        return ["<p>Every prompt's answer changes somewhere.</p>"]
    shown = items[:SHOWN_STEADY]
    left = len(items) - len(shown)
    verb = "keeps its answer" if len(items) == 1 else "keep their answer"
    return [
        f'<details class="steady"><summary>{counted(len(items), "prompt")} {verb}'
        ' at every alpha</summary><table class="steady"><caption>Answers that never change'
        '</caption><thead><tr><th scope="col">prompt</th><th scope="col">answer</th></tr></thead>'
        "<tbody>",
        *(row(_asked(i, p), [cell(prose(found[0].answer, SHORT_ANSWER))]) for i, p, found in shown),
        "</tbody></table>",
        f'<p class="muted">{left:,} more are left out here.</p>' if left else "",
        "</details>",
    ]
