"""Which classes there are, and as data what no rule can tell of them."""

from __future__ import annotations

import importlib
from typing import Any

BESIDE_THE_MAPPINGS = {
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "csm": "CsmForConditionalGeneration",
    "glm_image": "GlmImageForConditionalGeneration",
    "higgs_audio_v2": "HiggsAudioV2ForConditionalGeneration",
    "moshi": "MoshiForConditionalGeneration",
    "musicflamingo": "MusicFlamingoForConditionalGeneration",
    "vibevoice": "VibeVoiceForConditionalGeneration",
}
"""Multimodal classes of text and sound that transformers lists elsewhere."""


def multimodal_classes() -> dict[str, str]:
    """Model type to class name, of every multimodal class that transformers knows."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return {
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **BESIDE_THE_MAPPINGS,
        "shieldgemma2": "ShieldGemma2ForImageClassification",  # its files fit no other
    }


def text_decoders() -> list[str]:
    """The model types that transformers has a causal language model for."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# Exceptions to the rules by which configs are made tiny


def _under(path: str, **values: Any) -> dict[str, Any]:
    return {f"{path}.{key}": value for key, value in values.items()}


def _numbered(template: str, count: int = 8) -> dict[str, int]:
    return {template.format(number): 20 + number for number in range(count)}


_LETTERS = {f"IMGIMG{letter}Z": 20 + place for place, letter in enumerate("ABCDEFGH")}
_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "embed_dim": 32,
    "latent_channels": 32,
}
_CODEC = {"num_filters": 4, "upsampling_ratios": [2, 2]}
_TOKENIZER = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_ssm": 64}

CONFIG_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "beam": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "chameleon": {
        "vocabulary_map": {"<image>": 8, **_LETTERS},
        **_under("vq_config", **_VQ),
    },
    "cohere_compass": _under(
        "text_config",
        rope_parameters={
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            }
        },
    ),
    "csm": _under("codec_config", **_CODEC),
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.sam_config.downsample_channels": [16, 32],
    },
    "diffusion_gemma": _under(
        "text_config", global_head_dim=16, num_experts=4, top_k_experts=2, moe_intermediate_size=24
    ),
    "dots3_note": {
        "audio_config.adapter_input_size": 32,
        **_under(
            "text_config",
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_q_lora_rank=8,
            swa_kv_lora_rank=8,
            swa_head_dim=16,
            swa_qk_nope_head_dim=8,
            swa_v_head_dim=8,
        ),
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 8,
            "<|extra_200|>": 9,
            **_numbered("<|visual token {:06d}|>"),
        },
        **_under("vq_config", **_VQ),
    },
    "ernie4_5_vl_moe": _under(
        "text_config",
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
        },
    ),
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma3n": _under(
        "text_config",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        intermediate_size=[48] * 4,
    ),
    "gemma4": {"text_config.global_head_dim": 16},
    "gemma4_unified": {"text_config.global_head_dim": 16},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "qformer_config.hidden_size": 64,
    },
    "hunyuan_vl": {"text_config.head_dim": 8},
    "janus": _under("vq_config", **_VQ),
    "kyutai_speech_to_text": _under("codec_config", **_CODEC),
    "llama4": _under("vision_config", projector_input_dim=32, projector_output_dim=32),
    "mllama": {
        **_under("text_config", num_hidden_layers=3, cross_attention_layers=[1]),
        **_under(
            "vision_config",
            image_size=28,
            supported_aspect_ratios=[[1, 1], [1, 2]],
            max_num_tiles=2,
        ),
    },
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moshi": _under("audio_encoder_config", **_CODEC),
    "muse_spark": _under(
        "audio_config", num_hidden_layers=4, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1]
    ),
    "perception_lm": {"vision_config.model_args": {"embed_dim": 32}},
    "phi4_multimodal": _under(
        "audio_config",
        nemo_conv_channels=32,
        ext_pw_out_channel=32,
        depthwise_separable_out_channel=32,
    ),
    "pp_formulanet": _under(
        "vision_config",
        post_conv_in_channels=32,
        post_conv_mid_channels=32,
        post_conv_out_channels=32,
    ),
    "qwen2_5_omni": {
        **_under(
            "token2wav_config.bigvgan_config",
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
        ),
        **_under(
            "token2wav_config.dit_config",
            num_embeds=96,
            enc_channels=[16, 16, 16, 16, 32],
            mel_dim=16,
            enc_attention_channels=16,
            enc_se_channels=16,
        ),
    },
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 48,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen4_exp": _under(
        "text_config",
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=16,
        indexer_compress_ratio=4,
    ),
    "t5gemma2": {"encoder.text_config.vocab_size": 96},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [16, 32]},
    "vibevoice": {
        **_under("audio_config", **_TOKENIZER),
        **_under("semantic_model_config", **_TOKENIZER),
    },
    "vibevoice_asr": {
        **_under("acoustic_tokenizer_encoder_config", **_TOKENIZER),
        **_under("semantic_tokenizer_encoder_config", **_TOKENIZER),
    },
}
"""By model type: values by dotted key."""
for _name in ("cohere_compass", "dots3_note", "gemma3n", "gemma4", "gemma4_unified", "qwen4_exp"):
    CONFIG_EXCEPTIONS[f"{_name}_text"] = {
        key.removeprefix("text_config."): value
        for key, value in CONFIG_EXCEPTIONS[_name].items()
        if key.startswith("text_config.")
    }

