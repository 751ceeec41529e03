"""A packed adapter as a line of text and as a picture."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

import segno

from .packed import Packed


def adapter_to_string(data: bytes) -> str:
    """A packed adapter as text for a URL, a database column, a chat: base64 of letters, digits, `-` and `_`.

    Example:
        >>> text = adapter_to_string(compress(model))
        >>> model = load_packed(base, adapter_from_string(text))
    """
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def adapter_from_string(text: str) -> bytes:
    """The packed adapter that `adapter_to_string` wrote. White space around it does no harm.

    Raises:
        ValueError: the text is cut, changed, or something else; the checksum in the bytes tells.
    """
    text = text.strip()
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    if not data or adapter_to_string(data) != text:
        raise ValueError(f"This is no packed adapter: {text[:20]!r}… is no URL-safe base64. Copy the text again.")
    Packed.from_bytes(data)
    return data


def check_ending(path: str | os.PathLike) -> None:
    """Whether a QR code can be drawn as such a file.

    Raises:
        ValueError: it is neither PNG nor SVG.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"path (--qr) = {str(path)!r}: a QR code is drawn as .png or .svg.")


def qr_code(data: bytes, path: str | os.PathLike, scale: int = 4) -> None:
    """Draw the text of a packed adapter as a QR code: any phone reads it.

    Args:
        data: the packed adapter.
        path: of the picture, PNG or SVG by its ending.
        scale: pixels of a dot.

    Raises:
        ValueError: more bytes than a QR code holds, or another ending.
    """
    check_ending(path)
    try:
        picture = segno.make(adapter_to_string(data), mode="byte", micro=False)
    except segno.DataOverflowError:
        raise ValueError(f"{len(data)} bytes are more than a QR code holds, about 2,200. Pack fewer levels.") from None
    picture.save(str(path), scale=scale)
