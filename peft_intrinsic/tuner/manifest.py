"""The manifest: a digest of the adapted names and shapes, compared when an adapter is loaded."""

from __future__ import annotations

import base64
import binascii
import hashlib

from ..projection import Shapes


def _marks(shapes: Shapes) -> dict[bytes, str]:
    lines = [f"{name} {s.rows}x{s.cols} {s.kind}" for name, s in sorted(shapes.items())]
    return {hashlib.sha256(line.encode()).digest()[:3]: line for line in lines}


def compute_manifest(shapes: Shapes) -> str:
    """Digest of the adapted names and matrix shapes, with a mark of three bytes for each: `digest:marks`."""
    marks = _marks(shapes)
    digest = hashlib.sha256("\n".join(marks.values()).encode()).hexdigest()[:16]
    return f"{digest}:{base64.b64encode(b''.join(sorted(marks))).decode()}"


def check_manifest(saved: str, shapes: Shapes) -> None:
    """Check that a model has the parameters that an adapter was trained for. A packed adapter has the digest alone.

    Raises:
        ValueError: it has not. The error lists parameters that the adapter lacks, and counts those of the model.
    """
    here = compute_manifest(shapes)
    digest, colon, listed = saved.partition(":")
    if saved == here or (not colon and digest == here.partition(":")[0]):
        return
    try:
        raw = base64.b64decode(listed, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"manifest={saved[:40]!r} is damaged: it must be digest:marks. Save the adapter again."
        ) from None
    known = {raw[i : i + 3] for i in range(0, len(raw), 3)}
    marks = _marks(shapes)
    new = sorted(line for mark, line in marks.items() if mark not in known)
    lacking = len(known - set(marks))
    difference = (
        f": {lacking} of its {len(known)} are not in this model under the same name and shape, and {len(new)} of the "
        f"model's {len(shapes)} are not in the adapter"
        + (f" ({', '.join(new[:5])}{', …' if len(new) > 5 else ''})" if new else "")
    )
    raise ValueError(
        f"This adapter was trained for other parameters (digest {digest[:16]}, here {here[:16]})"
        f"{difference if colon else ''}. Load the base model, class and number of labels of its training. "
        "(For a new adapter with this configuration, set its manifest, reinitialized and block_size to None.)"
    )
