"""A small mPLUG-Owl2 for tests: keys, values and norms of each layer twice, for text and images.

The decoder is written from the layout of the published checkpoints (names and shapes of the
tensors) and the paper (arXiv 2311.04257); tower and abstractor are no more than tests need.
`input_ids` hold `config.image_token_index` once for each feature of an image; those tokens take
way 1 of every multiway module, all others way 0. The float32 rotary frequencies are buffers of
each layer that the checkpoint carries.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_mplug_owl2 import MPLUGOwl2Config

transformers: Any = importlib.import_module("transformers")
masking: Any = importlib.import_module("transformers.masking_utils")
outputs: Any = importlib.import_module("transformers.modeling_outputs")


class Multiway(nn.Module):
    """The same module twice; each token goes through the one of its modality."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList(build() for _ in range(2))

    def forward(self, hidden: Tensor, image: Tensor) -> Tensor:
        text: Tensor = self.multiway[0](hidden)
        if not bool(image.any()):
            return text
        return torch.where(image[..., None], self.multiway[1](hidden), text)


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


class RotaryEmbedding(nn.Module):
    """Turns each pair (i, i + half) of a head by an angle proportional to the position."""

    inv_freq: Tensor

    def __init__(self, size: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, size, 2).float() / size))

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class Attention(nn.Module):
    """Attention over all tokens; only keys and values know the modality."""

    def __init__(self, config: MPLUGOwl2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        size, self.head = config.hidden_size, config.hidden_size // config.num_attention_heads
        narrow = config.num_key_value_heads * self.head
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = Multiway(lambda: nn.Linear(size, narrow, bias=False))
        self.v_proj = Multiway(lambda: nn.Linear(size, narrow, bias=False))
        self.o_proj = nn.Linear(size, size, bias=False)
        self.rotary_emb = RotaryEmbedding(self.head, config.rope_theta)

    def forward(
        self, hidden: Tensor, image: Tensor, mask: Tensor, position_ids: Tensor, cache: Any
    ) -> Tensor:
        parts = (self.q_proj(hidden), self.k_proj(hidden, image), self.v_proj(hidden, image))
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts)
        q, k = self.rotary_emb(q, position_ids), self.rotary_emb(k, position_ids)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Gated feed-forward block, one for both modalities."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a norm of the token's modality."""

    def __init__(self, config: MPLUGOwl2Config, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = Multiway(norm)
        self.post_attention_layernorm = Multiway(norm)

    def forward(
        self, hidden: Tensor, image: Tensor, mask: Tensor, position_ids: Tensor, cache: Any
    ) -> Tensor:
        normed = self.input_layernorm(hidden, image)
        hidden = hidden + self.self_attn(normed, image, mask, position_ids, cache)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden, image))
        return out


class VisionModel(nn.Module):
    """The tower, of no depth: pixels [images, 3, side, side] to patches [images, patches, size]."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        size, patch = settings["hidden_size"], settings["patch_size"]
        count = (settings["image_size"] // patch) ** 2
        self.patch_embed = nn.Conv2d(3, size, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, count, size))
        self.post_layernorm = nn.LayerNorm(size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        out: Tensor = self.post_layernorm(patches + self.position_embedding)
        return out


class VisualAbstractor(nn.Module):
    """The connector: learned queries look at the patches; to inputs [images, queries + 1, wide]."""

    def __init__(self, settings: dict[str, Any], wide: int) -> None:
        super().__init__()
        size, seen = settings["hidden_size"], settings["encoder_hidden_size"]
        count = settings["num_learnable_queries"]
        self.query_embeds = nn.Parameter(torch.zeros(1, count, size))
        self.key = nn.Linear(seen, size)
        self.value = nn.Linear(seen, size)
        self.visual_fc = nn.Linear(size, wide)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, wide))

    def forward(self, patches: Tensor) -> Tensor:
        queries: Tensor = self.query_embeds.expand(len(patches), -1, -1)
        mixed = functional.scaled_dot_product_attention(
            queries, self.key(patches), self.value(patches)
        )
        end = self.vit_eos.expand(len(patches), -1, -1)
        return torch.cat((self.visual_fc(queries + mixed), end), dim=1)


class MPLUGOwl2PreTrainedModel(transformers.PreTrainedModel):
    """What both models below tell transformers about themselves."""

    config_class = MPLUGOwl2Config
    base_model_prefix = "model"
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    # Rounded to bfloat16 the frequencies would no longer be those of the file
    _keep_in_fp32_modules_strict = ("inv_freq",)
    _supports_sdpa = True


class MPLUGOwl2LlamaModel(MPLUGOwl2PreTrainedModel):
    """Decoder, tower and abstractor."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__(config)
        visual = config.visual_config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_model = VisionModel(visual["visual_model"])
        self.visual_abstractor = VisualAbstractor(visual["visual_abstractor"], config.hidden_size)
        self.post_init()

    def encode_images(self, images: Tensor) -> Tensor:
        """Features of images [images, 3, side, side]: [images, queries + 1, size]."""
        weight = self.vision_model.patch_embed.weight
        features = self.vision_model(images.to(weight.device, weight.dtype))
        out: Tensor = self.visual_abstractor(features)
        return out

    def embed(self, input_ids: Tensor, image: Tensor, images: Tensor | None) -> Tensor:
        """Decoder inputs [batch, length, size]; ValueError unless the images fill their tokens."""
        embeds: Tensor = self.embed_tokens(input_ids.masked_fill(image, 0))
        if not bool(image.any()):
            return embeds
        if images is None:
            raise ValueError(f"{int(image.sum())} image tokens and no images")
        features = self.encode_images(images).flatten(0, 1).to(embeds.dtype)
        if len(features) != int(image.sum()):
            raise ValueError(f"{int(image.sum())} image tokens for {len(features)} features")
        return embeds.index_put((image,), features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        modality_indicators: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Any:
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds must be given")
            image = input_ids == self.config.image_token_index
            inputs_embeds = self.embed(input_ids, image, images)
        elif modality_indicators is not None:
            image = modality_indicators.bool()
        else:
            image = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)
        if use_cache and past_key_values is None:
            past_key_values = transformers.DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(image.shape[1], device=image.device)[None] + seen
        mask = masking.create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            allow_is_causal_skip=False,
        )
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, image, mask, position_ids, past_key_values)
        return outputs.BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


class MPLUGOwl2LlamaForCausalLM(MPLUGOwl2PreTrainedModel, transformers.GenerationMixin):
    """Decoder, tower, abstractor and head."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__(config)
        self.model = MPLUGOwl2LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        modality_indicators: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Any:
        """Logits [batch, length, rows] of the given tokens.

        `images` [images, 3, side, side] belong to the image tokens in `input_ids`, in order;
        `modality_indicators` (true for image tokens) say which those are in `inputs_embeds`.
        """
        made = self.model(
            input_ids=input_ids,
            images=images,
            modality_indicators=modality_indicators,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
        )
        return outputs.CausalLMOutputWithPast(
            logits=self.lm_head(made.last_hidden_state), past_key_values=made.past_key_values
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As for any decoder; images go in with the first tokens only."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            inputs["images"] = None
        return inputs
