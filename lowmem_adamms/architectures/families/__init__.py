"""The declarations: every architecture we know, as data. A new family is one more entry.

Each entry tells how its checkpoints are spelled on the Hub and by transformers' save_pretrained
(`arch.Arch` explains the fields), with the source of its names beside it. They stand under the
language model they descend from: `llama.py` (with Mistral and SmolLM2), `qwen.py`, `others.py`
(InternLM2, Phi-3, Gemma, OLMo 2); `spelling.py` has what they share. `shared_ids` come from the
tokenizers of the ancestors: how many leading ids no descendant has reassigned.
"""

from __future__ import annotations

from . import llama, others, qwen

# Of two that explain all tensors of a checkpoint which announces neither, the first is taken.
ARCHS = (*llama.ARCHS, *qwen.ARCHS, *others.ARCHS)
