"""The sounds of prompts: WAV files of whole numbers (PCM), mixed to one channel."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PromptError
from .entry import Prompt, Sound, check_path, one_line, show_value


def open_sound(sound: Sound, rate: int) -> Any:
    """The samples of a WAV file: a float32 array of numbers from -1 to 1.

    Raises PromptError if it is missing, broken, or not at `rate` samples a second.
    """
    import numpy as np

    name = f"sound {sound}" if isinstance(sound, Path) else f"a sound of {len(sound)} bytes"
    channels, width, found_rate, content = _read(sound, name)
    if found_rate != rate:
        raise PromptError(
            f"{name}: at {found_rate} Hz, but the base hears {rate} Hz; convert it, such as with"
            f" ffmpeg -i IN -ar {rate} OUT.wav"
        )
    samples = np.frombuffer(content, np.uint8).reshape(-1, width)
    if width == 1:  # the only ones without a sign
        samples = np.bitwise_xor(samples, np.uint8(0x80))
    whole = np.pad(samples, ((0, 0), (4 - width, 0))).view("<i4") / 2.0**31
    return whole.reshape(-1, channels).mean(axis=1).astype(np.float32)


def _read(sound: Sound, name: str) -> tuple[int, int, int, bytes]:
    """Channels, bytes of a sample, samples a second, and the samples' bytes."""
    try:
        source = io.BytesIO(sound) if isinstance(sound, bytes) else sound.open("rb")
        with source, wave.open(source) as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            content = file.readframes(file.getnframes())
            whole = len(content) // (channels * width) * channels * width
            return channels, width, file.getframerate(), content[:whole]
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}); correct the path"
    except (wave.Error, EOFError) as error:
        reason = f"not a WAV file of whole numbers ({one_line(error)}); convert it, such as with"
        reason += " ffmpeg -i IN -c:a pcm_s16le OUT.wav"
    raise PromptError(f"{one_line(name, 1000)}: {reason}")


def check_sounds(prompt: Prompt, where: str) -> None:
    """Read each sound of a prompt; PromptError names entry and sound."""
    for sound in prompt.audio:
        name = str(sound) if isinstance(sound, Path) else "a sound"
        _read(sound, f"{where}: {name}")


def read_sounds(record: Mapping[str, Any], folder: Path, where: str) -> list[Sound]:
    """What stands under "audio": a path or bytes, or a list of them."""
    found = record.get("audio")
    sounds = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(sound, (str, Path, bytes)) for sound in sounds):
        raise PromptError(f'{where}: "audio" is {show_value(found)}; expected a WAV file\'s path')
    return [
        sound if isinstance(sound, bytes) else check_path(str(sound), folder, where, "sound")
        for sound in sounds
    ]
