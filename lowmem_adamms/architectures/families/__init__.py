"""The architectures that are declared, as data: what the names in a file do not tell by themselves.

A decoder that is spelled as one of these is read without an entry of its own.

Each entry tells how its checkpoints are spelled on the Hub and by transformers' save_pretrained
(`layout.Arch` explains the fields), with the source of its names beside it. `shared_ids` come from
the tokenizers of the ancestors: how many leading ids no descendant has reassigned.

    spelling  what several declarations share
    llama     Llama, Mistral and SmolLM2, and what descends from them
    qwen      Qwen, Qwen2, Qwen2.5 and Qwen3, likewise
    others    InternLM2, Phi-3, Gemma 2, OLMo 2, Inkling, ERNIE 4.5 VL and gpt-oss
"""

from __future__ import annotations

from ..arch import Arch
from . import llama, others, qwen
from .spelling import LLAMA

# Of two that explain all tensors of a checkpoint which announces neither, the first is taken.
ARCHS = (*llama.ARCHS, *qwen.ARCHS, *others.ARCHS)

UNDECLARED = Arch(
    name="undeclared",
    source="",
    classes=(),
    spellings=(),
    decoder={
        **dict.fromkeys(
            (
                *("embed_tokens.weight", "embeddings.weight", "embed_in.weight", "wte.weight"),
                *("word_embeddings.weight", "tok_embeddings.weight", "embed.weight"),
            ),
            "embed",
        ),
        **dict.fromkeys(
            ("final_layernorm.weight", "final_layer_norm.weight", "norm_f.weight", "ln_f.weight"),
            "norm",
        ),
        **LLAMA,
    },
)
"""A decoder that no declaration spells: what it does not share with Llama is a role by its name."""
