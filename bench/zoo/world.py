"""The small world the zoo's models live in: pictures with facts, questions about them, and text.

A Scene is a picture of 48 by 48 pixels and what is true of it; every question has one short right
answer. Digits are handwriting from scikit-learn's set (Alpaydin and Kaynak, 1998), words are set in
real fonts. Everything follows from a seed.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 48
SCALE = 3  # pictures are drawn this much larger, then reduced
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 160),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
    "centre": (0.5, 0.5),
}
NUMBERS = ("one", "two", "three", "four", "five")
WORDS = (
    "lamp", "tree", "moon", "ship", "bread", "milk", "king", "rock",
    "wolf", "sand", "door", "fish", "cup", "hand", "bird", "glass",
)  # fmt: skip
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
OPPOSITES = {"hot": "cold", "big": "small", "old": "new", "fast": "slow", "high": "low"}
OPPOSITES |= {"wet": "dry", "dark": "light", "full": "empty", "open": "closed", "rich": "poor"}

ASK: Mapping[str, Sequence[str]] = {
    "colour": ("What colour is it?", "Which colour does it have?", "Name the colour."),
    "shape": ("What shape is it?", "Which shape is shown?", "Name the shape."),
    "place": ("Where is it?", "In which part of the picture is it?", "Name its place."),
    "count": ("How many are there?", "Count the objects.", "What is their number?"),
    "digit": ("Which digit is written?", "Read the digit.", "What digit is this?"),
    "word": ("What does the sign say?", "Read the word.", "Which word is written?"),
    "chart": ("Which bar is the tallest?", "What colour is the tallest bar?", "Name the top bar."),
}
"""How each question about a picture may be worded."""
TELL = ("What is in the picture?", "Describe the picture.", "Tell what you see.")
ASK_TEXT: Mapping[str, Sequence[str]] = {
    "sum": ("What is {} plus {}?", "Add {} and {}.", "Sum of {} and {}?"),
    "opposite": ("What is the opposite of {}?", "Name the opposite of {}.", "Not {} but what?"),
    "letter": ("What is the first letter of {}?", "With which letter does {} begin?"),
}
TASKS = (*ASK, *ASK_TEXT)
ASK_LETTERS = ("How many letters has {}?", "Count the letters of {}.", "How long is the word {}?")
"""A task that only one member, which reads but does not see, is taught."""
LENGTHS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, uint8 [48, 48, 3]; what it shows in words; the answer to each task it serves."""

    pixels: Any
    caption: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a task; scene is None for text alone."""

    task: str
    text: str
    answer: str
    scene: Scene | None = None


def scenes(count: int, seed: int, *, held_out: bool) -> list[Scene]:
    """`count` scenes of all kinds in turn; handwriting for training and for tests never mixes."""
    dice = random.Random(seed)
    # Handwriting and words twice: they are the hardest to learn
    kinds = (_shape, _count, _digit, _word, _chart, _digit, _word)
    return [kinds[i % len(kinds)](dice, held_out) for i in range(count)]


def questions(scenes: Sequence[Scene], seed: int) -> list[Question]:
    """One question for every fact of every scene, each worded at random."""
    dice = random.Random(seed)
    return [
        Question(task, dice.choice(ASK[task]), answer, scene)
        for scene in scenes
        for task, answer in scene.facts.items()
    ]


def text_question(dice: random.Random) -> Question:
    """One question that needs no picture."""
    task = dice.choice(tuple(ASK_TEXT))
    subject: tuple[str, ...]
    if task == "sum":
        a, b = dice.randrange(10), dice.randrange(10)
        subject, answer = (str(a), str(b)), str(a + b)
    elif task == "opposite":
        pair = list(dice.choice(tuple(OPPOSITES.items())))
        dice.shuffle(pair)
        subject, answer = (pair[0],), pair[1]
    else:
        word = dice.choice((*WORDS, *COLOURS, *SHAPES))
        subject, answer = (word,), word[0]
    return Question(task, dice.choice(ASK_TEXT[task]).format(*subject), answer)


def letters_question(dice: random.Random) -> Question:
    """One question about the length of a word."""
    word = dice.choice((*WORDS, *COLOURS, *SHAPES, *(w for p in OPPOSITES.items() for w in p)))
    return Question("letters", dice.choice(ASK_LETTERS).format(word), LENGTHS[len(word) - 3])


def told(dice: random.Random) -> Scene:
    """A scene without its picture, to be read about."""
    facts = dice.choice((_shape_facts, _count_facts, _digit_facts, _word_facts, _chart_facts))
    caption, answers = facts(dice)[:2]
    return Scene(None, caption, answers)


# What is true


def _shape_facts(dice: random.Random) -> tuple[str, dict[str, str]]:
    colour, shape = dice.choice(tuple(COLOURS)), dice.choice(SHAPES)
    place = dice.choice(tuple(PLACES))
    facts = {"colour": colour, "shape": shape, "place": place}
    return f"a {colour} {shape} in the {place}", facts


def _count_facts(dice: random.Random) -> tuple[str, dict[str, str]]:
    number, colour = dice.choice(NUMBERS), dice.choice(tuple(COLOURS))
    shape = dice.choice(SHAPES)
    return f"{number} {colour} {shape}s", {"count": number, "colour": colour, "shape": shape}


def _digit_facts(dice: random.Random) -> tuple[str, dict[str, str]]:
    digit = str(dice.randrange(10))
    return f"a handwritten {digit}", {"digit": digit}


def _word_facts(dice: random.Random) -> tuple[str, dict[str, str]]:
    word = dice.choice(WORDS)
    return f"a sign that says {word}", {"word": word}


def _chart_facts(dice: random.Random) -> tuple[str, dict[str, str], list[str], list[int]]:
    names, heights = dice.sample(tuple(COLOURS), 3), dice.sample((1, 2, 3), 3)
    level = ("low", "middle", "tall")
    bars = ", ".join(f"{level[h - 1]} {name}" for name, h in zip(names, heights, strict=True))
    facts = {"chart": names[heights.index(3)]}
    return f"bars: {bars}", facts, names, heights


# How it looks


def _shape(dice: random.Random, held_out: bool) -> Scene:
    caption, facts = _shape_facts(dice)
    image, draw = _paper(dice)
    x, y = (SIDE * SCALE * p + dice.uniform(-8, 8) for p in PLACES[facts["place"]])
    _figure(draw, facts["shape"], _ink(facts["colour"], dice), x, y, dice.uniform(20, 30))
    return Scene(_small(image), caption, facts)


def _count(dice: random.Random, held_out: bool) -> Scene:
    caption, facts = _count_facts(dice)
    image, draw = _paper(dice)
    cells = dice.sample([(x, y) for x in range(3) for y in range(3)], 5)
    for x, y in cells[: NUMBERS.index(facts["count"]) + 1]:
        ink = _ink(facts["colour"], dice)
        right, down = (SIDE * SCALE * (c + 0.5) / 3 + dice.uniform(-3, 3) for c in (x, y))
        _figure(draw, facts["shape"], ink, right, down, dice.uniform(16, 19))
    return Scene(_small(image), caption, facts)


def _digit(dice: random.Random, held_out: bool) -> Scene:
    from PIL import Image, ImageChops

    caption, facts = _digit_facts(dice)
    strokes = _handwriting(held_out)[int(facts["digit"])]
    size = dice.randint(36, 44)
    mask = Image.fromarray(dice.choice(strokes)).resize((size, size), Image.Resampling.BICUBIC)
    image, _ = _paper(dice)
    image = image.resize((SIDE, SIDE))
    x, y = dice.randint(0, SIDE - size), dice.randint(0, SIDE - size)
    dark = Image.new("RGB", mask.size, tuple(dice.randint(0, 70) for _ in "rgb"))
    image.paste(dark, (x, y), ImageChops.multiply(mask, mask.point(lambda v: 255 if v > 40 else v)))
    return Scene(np.asarray(image), caption, facts)


def _word(dice: random.Random, held_out: bool) -> Scene:
    caption, facts = _word_facts(dice)
    image, draw = _paper(dice)
    font = _font(dice.choice(FONTS), dice.randint(42, 47))
    left, top, right, bottom = draw.textbbox((0, 0), facts["word"], font=font)
    room = SIDE * SCALE
    x = dice.uniform(0, max(room - (right - left), 0)) - left
    y = dice.uniform(0.3, 0.7) * (room - (bottom - top)) - top
    draw.text((x, y), facts["word"], font=font, fill=tuple(dice.randint(0, 70) for _ in "rgb"))
    return Scene(_small(image), caption, facts)


def _chart(dice: random.Random, held_out: bool) -> Scene:
    caption, facts, names, heights = _chart_facts(dice)
    image, draw = _paper(dice)
    room = SIDE * SCALE
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        x = 12 + i * 43 + dice.uniform(-3, 3)
        top = room - 8 - height * 40 + dice.uniform(-8, 8)
        draw.rectangle((x, top, x + 32, room - 6), fill=_ink(name, dice))
    return Scene(_small(image), caption, facts)


def _paper(dice: random.Random) -> tuple[Image, Any]:
    from PIL import Image, ImageDraw

    shade = dice.randint(205, 255)
    tint = tuple(min(255, shade + dice.randint(-8, 8)) for _ in "rgb")
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), tint)
    return image, ImageDraw.Draw(image)


def _small(image: Image) -> Any:
    from PIL import Image

    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _ink(colour: str, dice: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, v + dice.randint(-12, 12))) for v in COLOURS[colour])


def _figure(draw: Any, shape: str, ink: tuple[int, ...], x: float, y: float, r: float) -> None:
    box = (x - r, y - r, x + r, y + r)
    thick = r * 0.42
    if shape == "circle":
        draw.ellipse(box, fill=ink)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=ink)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=ink)
    elif shape == "cross":
        draw.rectangle((x - thick / 2, y - r, x + thick / 2, y + r), fill=ink)
        draw.rectangle((x - r, y - thick / 2, x + r, y + thick / 2), fill=ink)
    else:
        draw.ellipse(box, outline=ink, width=round(thick))


@cache
def _font(name: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(name, size)


@cache
def _handwriting(held_out: bool) -> Mapping[int, list[Any]]:
    """Strokes, uint8 [8, 8], by digit; every fifth of the set is kept for tests."""
    raw = importlib.import_module("sklearn.datasets").load_digits()
    out: dict[int, list[Any]] = {digit: [] for digit in range(10)}
    for i, (pixels, digit) in enumerate(zip(raw.images, raw.target, strict=True)):
        if (i % 5 == 0) == held_out:
            out[int(digit)].append((pixels * (255 / 16)).astype(np.uint8))
    return out
