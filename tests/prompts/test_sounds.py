"""Sounds of prompts: WAV files as samples, and what is refused."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import numpy as np
import pytest

from lowmem_adamms.errors import PromptError
from lowmem_adamms.prompts import Prompt, digest, load_prompts, open_sound

RATE = 16000
WAVE = np.sin(np.arange(64) / 5) * 0.7


def write(path: Path, samples: np.ndarray, width: int = 2, rate: int = RATE) -> Path:
    """A WAV file of samples from -1 to 1, a column a channel."""
    scaled = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    content = scaled.reshape(-1, 1).view(np.uint8)[:, :width]
    if width == 1:
        content = content ^ 0x80
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1] if samples.ndim > 1 else 1, width, rate, 0, "NONE", ""))
        file.writeframes(content.tobytes())
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_any_width_are_numbers_from_minus_one_to_one(width: int, tmp_path: Path) -> None:
    sound = open_sound(write(tmp_path / "a.wav", WAVE, width), RATE)
    assert sound.dtype == np.float32
    assert np.abs(sound - WAVE).max() < 2.0 ** (2 - 8 * width) + 1e-6


def test_channels_are_mixed(tmp_path: Path) -> None:
    stereo = np.stack([WAVE, -WAVE / 2], axis=1)
    sound = open_sound(write(tmp_path / "a.wav", stereo), RATE)
    assert np.abs(sound - WAVE / 4).max() < 1e-4


def test_bytes_are_read_as_a_file_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", WAVE)
    assert np.array_equal(open_sound(path.read_bytes(), RATE), open_sound(path, RATE))


def test_another_rate_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", WAVE, rate=44100)
    with pytest.raises(PromptError, match=r"a.wav: at 44100 Hz, .* ffmpeg -i IN -ar 16000"):
        open_sound(path, RATE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF", "not a WAV file"),
        (b"ID3" + bytes(64), "not a WAV file of whole numbers .* ffmpeg"),
        (None, "cannot be read .No such file"),
    ],
)
def test_what_is_no_sound_is_found_before_a_model_is_loaded(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Who speaks?", "audio": "a.wav"}))
    with pytest.raises(PromptError, match=rf"p.jsonl:1: .*a.wav: {message}"):
        load_prompts(tmp_path / "p.jsonl")


def test_a_float_file_is_refused(tmp_path: Path) -> None:
    header = bytearray(write(tmp_path / "a.wav", WAVE, 4).read_bytes())
    header[20] = 3  # the format's number
    with pytest.raises(PromptError, match="not a WAV file of whole numbers"):
        open_sound(bytes(header), RATE)


def test_a_file_that_was_cut_short_has_the_whole_samples_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", WAVE)
    content = path.read_bytes()
    assert len(open_sound(io.BytesIO(content[:-3]).getvalue(), RATE)) == len(WAVE) - 2


def test_prompts_have_sounds_beside_their_images(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.wav", WAVE) for name in "ab")
    one, two = load_prompts([{"prompt": "?", "audio": a}, {"prompt": "?", "audio": [str(a), b]}])
    assert (one.audio, two.audio) == ((a,), (a, b))
    assert len({digest([Prompt("?")]), digest([one]), digest([two])}) == 3
    assert digest([Prompt("?", (a,))]) != digest([one])
    before = digest([one])
    write(a, -WAVE)
    assert digest([one]) != before


@pytest.mark.parametrize("value", [7, {"path": "a.wav"}, ["a.wav", 7], "http://x/a.wav"])
def test_what_is_no_path_to_a_sound_is_refused(value: object) -> None:
    with pytest.raises(PromptError, match=r'"audio" is|is a URL'):
        load_prompts([{"prompt": "?", "audio": value}])
