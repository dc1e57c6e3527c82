"""Tiny real checkpoints: what transformers itself writes, cut down to less than 2 MB.

`ancestor` is a random language model; `make` wraps a descendant of it (every weight plus a little
noise of its own) in a family's real model class with a random vision tower. `respell` and
`to_bin` turn the result into the other forms in which such checkpoints are published;
`add_processor` and `add_remote_code` make it a folder that answers questions about images.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from random_pair import (
    BASE_TOKENS,
    CHAT_TEMPLATE,
    DONOR_TOKENS,
    SHARED_TOKENS,
    write_tokenizer,
)
from safetensors.torch import load_file

from lowmem_adamms.live.transformers_model import quiet

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Rename = Callable[[str], "str | None"]

HIDDEN, INNER, HEADS, LAYERS, ROWS = 64, 96, 4, 2, 320
NOISE = 0.1  # of each tensor's RMS: cosine 0.995 with the ancestor, 0.99 with a sibling
PATCH, SIDE = 14, 28
ODD_BYTES = slice(94, 256)  # ids of the bytes that are no printable ASCII
REMOTE = Path(__file__).parent / "remote"
IDEFICS_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


@dataclass(frozen=True, slots=True)
class Kind:
    """A line of descent: what sets its decoder apart, and how many of its rows are real tokens.

    As in life, Llama's vocabulary fills its rows and Qwen's leaves padding at the end. `ending`
    lengthens the head's row for the end of the turn, so that some short answers reach it.
    """

    kv_heads: int
    head_dim: int
    tokens: int
    ending: float = 1.6
    bias: bool = False
    qk_norm: bool = False


KINDS = {
    "llama": Kind(kv_heads=HEADS, head_dim=16, tokens=ROWS),
    "mistral": Kind(kv_heads=2, head_dim=16, tokens=ROWS),
    "qwen2": Kind(kv_heads=2, head_dim=16, tokens=307, ending=2.3, bias=True),
    # Heads that together are wider than the hidden size, as in Qwen3-4B
    "qwen3": Kind(kv_heads=2, head_dim=32, tokens=307, ending=2.3, qk_norm=True),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Of `make`. seed: of the noise, the added rows and the vision tower. vocab: rows of embed."""

    seed: int = 1
    dtype: str = "bfloat16"
    noise: float = NOISE
    max_shard_size: str = "200KB"
    tied: bool = False
    vocab: int = ROWS


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def seen(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and every folder as such."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in sorted(folder.rglob("*"))
    }


