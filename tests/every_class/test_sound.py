"""A base that hears: prompts with sounds, from the WAV file to an answer."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import multimodal_case
from random_pair import write_tokenizer
from tiny_models import build, make_relative, save, transformers

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.errors import PromptError
from lowmem_adamms.live.transformers_model import find_answering_part, quiet
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.settings import AnswerSettings

TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
TEMPLATE = """\
{% for message in messages %}{% for part in message.content %}\
{% if 'audio' in part %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endfor %}"""


@pytest.fixture(scope="module")
def qwen2_audio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen2-Audio with its processor, and a relative."""
    folder = tmp_path_factory.mktemp("qwen2_audio")
    case = multimodal_case("qwen2_audio")
    with quiet():
        (folder / "base").mkdir()
        write_tokenizer(folder / "base", TOKENS)
        tokenizer = transformers().AutoTokenizer.from_pretrained(folder / "base")
        case.config.text_config.vocab_size = len(tokenizer)
        case.config.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        base = build(case.model_class, case.config, seed=0)
        save(base, folder / "base")
        language = {name for name in base.state_dict() if "language_model" in name}
        save(make_relative(base, language | {"lm_head.weight"}, seed=1), folder / "donor")
        extractor = transformers().WhisperFeatureExtractor(feature_size=128)
        processor = transformers().Qwen2AudioProcessor(extractor, tokenizer, TEMPLATE)
        processor.save_pretrained(folder / "base")
    return folder / "base", folder / "donor"


def write_tone(path: Path, pitch: float, seconds: float = 0.5, rate: int = 16000) -> Path:
    samples = np.sin(np.arange(int(seconds * rate)) * pitch) * 20000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_a_sound_is_heard_and_answered(qwen2_audio: tuple[Path, Path], tmp_path: Path) -> None:
    low, high = write_tone(tmp_path / "low.wav", 0.05), write_tone(tmp_path / "high.wav", 0.8, 0.8)
    prompts = [
        Prompt("Which tone?", audio=(low,)),
        Prompt("Which tone?", audio=(high,)),
        Prompt("Which tones are these?", audio=(low, high)),
        Prompt("Are you there?"),
    ]
    settings = AnswerSettings(max_new_tokens=6)
    with LiveModel(make_plan(*qwen2_audio), device="cpu", quantize="none", dtype="fp32") as live:
        live.apply(0.4)
        together = live.generate(prompts, settings, batch_size=4)
        alone = [live.generate([prompt], settings)[0] for prompt in prompts]
        assert together == alone
        assert len(set(together)) == len(prompts)  # random weights: other words, other answers
        (deaf,) = live.generate([Prompt("Which tone?")], settings)
        assert deaf not in together[:2]


def test_a_sound_at_another_rate_is_refused(qwen2_audio: tuple[Path, Path], tmp_path: Path) -> None:
    sound = write_tone(tmp_path / "a.wav", 0.05, rate=8000)
    live = LiveModel(make_plan(*qwen2_audio), device="cpu", quantize="none")
    with live, pytest.raises(PromptError, match="at 8000 Hz, but the base hears 16000 Hz"):
        live.generate([Prompt("Which tone?", audio=(sound,))])


def test_of_an_omni_model_the_part_that_answers_in_words_is_asked() -> None:
    case = multimodal_case("qwen2_5_omni")
    with torch.device("meta"):
        model: Any = case.model_class(case.config)
    assert find_answering_part(model) is model.thinker
    assert find_answering_part(model.thinker) is model.thinker
