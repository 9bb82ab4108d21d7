"""A picture and its caption, wherever they lie, and how they are decoded."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from maskunet_core.errors import MaskUNetError
from maskunet_core.training.data import BadData

TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class BadPicture(MaskUNetError):
    """A picture that cannot be decoded. name: of its record; reason: why, without a full stop."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"'{name}' cannot be read: {reason}.")
        self.name, self.reason = name, reason


@dataclass(frozen=True, slots=True)
class Record:
    """name: for messages; read: gives the bytes of the encoded picture file, which are fetched only then."""

    name: str
    caption: str
    read: Callable[[], bytes]


def read_bytes(record: Record) -> bytes:
    """The bytes of the picture file. Raises BadPicture where there are none (any more), BadData where a whole data set
    cannot be reached, which is no fault of a picture's."""
    try:
        data = record.read()
    except BadData:
        raise
    except (OSError, ValueError, LookupError) as error:
        raise BadPicture(record.name, _reason(error)) from None
    if not data:
        raise BadPicture(record.name, "it is empty")
    return data


def picture_size(name: str, data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture, from the file's header alone. Raises BadPicture."""
    with _opened(name, data) as image:
        # The base class's method: that of PNG files decodes the whole picture, since metadata may follow it.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in TURNED
        return image.size[::-1] if turned else image.size


def decode_bytes(name: str, data: bytes) -> Image.Image:
    """The whole picture in RGB: upright by its EXIF orientation, on white where transparent. Raises BadPicture."""
    with _opened(name, data) as image:
        return _on_white(ImageOps.exif_transpose(image))


def decode(record: Record) -> Image.Image:
    """The record's picture, see `decode_bytes`."""
    return decode_bytes(record.name, read_bytes(record))


def decode_text(data: bytes) -> str | None:
    """Without the byte order mark that some editors put first; None where it is not UTF-8."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None
    # UTF-16 without its mark is valid UTF-8 in which every other letter is a zero.
    return None if "\0" in text else text


def caption_in(fields: Any, names: tuple[str, ...]) -> str | None:
    """The first text that a JSON object holds under one of the names, or None."""
    values = (fields.get(name) for name in names) if isinstance(fields, dict) else ()
    return next((value.strip() for value in values if isinstance(value, str) and _is_unicode(value)), None)


def _is_unicode(text: str) -> bool:
    """JSON may hold halves of letters, which no tokeniser takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@contextlib.contextmanager
def _opened(name: str, data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:
        raise BadPicture(name, "it is not a picture of a known format") from None
    except Exception as error:  # decoders raise errors of every kind over damaged files
        raise BadPicture(name, _reason(error)) from None


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which a plain conversion may clip to white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