# What is the language model

_LLAMA = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")

LANGUAGE_MODULES: dict[str, tuple[str, ...]] = {
    "chameleon": _LLAMA,
    "csm": ("embed_text_tokens", "backbone_model.layers", "backbone_model.norm"),
    "evolla": _LLAMA,
    "higgs_audio_v2": _LLAMA,
    "idefics": _LLAMA,
    "llava around phi4_multimodal": (
        "model.language_model.embed_tokens",
        "model.language_model.layers",
        "model.language_model.norm",
        "lm_head",
    ),
    "phi4_multimodal": _LLAMA,
    "pi0": ("model.vlm.language_model",),
    "qwen2_5_omni": ("thinker.model.language_model", "thinker.lm_head"),
    "qwen3_omni_moe": ("thinker.model.language_model", "thinker.lm_head"),
    "shieldgemma2": ("model.model.language_model", "model.lm_head"),
}
"""By model type: paths of its modules, where `get_decoder` gives a module that holds more."""

KEPT: dict[str, tuple[str, str]] = {
    "evolla": (r"\.adapter\.", "cross-attention to the protein, which its ancestor lacks"),
    "mllama": (r"\.layers\.1\.", "a cross-attention layer, which its ancestor lacks"),
}
"""By model type: a pattern of parameters of the decoder that stay the base's, and why."""

ANCESTORS: dict[str, str] = {
    "csm": "llama",
    "ernie4_5_vl_moe_text": "ernie4_5_moe",
    "evolla": "llama",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "glm_image_text": "glm4",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "higgs_audio_v2": "llama",
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "idefics": "llama",
    "mllama_text_model": "llama",
    "paddleocr_vl_text": "ernie4_5",
    "phi4_multimodal": "phi3",
    "qwen2_5_omni_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""Model type of a language model that no causal class is for, and of the model it descends from."""

TEXT_CONFIGS: dict[str, str] = {
    "pi0": "vlm_config.text_config",
}
"""By model type: where the language model's config is, where `get_text_config` gives another."""

TEXT_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "csm": (("model.embed_tokens.", "embed_text_tokens."),),
    "ernie4_5_vl_moe": (
        (".mlp.experts.", ".mlp.text_moe.experts."),
        (".mlp.gate.", ".mlp.text_moe.gate."),
    ),
    "mllama": ((".layers.1.", ".layers.2."),),  # the ancestor has no cross-attention between
}
"""By model type: names in the text-only model, and those of the same parameters in it."""

