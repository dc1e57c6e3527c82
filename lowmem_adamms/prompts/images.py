"""The images of prompts: decoded with Pillow, to RGB and upright, or an error that names them."""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PromptError
from .entry import Prompt, check_path, one_line, show_value

if TYPE_CHECKING:
    from PIL import Image

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names. Not all that it reads: it hands EPS, for one, to Ghostscript to run."""
_decoding = threading.Lock()  # the filters for warnings belong to the process, not to the thread


def open_image(image: Path | bytes) -> Image.Image:
    """Decode an image file's first frame: RGB, upright by its EXIF orientation.

    Transparent parts turn white, as on a page; 16-bit grey is scaled to 8 bits. PromptError if it
    is missing, broken, of a format not in FORMATS, or larger than Pillow's MAX_IMAGE_PIXELS.
    """
    return _decode(
        image, f"image {image}" if isinstance(image, Path) else f"an image of {len(image)} bytes"
    )


def read_image(value: object, folder: Path, where: str) -> Path | bytes:
    """An image as it is given: a path, a data: URL, or from Python bytes or a Pillow image.

    Paths are relative to `folder`. The image is not decoded; PromptError names the place.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value[:5].lower() == "data:":
        return _read_data_url(value, where)
    if isinstance(value, Path):
        return folder / value.expanduser()
    if hasattr(value, "getbands"):
        file = io.BytesIO()
        _to_rgb(_turn_upright(value)).save(file, "PNG")  # type: ignore[arg-type]
        return file.getvalue()
    return check_path(value, folder, where)


def _read_data_url(url: str, where: str) -> bytes:
    head = _DATA_URL.match(url[:200])
    try:
        if head:
            return base64.b64decode(url[head.end() :], validate=True)
    except (ValueError, binascii.Error):
        pass
    raise PromptError(f"{where}: {show_value(url)} is no data: URL in base64; write it so")


def check_images(prompt: Prompt, where: str, checked: set[Path]) -> None:
    """Decode each image that is not in `checked` yet; PromptError names entry and image."""
    for number, image in enumerate(prompt.images, 1):
        if isinstance(image, bytes):
            _decode(image, f"{where}: image {number} of {len(prompt.images)}")
        elif image not in checked:
            path = str(image)
            _decode(image, path if path == where else f"{where}: image {one_line(path)}")
            checked.add(image)


def _decode(image: Path | bytes, name: str) -> Image.Image:
    """`open_image`, with what the image is called in errors."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _decoding, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = io.BytesIO(image) if isinstance(image, bytes) else image
            with Image.open(source, formats=FORMATS) as file:
                file.load()
                return _to_rgb(_turn_upright(file))
    except FileNotFoundError:
        reason = "no such file; correct the path (a relative one starts at the set's folder)"
    except UnidentifiedImageError:
        reason = "not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down"
    except Exception as error:  # decoders raise anything at all for a broken file
        detail = one_line(getattr(error, "strerror", None) or error)
        reason = f"cannot be read ({detail}); replace it or take the entry out"
    raise PromptError(f"{one_line(name, 1000)}: {reason}")


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; as it lies if that block is broken, as viewers do."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Pillow's own conversions would clip 16-bit grey at 255 and bare what transparency hides."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
