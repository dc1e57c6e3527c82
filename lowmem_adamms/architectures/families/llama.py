"""Llama, Mistral and SmolLM2, and what descends from them."""

from __future__ import annotations

from ..arch import Arch
from .spelling import (
    COGVLM,
    CSM,
    HIGGS_AUDIO,
    LLAMA,
    MPLUG_OWL2,
    NESTED,
    PLAIN,
)

ARCHS = (
    Arch(
        name="Llama",
        source="hf.co/meta-llama/Llama-2-7b-hf, lmsys/vicuna-7b-v1.5: weight index",
        classes=("LlamaForCausalLM", "LlamaModel"),
        spellings=PLAIN,
        decoder=LLAMA,
    ),
    Arch(
        name="Mistral",
        source="hf.co/mistralai/Mistral-7B-v0.1: weight index",
        classes=("MistralForCausalLM", "MistralModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        shared_ids=32000,
    ),
    Arch(
        name="LLaVA",
        source="hf.co/llava-hf/llava-1.5-7b-hf, llava-v1.6-vicuna-7b-hf: weight index",
        classes=(
            *("LlavaForConditionalGeneration", "LlavaModel"),
            *("LlavaNextForConditionalGeneration", "LlavaNextModel"),
        ),
        spellings=NESTED,
        decoder=LLAMA,
        shared_ids=32000,
    ),
    Arch(
        name="LLaVA (liuhaotian)",
        source="hf.co/liuhaotian/llava-v1.5-7b, llava-v1.6-vicuna-7b: weight index; ShareGPT4V is"
        " spelled alike",
        classes=("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "Share4VLlamaForCausalLM"),
        spellings=PLAIN,
        decoder=LLAMA,
        shared_ids=32000,
    ),
    Arch(
        name="CogVLM",
        source="hf.co/THUDM/cogvlm-chat-hf, cogvlm2-llama3-chat-19B: modeling_cogvlm.py,"
        " VisionExpertAttention and MLP; fused rows are q, k, v",
        classes=("CogVLMForCausalLM",),
        spellings=PLAIN,
        decoder=COGVLM,
    ),
    Arch(
        name="mPLUG-Owl2",
        source="hf.co/MAGAer13/mplug-owl2-llama2-7b and X-PLUG/mPLUG-Owl, modeling_llama2.py:"
        " multiway 0 is text, 1 is image",
        classes=("MPLUGOwl2LlamaForCausalLM",),
        spellings=PLAIN,
        decoder=MPLUG_OWL2,
        shared_ids=32000,
    ),
    Arch(
        name="Evolla",
        source="transformers, models/evolla: every few layers of Llama read the protein",
        classes=("EvollaForProteinText2Text", "EvollaModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={
            "model.protein_encoder.": "protein encoder",
            "layers.#.adapter.": "cross-attention to the protein",
        },
        shared_ids=128256,
    ),
    Arch(
        name="CSM",
        source="transformers, models/csm: the backbone descends from Llama; its head and the depth"
        " decoder are of audio codes",
        classes=("CsmForConditionalGeneration",),
        spellings=(("", ""),),
        decoder=CSM,
        others={
            "lm_head.": "head of audio codes",
            "backbone_model.embed_tokens.": "embedding of audio codes",
            "depth_decoder.": "depth decoder",
            "codec_model.": "codec",
        },
        shared_ids=128000,
    ),
    Arch(
        name="Higgs Audio v2",
        source="transformers, models/higgs_audio_v2: MLP and norms exist again for audio tokens",
        classes=("HiggsAudioV2ForConditionalGeneration", "HiggsAudioV2Model"),
        spellings=PLAIN,
        decoder=HIGGS_AUDIO,
        others={
            "audio_lm_head.": "head of audio codes",
            "model.embed_audio_tokens.": "audio codes",
        },
        shared_ids=128256,
    ),
)
