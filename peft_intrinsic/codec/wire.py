"""Writes and reads the fields of a packed adapter, each in one canonical form."""

from __future__ import annotations

import numpy as np


def to_halves(values: np.ndarray) -> tuple[int, np.ndarray]:
    """Convert `float[k]` to an exponent and `float16[k]`, the largest in [1, 2), so that any scale has 11 bits.

    Raises:
        ValueError: the exponent does not fit into a signed byte.
    """
    largest = float(np.abs(values).max(initial=0))
    exponent = int(np.frexp(largest)[1]) - 1 if largest else 0
    if np.float16(np.ldexp(largest, -exponent)) == 2:  # rounded up
        exponent += 1
    if not -128 <= exponent < 128:
        raise ValueError(
            f"The largest parameter is {largest:g}, outside the range of a packed adapter (2^-128 to 2^128)."
        )
    return exponent, np.ldexp(values.astype(np.float64), -exponent).astype(np.float16)


def from_halves(exponent: int, values: np.ndarray) -> np.ndarray:
    """Convert the result of `to_halves` back: `float16[k]` to `float32[k]`."""
    return np.ldexp(values.astype(np.float64), exponent).astype(np.float32)


def write_varint(value: int) -> bytes:
    """Write an integer from 0 to 2^63 − 1: seven bits a byte, lowest first, the high bit set on all but the last."""
    data = bytearray()
    while value >= 128:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def write_text(raw: bytes) -> bytes:
    """Write bytes after their length."""
    return write_varint(len(raw)) + raw


def write_increasing(values: list[int]) -> bytes:
    """Write increasing integers: their count, then each minus the previous one, minus one."""
    gaps = (write_varint(b - a - 1) for a, b in zip([-1, *values], values, strict=False))
    return write_varint(len(values)) + b"".join(gaps)


def write_floats(values: np.ndarray) -> bytes:
    """Write `float[k]`, k ≥ 1: a common exponent (a signed byte), then float16, little-endian."""
    exponent, halves = to_halves(values)
    return exponent.to_bytes(1, "little", signed=True) + halves.astype("<f2").tobytes()


class Reader:
    """Reads fields one after another from untrusted bytes.

    Raises:
        ValueError: in each method, if the next bytes are no such field.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def read_bytes(self, count: int) -> bytes:
        """Read so many bytes."""
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes are needed at byte {self.position} of only {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    def read_varint(self, low: int, high: int, name: str) -> int:
        """Read an integer from `low` to `high`."""
        value = 0
        for i in range(9):
            (byte,) = self.read_bytes(1)
            value |= (byte & 127) << 7 * i
            if byte < 128:
                break
        else:
            raise ValueError(f"{name} has more than 63 bits")
        if byte == 0 and i:
            raise ValueError(f"{name} is written with more bytes than it needs")
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, not {low} to {high}")
        return value

    def read_text(self, longest: int, name: str) -> str:
        """Read UTF-8 after its length in bytes."""
        raw = self.read_bytes(self.read_varint(0, longest, f"the length of {name}"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not UTF-8") from None

    def read_increasing(self, longest: int, name: str) -> list[int]:
        """Read increasing integers with gaps of at most 2^32."""
        values, last = [], -1
        for _ in range(self.read_varint(0, min(longest, len(self.data)), f"the count of {name}")):
            last += 1 + self.read_varint(0, 2**32, name)
            values.append(last)
        return values

    def read_floats(self, count: int, name: str) -> np.ndarray:
        """Read `float32[count]` from `write_floats`: finite, the largest in [1, 2) times the power of two."""
        exponent = int.from_bytes(self.read_bytes(1), "little", signed=True)
        halves = np.frombuffer(self.read_bytes(2 * count), dtype="<f2")
        if not np.isfinite(halves).all():
            raise ValueError(f"{name} has NaN or infinite values")
        largest = np.abs(halves).max(initial=0)
        if not (1 <= largest < 2 or (largest == exponent == 0)):
            raise ValueError(f"{name} has an exponent that does not fit")
        return from_halves(exponent, halves)