_GLM = {"head_dim": 8, "pad_token_id": None}
TEXT_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe": {"moe_intermediate_size": 48},
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm_image": _GLM,
    "glmga": _GLM,
    "mllama": {"num_hidden_layers": 2},
}
"""By model type: what else the text-only model's config has."""

NO_TEXT_DONOR = ("llava around biogpt", "llava around rembert", "llava around rwkv")
"""Text-only models whose head is another module than LLaVA's."""

NOT_IN_TEXT: dict[str, tuple[str, str]] = {
    "ernie4_5_vl_moe": (
        r"\.mlp\.experts\.[4-7]\.|\.gate\.weight_1|\.moe_statics\.",
        "the experts of images, which its ancestor lacks",
    ),
    "higgs_audio_v2": (r"\.audio_", "copies for audio tokens, which take the plain weight"),
    "mllama": (r"embed_tokens", "eight rows of image tokens that its ancestor lacks"),
}
"""By model type: a pattern of parameters that a text-only donor does not change as a donor of the
same class does, and why."""

NOT_YET = frozenset({"diffusion_gemma"})
"""Classes that do not work yet: strike them out as they do."""

NOT_SEARCHED: dict[str, str] = {
    "glm_image": "it answers in tokens of images; no auto class finds it",
    "moshi": "it answers in speech; no auto class finds all of it",
    "evolla": "asked about proteins; transformers' auto classes do not find it",
    "shieldgemma2": "a classifier: it answers with a probability, not in words",
}
"""Classes that are merged and not searched, and why."""

NOT_CARRIED = frozenset(
    {
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "blt",
        "camembert",
        "cpmant",
        "ctrl",
        "data2vec-text",
        "dbrx",
        "dots1",
        "dots3_note",
        "electra",
        "emu3",
        "ernie",
        "falcon",
        "falcon_mamba",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "inkling2_text",
        "inkling_text",
        "llama4",
        "mamba",
        "mamba2",
        "marian",
        "mbart",
        "megatron-bert",
        "mllama",
        "modernbert-decoder",
        "moss_transcribe_diarize",
        "mpt",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "nemotron",
        "openai-gpt",
        "opt",
        "pegasus",
        "plbart",
        "prophetnet",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
        "reformer",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    }
)
"""Causal language models that transformers does not let LLaVA carry."""

REFUSED_IN_LLAVA: dict[str, str] = {
    "deepseek_v4": "its layers hold a table of integers, which cannot be blended",
    "git": "BERT, whose layers norm after they add",
    "hrm_text": "two stacks of layers that run by turns",
    "rembert": "BERT, whose layers norm after they add",
}
"""Text decoders that are refused, and why."""

SET_AT_LOADING: dict[str, tuple[str, float]] = {"llava around zaya": ("balancing_biases", -1.0)}
"""By case: buffers whose last number transformers sets as it loads them, whatever the file says."""

FILES: dict[str, tuple[str, ...]] = {"qwen2_5_omni": ("spk_dict.pt",)}
"""By model type: pickles besides the weights that its class looks for."""

NOT_DECODER_ONLY: dict[str, str] = {
    "blip": "BERT that reads the image by cross-attention",
    "florence2": "BART, an encoder and a decoder",
    "git": "BERT, whose layers norm after they add",
    "kyutai_speech_to_text": "a decoder of audio codes and text that was trained with it",
    "pix2struct": "T5's decoder, which reads the image by cross-attention",
    "pp_formulanet": "mBART's decoder, which reads the image by cross-attention",
    "t5gemma2": "T5Gemma, an encoder and a decoder",
    "udop": "T5, an encoder and a decoder",
    "vision-encoder-decoder": "any decoder with cross-attention, here BERT",
}
"""Classes that are refused, and what their language model is instead of a decoder of its own."""