def ancestor(kind: str, seed: int = 0, *, layers: int = LAYERS, tied: bool = False) -> Tensors:
    """A random language model in float32, named as transformers names a text model's modules."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) / math.sqrt(shape[-1])

    out = {"embed_tokens.weight": draw(ROWS, HIDDEN), "norm.weight": 1 + draw(HIDDEN)}
    for layer in range(layers):
        for name, shape in _layer_shapes(KINDS[kind]).items():
            # Norms scatter around one, and no bias is zero: two mixed-up layers must differ
            out[f"layers.{layer}.{name}"] = draw(*shape) + ("norm" in name)
    out["lm_head.weight"] = out["embed_tokens.weight"].clone() if tied else draw(ROWS, HIDDEN)
    if not tied:
        _temper(out["lm_head.weight"], KINDS[kind])
    return out


def _temper(head: torch.Tensor, kind: Kind) -> None:
    """Scale rows so that greedy answers are legible and end: long rows win, short ones seldom."""
    head[ODD_BYTES] *= 0.2
    head[kind.tokens - len(SHARED_TOKENS) : kind.tokens - 1] *= 0.2
    head[kind.tokens - 1] *= kind.ending


def _layer_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    wide, narrow = HEADS * kind.head_dim, kind.kv_heads * kind.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (wide, HIDDEN),
        "self_attn.k_proj.weight": (narrow, HIDDEN),
        "self_attn.v_proj.weight": (narrow, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, wide),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    if kind.bias:
        rows = {"q": wide, "k": narrow, "v": narrow}
        shapes |= {f"self_attn.{role}_proj.bias": (n,) for role, n in rows.items()}
    if kind.qk_norm:
        shapes |= {f"self_attn.{role}_norm.weight": (kind.head_dim,) for role in "qk"}
    return shapes


def descend(
    parent: Tensors,
    seed: int,
    *,
    noise: float = NOISE,
    vocab: int = ROWS,
    fresh: slice | None = None,
) -> Tensors:
    """The ancestor plus noise; rows beyond its vocabulary and the `fresh` ones are drawn anew."""
    random = torch.Generator().manual_seed(seed)
    out = {}
    for name, old in parent.items():
        new = old + noise * old.square().mean().sqrt() * torch.randn(old.shape, generator=random)
        if name in ("embed_tokens.weight", "lm_head.weight"):
            drawn = torch.randn(vocab, HIDDEN, generator=random) * HIDDEN**-0.5
            if name == "lm_head.weight":
                drawn *= 0.2  # padding and image tokens are no part of an answer
            kept = torch.arange(vocab) < len(old)
            if fresh is not None:
                kept[fresh] = False
            drawn[kept] = new[:vocab][kept[: len(old)]]
            new = drawn
        out[name] = new
    return out


# Factories


@dataclass(frozen=True, slots=True)
class Family:
    """A vision family: its classes' common name, its line, and its config beside the decoder's."""

    name: str
    line: str
    config: Config
    vocab: int = ROWS


TEXT = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def make(family: str, folder: Path, *, ancestor: Tensors, **options: Any) -> Path:
    """A checkpoint of a family, descended from `ancestor`. options: fields of `Options`.

    No two families share their noise, whatever their seeds.
    """
    made = Options(**options)
    if family in VISION and "vocab" not in options:
        made = replace(made, vocab=VISION[family].vocab)
    name = TEXT.get(family) or (VISION[family].name if family in VISION else family)
    made = replace(made, seed=crc32(f"{name} {made.seed}".encode()))
    if family in TEXT:
        return _make_text(TEXT[family], folder, ancestor, made)
    if family in VISION:
        return _make_vision(VISION[family], folder, ancestor, made)
    return {"cogvlm": _make_cogvlm, "mplug_owl2": _make_mplug_owl2}[family](folder, ancestor, made)


def _make_cogvlm(folder: Path, ancestor: Tensors, options: Options) -> Path:
    """A checkpoint spelled as CogVLM: a second expert for image tokens, q, k and v fused."""
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    out: Tensors = {}
    # The vision expert began as a copy of the ancestor, and was trained on its own
    for offset, expert in enumerate(("language", "vision")):
        text = descend(ancestor, options.seed + offset, noise=options.noise)
        for layer in _layers(text):
            qkv = [text[f"{layer}.self_attn.{role}_proj.weight"] for role in "qkv"]
            attention = f"model.{layer}.self_attn.{expert}_expert"
            out[f"{attention}_query_key_value.weight"] = torch.cat(qkv)
            out[f"{attention}_dense.weight"] = text[f"{layer}.self_attn.o_proj.weight"]
            for name in names:
                spelled = name.replace("mlp.", f"mlp.{expert}_mlp.")
                out[f"model.{layer}.{spelled}.weight"] = text[f"{layer}.{name}.weight"]
            if expert == "language":
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    out[f"model.{layer}.{norm}.weight"] = text[f"{layer}.{norm}.weight"]
        if expert == "language":
            out |= _ends(text)
    config = {
        "architectures": ["CogVLMForCausalLM"],
        **_text_config("llama", ancestor, Options()),
        "template_version": "chat",
        "vision_config": _COGVLM_CONFIG,
    }
    # Its remote code gives the class no model_type, and knows no grouped queries
    del config["num_key_value_heads"]
    out |= _draw_vision("cogvlm", "CogVLM", config, options.seed)
    return _write(folder, out, config, options)


def _make_mplug_owl2(folder: Path, ancestor: Tensors, options: Options) -> Path:
    """A checkpoint spelled as mPLUG-Owl2: k, v and both norms twice, and float32 `inv_freq`."""
    ways = [descend(ancestor, options.seed + way, noise=options.noise) for way in (0, 1)]
    doubled = ("k_proj", "v_proj", "input_layernorm", "post_attention_layernorm")
    out = _ends(ways[0])
    for layer in _layers(ancestor):
        for name in _layer_shapes(KINDS["llama"]):
            stem = f"{layer}.{name}".removesuffix(".weight")
            if stem.endswith(doubled):
                for way, text in enumerate(ways):
                    out[f"model.{stem}.multiway.{way}.weight"] = text[f"{stem}.weight"]
            else:
                out[f"model.{stem}.weight"] = ways[0][f"{stem}.weight"]
    out |= inv_freq(len(_layers(ancestor)))
    config = {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "model_type": "mplug_owl2",
        "visual_config": _MPLUG_CONFIG,
        **_text_config("llama", ancestor, Options()),
    }
    out |= _draw_vision("mplug_owl2", "MPLUGOwl2", config, options.seed)
    return _write(folder, out, config, options)


def line_of(family: str) -> str:
    """The kind of ancestor that a family descends from."""
    if family in TEXT:
        return family
    return VISION[family].line if family in VISION else "llama"


# Other forms of the same checkpoint


def respell(folder: Path, rename: Rename, out: Path, *, extra: Tensors | None = None) -> Path:
    """Copy a checkpoint under other tensor names; a name that becomes None is left out."""
    tensors = dict(extra or {})
    for name, tensor in load(folder).items():
        new = rename(name)
        if new is not None:
            tensors[new] = tensor
    _copy_sidecars(folder, out)
    _save_tensors(tensors, out)
    return out


def to_bin(folder: Path, out: Path, *, max_shard_size: str = "200KB") -> Path:
    """Copy a checkpoint as sharded pickles with `pytorch_model.bin.index.json`."""
    _copy_sidecars(folder, out)
    tensors = load(folder)
    # Not save_torch_state_dict: it warns of pickles, which are what these tests are about
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        torch.save({name: tensors[name] for name in names}, out / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(out / "pytorch_model.bin.index.json", index)
    return out


def flat_config(folder: Path, **changes: Any) -> Path:
    """Rewrite config.json as older files have it, the language model's settings at top level.

    `changes` are made last; None removes a key.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.pop("text_config", {})
    text.pop("model_type", None)
    merged = {**text, **config, **changes}
    _write_json(path, {key: value for key, value in merged.items() if value is not None})
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Add a tokenizer whose ids agree with the factory's: shared ones, then the family's own.

    To be called before `flat_config` gives the folder another `model_type`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type", "")
    text = config.get("text_config", config).get("model_type", "")
    kind = "qwen2" if text.startswith("qwen") else "llama"
    added = {
        "llava": ("<image>",),
        "llava_next": ("<image>",),
        "llava_onevision": DONOR_TOKENS,
        "qwen2_vl": BASE_TOKENS,
        "qwen2_5_vl": BASE_TOKENS,
        "qwen3_vl": BASE_TOKENS,
        "idefics3": IDEFICS_TOKENS,
    }.get(family, ())
    with quiet():
        write_tokenizer(folder, added, size=KINDS[kind].tokens - len(SHARED_TOKENS))
    return folder


_TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_processor(folder: Path) -> Path:
    """Complete a checkpoint as on the Hub: tokenizer, processor, chat template, generation config.

    Text-only models get the tokenizer and a template, CogVLM no processor. As `add_tokenizer`, to
    be called before `flat_config`.
    """
    add_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type", "cogvlm")
    if family != "cogvlm" and family not in _PROCESSORS:
        path = folder / "tokenizer_config.json"
        _write_json(path, json.loads(path.read_bytes()) | {"chat_template": _TEXT_TEMPLATE})
        return folder
    for name, content in _PROCESSORS.get(family, {}).items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            _write_json(folder / name, content)
    qwen = family.startswith("qwen") or "onevision" in family
    last = KINDS["qwen2" if qwen else "llama"].tokens
    start = last - len(SHARED_TOKENS)
    ends = [last - 1, start] if "qwen" in family else last - 1
    ids = {"bos_token_id": start, "eos_token_id": ends, "pad_token_id": start}
    _write_json(folder / "generation_config.json", ids)
    return folder


def add_remote_code(folder: Path) -> Path:
    """Add the model code that a CogVLM or mPLUG-Owl2 repository brings, and name it in auto_map."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config.get("model_type", "cogvlm")
    for source in sorted((REMOTE / family).glob("*.py")):
        shutil.copy(source, folder)
    _write_json(path, {**config, "auto_map": _AUTO_MAPS[family]})
    return folder


def inv_freq(layers: int = LAYERS, head_dim: int = 16) -> Tensors:
    """The float32 rotary buffers that older Llama exports carry; for `respell`'s `extra`."""
    buffer = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": buffer.clone()
        for layer in range(layers)
    }


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint, from safetensors or, where there are none, from pickles."""
    out: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= load_file(path)
    if not out:
        for path in sorted(folder.glob("*.bin")):
            out |= torch.load(path, weights_only=True)
    return out


def load_model(folder: Path) -> Any:
    """The model that config.json names; fails if a tensor is missing or left over."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with quiet():
        model, report = _class(config["architectures"][0]).from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert not any(report.values()), report
    return model


