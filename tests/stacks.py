"""One tiny mixture of experts in every form that is found on disk, with numpy alone.

A text is a dictionary of arrays: `embed`, `norm`, `head`, for each layer `0.q`, …, `0.router`, and
`0.gate`, `0.up`, `0.down` of all experts, [experts, rows, columns]. What is stacked, transposed or
interleaved is written as the authors' code reads it, without any of the package's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"
Arrays: TypeAlias = dict[str, Array]

HIDDEN, INNER, EXPERTS, ROWS, LAYERS = 16, 12, 3, 24, 2


def ancestor(
    seed: int = 0, *, inner: int = INNER, experts: int = EXPERTS, bias: bool = True
) -> Arrays:
    """A random decoder whose experts have biases or not; its first layer is dense."""
    random = np.random.default_rng(seed)
    dense = {"gate": (inner, HIDDEN), "up": (inner, HIDDEN), "down": (HIDDEN, inner)}
    sparse: dict[str, tuple[int, ...]] = {"router": (experts, HIDDEN)}
    for name, shape in dense.items():
        sparse[name] = (experts, *shape)
        if bias:
            sparse[f"{name}.bias"] = (experts, shape[0])
    attention = dict.fromkeys("qkvo", (HIDDEN, HIDDEN)) | {"norm1": (HIDDEN,), "norm2": (HIDDEN,)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (ROWS, HIDDEN), "norm": (HIDDEN,)}
    shapes["head"] = shapes["embed"]
    for layer in range(LAYERS):
        of_layer = {**attention, **(sparse if layer else dense)}
        shapes |= {f"{layer}.{name}": shape for name, shape in of_layer.items()}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def descend(text: Arrays, seed: int) -> Arrays:
    """A fine-tune: every weight a little off."""
    random = np.random.default_rng(1000 + seed)
    return {
        name: (array + 0.1 * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in text.items()
    }


# Forms of the experts of one layer


def each(part: Arrays) -> Arrays:
    """A tensor for each expert and matrix: Qwen3-MoE, DeepSeek, GLM, ERNIE."""
    out = {"mlp.gate.weight": part["router"]}
    for expert in range(len(part["router"])):
        for name in ("gate", "up", "down"):
            stem = f"mlp.experts.{expert}.{name}_proj"
            out[f"{stem}.weight"] = part[name][expert]
            if f"{name}.bias" in part:
                out[f"{stem}.bias"] = part[f"{name}.bias"][expert]
    return out


def stacked(part: Arrays) -> Arrays:
    """What transformers 5 has in memory: [experts, gate rows then up rows, hidden]."""
    out = {
        "mlp.gate.weight": part["router"],
        "mlp.experts.gate_up_proj": np.concatenate([part["gate"], part["up"]], axis=1),
        "mlp.experts.down_proj": part["down"],
    }
    if "up.bias" in part:
        out["mlp.experts.gate_up_proj_bias"] = np.hstack([part["gate.bias"], part["up.bias"]])
        out["mlp.experts.down_proj_bias"] = part["down.bias"]
    return out


def transposed(part: Arrays) -> Arrays:
    """Qwen3-VL on the Hub, Llama 4: [experts, hidden, gate columns then up columns]."""
    out = stacked(part)
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        out[name] = out[name].swapaxes(1, 2)
    return out


def interleaved(part: Arrays) -> Arrays:
    """gpt-oss: transposed, and the columns of gate and up alternate."""
    gate_up = np.stack([part["gate"], part["up"]], axis=2)  # [experts, inner, 2, hidden]
    return {
        "mlp.router.weight": part["router"],
        "mlp.experts.gate_up_proj": gate_up.reshape(len(gate_up), -1, HIDDEN).swapaxes(1, 2),
        "mlp.experts.gate_up_proj_bias": np.stack([part["gate.bias"], part["up.bias"]], 2).reshape(
            len(gate_up), -1
        ),
        "mlp.experts.down_proj": part["down"].swapaxes(1, 2),
        "mlp.experts.down_proj_bias": part["down.bias"],
    }


def interleaved_rows(part: Arrays) -> Arrays:
    """As Inkling's w13: the rows of gate and up alternate."""
    gate_up = np.stack([part["gate"], part["up"]], axis=2)
    return stacked(part) | {
        "mlp.experts.gate_up_proj": gate_up.reshape(len(gate_up), -1, HIDDEN),
        "mlp.experts.gate_up_proj_bias": interleaved(part)["mlp.experts.gate_up_proj_bias"],
    }


def apart(part: Arrays) -> Arrays:
    """Step-3.7: a stack each of gate, up and down, and a transposed router as ERNIE-4.5-VL's."""
    out = {"moe.gate.weight": part["router"].T}
    for name in ("gate", "up", "down"):
        out[f"moe.{name}_proj.weight"] = part[name]
        out[f"moe.{name}_proj.bias"] = part[f"{name}.bias"]
    return out


FORMS: dict[str, Callable[[Arrays], Arrays]] = {
    form.__name__: form
    for form in (each, stacked, transposed, interleaved, interleaved_rows, apart)
}
CLASSES = {
    "stacked": "StackedForCausalLM",
    "transposed": "StackedForCausalLM",
    "interleaved": "GptOssForCausalLM",
    "interleaved_rows": "RowsForCausalLM",
}


def spell(text: Arrays, form: str) -> Arrays:
    """The tensors of a checkpoint in one form."""
    out = {
        "model.embed_tokens.weight": text["embed"],
        "model.norm.weight": text["norm"],
        "lm_head.weight": text["head"],
    }
    for layer in range(LAYERS):
        stem = f"{layer}."
        part = {name.removeprefix(stem): a for name, a in text.items() if name.startswith(stem)}
        written = {f"self_attn.{name}_proj.weight": part[name] for name in "qkvo"}
        written["input_layernorm.weight"] = part["norm1"]
        written["post_attention_layernorm.weight"] = part["norm2"]
        if "router" in part:
            written |= FORMS[form](part)
        else:
            written |= {f"mlp.{name}_proj.weight": part[name] for name in ("gate", "up", "down")}
        out |= {f"model.layers.{layer}.{name}": array for name, array in written.items()}
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def write(folder: Path, tensors: Arrays, form: str) -> Path:
    """A checkpoint folder of these tensors."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    has_bias = any(name.endswith("proj_bias") for name in tensors)
    config = {
        "architectures": [CLASSES[form] if has_bias else "Qwen3MoeForCausalLM"],
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
