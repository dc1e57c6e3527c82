"""A small CogVLM for tests: every layer holds a language and a vision expert, chosen per token.

Written from the layout of the published checkpoints (names and shapes of the tensors) and the
paper (arXiv 2311.03079). Like the model on the Hub it has no processor: `CogVLMForCausalLM.
build_conversation_input_ids` turns one query into unbatched inputs, and `token_type_ids` (0 text,
1 image) go along with `input_ids`. An image takes one token for each patch, one before and one
after them; all patches share one position.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_cogvlm import CogVLMConfig

transformers: Any = importlib.import_module("transformers")
masking: Any = importlib.import_module("transformers.masking_utils")
outputs: Any = importlib.import_module("transformers.modeling_outputs")

TEXT, IMAGE = 0, 1
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # of the pictures CLIP was trained on


def vision_mask(token_type_ids: Tensor) -> Tensor:
    """Which tokens use the vision expert: an image's tokens but the last, bool [batch, length]."""
    mask = token_type_ids == IMAGE
    followed = torch.zeros_like(mask)
    followed[:, :-1] = mask[:, 1:]
    return mask & followed


def positions(token_type_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position of each token, int64 [batch, length]: padding counts nothing, a patch run one."""
    image = token_type_ids == IMAGE
    left, right = torch.zeros_like(image), torch.zeros_like(image)
    left[:, 1:], right[:, :-1] = image[:, :-1], image[:, 1:]
    patch = image & left & right
    after_patch = torch.zeros_like(patch)
    after_patch[:, 1:] = patch[:, :-1]
    steps = (~(patch & after_patch)).long()
    if attention_mask is not None:
        steps *= attention_mask.long()
    return (steps.cumsum(-1) - 1).clamp(min=0)


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class MLP(nn.Module):
    """One expert's gated feed-forward block."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


def choose(vision: Tensor, hidden: Tensor, experts: tuple[nn.Module, nn.Module]) -> Tensor:
    """Vision expert's output where `vision` is true, language expert's elsewhere."""
    language, visual = experts
    out: Tensor = language(hidden)
    return torch.where(vision[..., None], visual(hidden), out) if bool(vision.any()) else out


class VisionExpertMLP(nn.Module):
    """The two feed-forward blocks of a layer."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = MLP(config)
        self.vision_mlp = MLP(config)

    def forward(self, hidden: Tensor, vision: Tensor) -> Tensor:
        return choose(vision, hidden, (self.language_mlp, self.vision_mlp))


class VisionExpertAttention(nn.Module):
    """Attention over all tokens, with projections of the token's own kind; fused rows q, k, v."""

    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer, self.heads = layer, config.num_attention_heads
        self.vision_expert_query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.vision_expert_dense = nn.Linear(size, size, bias=False)
        self.language_expert_query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.language_expert_dense = nn.Linear(size, size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        vision: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        fused = (self.language_expert_query_key_value, self.vision_expert_query_key_value)
        by_head = choose(vision, hidden, fused).view(*hidden.shape[:2], 3, self.heads, -1)
        q, k, v = by_head.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        return choose(vision, mixed, (self.language_expert_dense, self.vision_expert_dense))


def rotary_angles(config: CogVLMConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position, float32 [batch, 1, length, head size]."""
    size = config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, size, 2, device=position_ids.device).float() / size
    angles = position_ids[:, None, :, None].float() / config.rope_theta**exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + half) of the head by its position's angle."""
    cos, sin = (part.to(x.dtype) for part in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a norm that both experts share."""

    def __init__(self, config: CogVLMConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = VisionExpertAttention(config, layer)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        vision: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, vision, mask, rotary, cache)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden), vision)
        return out


class PatchEmbedding(nn.Module):
    """Pixels [images, channels, side, side] to tokens [images, 1 + patches, size]."""

    def __init__(self, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        patch = settings["patch_size"]
        self.proj = nn.Conv2d(settings["in_channels"], size, kernel_size=patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, size))
        self.position_embedding = nn.Embedding(settings["num_positions"], size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_embedding.expand(len(images), -1, -1), patches), dim=1)
        return tokens + self.position_embedding.weight


class TowerAttention(nn.Module):
    """Plain attention with fused, biased q, k, v."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(size, 3 * size)
        self.dense = nn.Linear(size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.query_key_value(hidden).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.dense(mixed.transpose(1, 2).flatten(2))
        return out


class TowerMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(hidden)))
        return out


class TowerLayer(nn.Module):
    """One layer of the tower; EVA2's norms stand behind the blocks, before the sum."""

    def __init__(self, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        eps = settings["layer_norm_eps"]
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.attention = TowerAttention(size, settings["num_heads"])
        self.mlp = TowerMLP(size, settings["intermediate_size"])
        self.post_attention_layernorm = nn.LayerNorm(size, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        out: Tensor = hidden + self.post_attention_layernorm(self.mlp(hidden))
        return out


class Transformer(nn.Module):
    """The tower's layers."""

    def __init__(self, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        count = settings["num_hidden_layers"]
        self.layers = nn.ModuleList(TowerLayer(size, settings) for _ in range(count))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class GLU(nn.Module):
    """The connector: from the tower's width to the decoder's."""

    def __init__(self, size: int, config: CogVLMConfig) -> None:
        super().__init__()
        wide, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(size, wide, bias=False)
        self.norm1 = nn.LayerNorm(wide)
        self.dense_h_to_4h = nn.Linear(wide, inner, bias=False)
        self.gate_proj = nn.Linear(wide, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, wide, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = functional.gelu(self.norm1(self.linear_proj(hidden)))
        gated = functional.silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden)
        out: Tensor = self.dense_4h_to_h(gated)
        return out


class VisionTower(nn.Module):
    """Pixels [images, channels, side, side] to decoder inputs [images, 2 + patches, size]."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        settings = config.vision_config
        size = settings["hidden_size"]
        self.patch_embedding = PatchEmbedding(size, settings)
        self.transformer = Transformer(size, settings)
        self.linear_proj = GLU(size, config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.transformer(self.patch_embedding(images))[:, 1:]
        ends = (end.expand(len(images), -1, -1) for end in (self.boi, self.eoi))
        first, last = ends
        return torch.cat((first, self.linear_proj(patches), last), dim=1)


class CogVLMPreTrainedModel(transformers.PreTrainedModel):
    """What both models below tell transformers about themselves."""

    config_class = CogVLMConfig
    base_model_prefix = "model"
    _no_split_modules = ("DecoderLayer", "TowerLayer")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True


class CogVLMModel(CogVLMPreTrainedModel):
    """Decoder and tower."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = VisionTower(config)
        self.post_init()

    def encode_images(self, images: list[list[Tensor]]) -> Tensor:
        """Features of all images in order, [images, 2 + patches, size]."""
        flat = torch.stack([image for sample in images for image in sample])
        weight = self.vision.patch_embedding.proj.weight
        out: Tensor = self.vision(flat.to(weight.device, weight.dtype))
        return out

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor, images: list[list[Tensor]] | None
    ) -> Tensor:
        """Decoder inputs [batch, length, size]; ValueError unless the images fill their tokens."""
        embeds: Tensor = self.embed_tokens(input_ids)
        places = token_type_ids == IMAGE
        if not any(images or ()) or not bool(places.any()):
            return embeds
        features = self.encode_images(images or []).flatten(0, 1).to(embeds.dtype)
        if len(features) != int(places.sum()):
            raise ValueError(f"{int(places.sum())} image tokens for {len(features)} features")
        return embeds.index_put((places,), features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: list[list[Tensor]] | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Any:
        shown = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if shown is None:
            raise ValueError("input_ids or inputs_embeds must be given")
        if token_type_ids is None:
            token_type_ids = torch.full(shown.shape, TEXT, device=shown.device)
        if use_cache and past_key_values is None:
            past_key_values = transformers.DynamicCache(config=self.config)
        if position_ids is None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("position_ids must be given with a filled cache")
            position_ids = positions(token_type_ids, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed(shown, token_type_ids, images)
        mask = masking.create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # No position_ids: patches that share one would be taken for packed sequences
            allow_is_causal_skip=False,
        )
        hidden, vision = inputs_embeds, vision_mask(token_type_ids)
        rotary = rotary_angles(self.config, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, vision, mask, rotary, past_key_values)
        return outputs.BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


class CogVLMForCausalLM(CogVLMPreTrainedModel, transformers.GenerationMixin):
    """Decoder, tower and head."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: list[list[Tensor]] | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Any:
        """Logits [batch, length, rows] of the given tokens.

        `token_type_ids` and `position_ids` belong to these tokens, `attention_mask` to all tokens
        including the cached ones. `images` holds, for each sample, its images as preprocessed
        tensors [channels, side, side].
        """
        made = self.model(
            input_ids=input_ids,
            images=images,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
        )
        return outputs.CausalLMOutputWithPast(
            logits=self.lm_head(made.last_hidden_state), past_key_values=made.past_key_values
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        images: list[list[Tensor]] | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cut what is cached off; positions follow from the token types of the whole sequence."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if token_type_ids is None:
            token_type_ids = torch.full_like(input_ids, TEXT)
        inputs: dict[str, Any] = {
            "token_type_ids": token_type_ids[:, seen:],
            "position_ids": positions(token_type_ids, attention_mask)[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
        }
        if inputs_embeds is not None and not seen:
            return {**inputs, "inputs_embeds": inputs_embeds}
        return {**inputs, "input_ids": input_ids[:, seen:], "images": None if seen else images}

    def build_conversation_input_ids(
        self,
        tokenizer: Any,
        *,
        query: str,
        history: list[tuple[str, str]] | None = None,
        images: list[Any] | None = None,
        template_version: str | None = None,
    ) -> dict[str, Any]:
        """Inputs for one query about at most one PIL image, without a batch dimension.

        `input_ids`, `token_type_ids` and `attention_mask` are int64 [length]; `images` is a list
        of one float32 tensor [3, side, side], or None.
        """
        if images is not None and len(images) > 1:
            raise ValueError("not more than one image at a time")
        version = template_version or self.config.template_version
        text = prompt(version, history or [], query)
        ids = tokenizer.encode(text, add_special_tokens=False)
        settings = self.config.vision_config
        count = (settings["image_size"] // settings["patch_size"]) ** 2 + 2 if images else 0
        lead = [self.config.bos_token_id] + [self.config.pad_token_id] * count
        kinds = [TEXT] + [IMAGE] * count + [TEXT] * len(ids)
        return {
            "input_ids": torch.tensor(lead + ids),
            "token_type_ids": torch.tensor(kinds),
            "attention_mask": torch.ones(len(kinds), dtype=torch.long),
            "images": [pixels(image, settings["image_size"]) for image in images or ()] or None,
        }


def prompt(version: str, history: list[tuple[str, str]], query: str) -> str:
    """The conversation as text, ready for the model's answer."""
    if version == "base":
        return query
    before, after = {"chat": (" [INST] ", " [/INST] "), "vqa": ("Question: ", " Short answer:")}[
        version
    ]
    told = "".join(f"{before}{asked}{after}{answer}" for asked, answer in history)
    return f"{told}{before}{query}{after}"


def pixels(image: Any, side: int) -> Tensor:
    """A PIL image as float32 [3, side, side], normalised."""
    small = image.convert("RGB").resize((side, side), resample=3)  # bicubic
    raw = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    scaled = raw.view(side, side, 3).permute(2, 0, 1) / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