# Spellings, for `respell`; each takes any name that transformers writes for these families


def modern(name: str) -> str:
    """Transformers' own module names: `model.language_model.`, `model.vision_tower.`, `lm_head.`"""
    for old, new in (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(visual|vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
        (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    ):
        name = re.sub(old, new, name)
    return name


def qwen_hub(name: str) -> str:
    """Qwen2-VL and Qwen2.5-VL on the Hub: `model.` and `visual.`."""
    name = modern(name).replace("model.language_model.", "model.", 1)
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def llava_hub(name: str) -> str:
    """The llava-hf repositories: `language_model.model.`, `vision_tower.vision_model.`."""
    for new, old in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if modern(name).startswith(new):
            return modern(name).replace(new, old, 1)
    return modern(name).removeprefix("model.")


def llava_original(name: str) -> str:
    """Liuhaotian and lmms-lab: `model.`, the tower twice wrapped, `model.mm_projector.`."""
    name = modern(name)
    for new, old in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(new):
            return name.replace(new, old, 1)
    return name


def llava_original_towerless(name: str) -> str | None:
    """As `llava_original`, without the tower: LLaVA-1.5 and ShareGPT4V fetch it elsewhere."""
    name = llava_original(name)
    return None if name.startswith("model.vision_tower.") else name


def headless(name: str) -> str | None:
    """What saving only the base model leaves (LlamaModel, Qwen2VLModel): no head, no `model.`."""
    return None if "lm_head" in name else name.removeprefix("model.")


# How the factories work


def _layers(text: Tensors) -> list[str]:
    count = sum(name.endswith("input_layernorm.weight") for name in text)
    return [f"layers.{layer}" for layer in range(count)]


def _text_config(kind: str, text: Tensors, options: Options) -> Config:
    return {
        "vocab_size": options.vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": len(_layers(text)),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KINDS[kind].kv_heads,
        "head_dim": KINDS[kind].head_dim,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": options.tied,
    }


def _class(name: str) -> Any:
    """From transformers, without its types: mypy reads them for most of a minute."""
    return getattr(importlib.import_module("transformers"), name)


def _make_text(name: str, folder: Path, parent: Tensors, options: Options) -> Path:
    config = _class(f"{name}Config")(**_text_config(name.lower(), parent, options))
    text = descend(parent, options.seed, noise=options.noise, vocab=options.vocab)
    return _save_model(_class(f"{name}ForCausalLM"), config, text, folder, options)


def _make_vision(family: Family, folder: Path, parent: Tensors, options: Options) -> Path:
    kind = KINDS[family.line]
    text_config = _text_config(family.line, parent, options)
    if not family.name.startswith("Qwen"):
        text_config["model_type"] = family.line
    else:
        # The three shares of the rotary dimensions: time, height, width; together half a head
        shares = {16: [2, 3, 3], 32: [6, 5, 5]}[kind.head_dim]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shares}
        text_config["rope_parameters"] = rope
    config = _class(f"{family.name}Config")(
        text_config=text_config, tie_word_embeddings=options.tied, **family.config
    )
    # Each family trained its own tokens on these ids: the rows have nothing in common
    fresh = slice(kind.tokens, kind.tokens + len(BASE_TOKENS))
    text = descend(parent, options.seed, noise=options.noise, vocab=options.vocab, fresh=fresh)
    cls = _class(f"{family.name}ForConditionalGeneration")
    return _save_model(cls, config, text, folder, options)


def _save_model(cls: Any, config: Any, text: Tensors, folder: Path, options: Options) -> Path:
    """Build the model, give it the language weights, and let transformers write it."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = cls(config)
        for weight in model.parameters():
            drawn = torch.randn(weight.shape)
            if weight.dim() > 1:
                # Far above the usual 0.02: features so narrow must still tell images apart
                weight.data = drawn / math.sqrt(weight[0].numel())
            else:
                # No zero biases and unit norms in the tower either
                weight.data += 0.02 * drawn
        text = dict(text)
        head = text.pop("lm_head.weight")
        names = [name for name in ("language_model", "text_model") if hasattr(model.model, name)]
        (getattr(model.model, names[0]) if names else model.model).load_state_dict(text)
        if not options.tied:
            model.lm_head.load_state_dict({"weight": head})
        model.to(getattr(torch, options.dtype))
        model.save_pretrained(folder, max_shard_size=options.max_shard_size)
    return folder


_CLIP: Config = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_QWEN_IMAGE = KINDS["qwen2"].tokens


def _qwen(**vision: Any) -> Config:
    names = ("vision_start_token_id", "vision_end_token_id", "", "image_token_id", "video_token_id")
    ids = {name: _QWEN_IMAGE + offset for offset, name in enumerate(names) if name}
    tower = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "hidden_size": 32, **vision}
    return {**ids, "vision_config": tower}


_PINPOINTS: Config = {"image_grid_pinpoints": [[SIDE, SIDE]]}
_WIDER = {"intermediate_size": 64, "out_hidden_size": HIDDEN}
_LLAVA: Config = {"vision_config": _CLIP, "image_token_index": ROWS}
VISION = {
    # As llava-hf publishes them, rows padded for `<image>`
    "llava": Family("Llava", "llama", _LLAVA, 384),
    "llava_next": Family("LlavaNext", "llama", {**_LLAVA, **_PINPOINTS}, 384),
    "llava_onevision": Family(
        "LlavaOnevision",
        "qwen2",
        {
            "vision_config": {
                **_CLIP,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            "image_token_index": _QWEN_IMAGE,
            "video_token_index": _QWEN_IMAGE + 1,
            **_PINPOINTS,
        },
        384,
    ),
    "idefics3": Family(
        "Idefics3",
        "llama",
        {
            "vision_config": {
                **_CLIP,
                "image_size": 2 * SIDE,
                "model_type": "idefics3_vision",
            },
            "image_token_id": ROWS,
        },
        384,
    ),
    "qwen2_vl": Family("Qwen2VL", "qwen2", _qwen(embed_dim=32, hidden_size=HIDDEN)),
    "qwen2_5_vl": Family("Qwen2_5_VL", "qwen2", _qwen(**_WIDER, fullatt_block_indexes=[1])),
    # Features of two layers of the tower enter two layers of the decoder (deepstack)
    "qwen3_vl": Family(
        "Qwen3VL",
        "qwen3",
        _qwen(**_WIDER, depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
    ),
}


def _ends(text: Tensors) -> Tensors:
    names = ("embed_tokens.weight", "norm.weight")
    return {f"model.{name}": text[name] for name in names} | {
        "lm_head.weight": text["lm_head.weight"]
    }


def _draw_vision(family: str, name: str, config: Config, seed: int) -> Tensors:
    """Random weights for all that the family's remote code has outside its decoder."""
    classes = importlib.import_module(f"remote.{family}.modeling_{family}")
    settings = getattr(classes, f"{name}Config")(**config)
    with torch.device("meta"):
        model = getattr(classes, config["architectures"][0])(settings)
    random = torch.Generator().manual_seed(seed + 1000)
    out = {}
    for key, weight in model.state_dict().items():
        if key.startswith(("model.vision.", "model.vision_model.", "model.visual_abstractor.")):
            drawn = torch.randn(weight.shape, generator=random)
            if weight.dim() > 1:
                out[key] = drawn / math.sqrt(weight[0].numel())
            else:
                out[key] = 0.1 * drawn + key.endswith(".weight")
    return out


def _write(folder: Path, tensors: Tensors, config: Config, options: Options) -> Path:
    """Write what no class of transformers could: tensors, and a config.json."""
    dtype = getattr(torch, options.dtype)
    kept = "rotary_emb.inv_freq"
    cast = {name: t if name.endswith(kept) else t.to(dtype) for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(cast, folder, options.max_shard_size)
    _write_json(folder / "config.json", {**config, "torch_dtype": options.dtype})
    return folder


def _save_tensors(tensors: Tensors, folder: Path, max_shard_size: str = "200KB") -> None:
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _copy_sidecars(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        weights = path.name.endswith((".safetensors", ".bin", ".index.json"))
        if path.is_file() and not weights:
            shutil.copy(path, out)


def _write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Vision towers of remote code

_NARROW, _WIDE = 32, 64
_PATCHES = (SIDE // PATCH) ** 2
_COGVLM_CONFIG: Config = {
    "hidden_size": _NARROW,
    "image_size": SIDE,
    "in_channels": 3,
    "intermediate_size": _WIDE,
    "layer_norm_eps": 1e-6,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_positions": _PATCHES + 1,
    "patch_size": PATCH,
}
_QUERIES = 8
_MPLUG_CONFIG: Config = {
    "visual_model": {"hidden_size": _NARROW, "image_size": SIDE, "patch_size": PATCH},
    "visual_abstractor": {
        "encoder_hidden_size": _NARROW,
        "hidden_size": _NARROW,
        "num_learnable_queries": _QUERIES,
    },
}

# Files that say how images and conversations become inputs, for `add_processor`

_VICUNA_CHAT = r"""\
{%- for message in messages -%}
{{- message['role'] | upper + ': ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_ONEVISION_CHAT = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n")


def _qwen_files(processor: str) -> dict[str, Config | str]:
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": 4 * SIDE * SIDE,
    }
    return {
        "preprocessor_config.json": images,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def _llava_files(name: str, template: str, images: Config, processor: Config) -> dict[str, Any]:
    own = {"processor_class": f"{name}Processor"}
    return {
        "preprocessor_config.json": {**images, **own},
        "processor_config.json": {**processor, **own},
        "chat_template.jinja": template,
    }


_CLIP_IMAGES: Config = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIDE, "width": SIDE},
    "size": {"shortest_edge": SIDE},
}
_CLIP_TOKENS: Config = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
}


_PROCESSORS: dict[str, dict[str, Config | str]] = {
    "qwen2_vl": _qwen_files("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen_files("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen_files("Qwen3VLProcessor"),
    "llava": _llava_files("Llava", _VICUNA_CHAT, _CLIP_IMAGES, _CLIP_TOKENS),
    "llava_next": _llava_files(
        "LlavaNext",
        _VICUNA_CHAT,
        {
            **_CLIP_IMAGES,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        _CLIP_TOKENS,
    ),
    "llava_onevision": _llava_files(
        "LlavaOnevision",
        _ONEVISION_CHAT,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        {
            "image_token": "<image>",
            "num_image_tokens": _PATCHES,
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        },
    ),
    "idefics3": _llava_files(
        "Idefics3",
        _VICUNA_CHAT,
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": False,
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": 2 * SIDE},
        },
        {"image_seq_len": _PATCHES},  # four of an image's 16 patches make a token
    ),
    "mplug_owl2": _llava_files(
        "MPLUGOwl2",
        _VICUNA_CHAT.replace("<image>\\n", "<|image|>"),
        _CLIP_IMAGES,
        {
            "auto_map": {"AutoProcessor": "processing_mplug_owl2.MPLUGOwl2Processor"},
            "image_token": "<|image|>",
            "num_image_tokens": _QUERIES + 1,
        },
    ),
}
_AUTO_MAPS = {
    "cogvlm": {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    },
    "mplug_owl2": {
        "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
        "AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM",
        "AutoProcessor": "processing_mplug_owl2.MPLUGOwl2Processor",
    },
}
