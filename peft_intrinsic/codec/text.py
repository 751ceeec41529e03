"""Packed adapters as a line of text and as a QR code."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

import segno

from .packed import PackedAdapter


def adapter_to_string(data: bytes) -> str:
    """Encode a packed adapter as URL-safe text (base64 of letters, digits, `-` and `_`, without padding).

    Args:
        data: bytes of the packed adapter.
    """
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def adapter_from_string(text: str) -> bytes:
    """Decode a packed adapter from `adapter_to_string`; white space around the text is ignored.

    Args:
        text: what `adapter_to_string` returned.

    Raises:
        ValueError: the text is truncated, changed, or no packed adapter.
    """
    text = text.strip()
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    if not data or adapter_to_string(data) != text:
        raise ValueError(f"This is no packed adapter: {text[:20]!r}… is not URL-safe base64. Copy the text again.")
    PackedAdapter.from_bytes(data)  # checks the checksum
    return data


def check_ending(path: str | os.PathLike) -> None:
    """Raise ValueError if a QR code cannot be written to this path."""
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"path (--qr) = {str(path)!r} must end in .png or .svg.")


def qr_code(data: bytes, path: str | os.PathLike, scale: int = 4) -> None:
    """Write the text of a packed adapter as a QR code.

    Args:
        data: bytes of the packed adapter.
        path: path of the picture, which ends in .png or .svg.
        scale: width of a dot in pixels.

    Raises:
        ValueError: the adapter does not fit into a QR code, or the path has another ending.
    """
    check_ending(path)
    try:
        picture = segno.make(adapter_to_string(data), mode="byte", micro=False)
    except segno.DataOverflowError:
        raise ValueError(
            f"{len(data)} bytes exceed the 2,214 of a QR code. Pack the adapter with fewer levels."
        ) from None
    picture.save(str(path), scale=scale)
