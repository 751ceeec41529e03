"""Reading and writing the fields of a packed adapter, every one in a single way."""

from __future__ import annotations

import numpy as np

from .quantize import halves, whole


def number(value: int) -> bytes:
    """A whole number below 2^63: seven bits a byte, lowest first, the high bit set on all but the last."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def text(raw: bytes) -> bytes:
    """Bytes behind their length."""
    return number(len(raw)) + raw


def gaps(rising: list[int]) -> bytes:
    """Rising whole numbers: how many, then each less the one before it, less one."""
    return number(len(rising)) + b"".join(number(b - a - 1) for a, b in zip([-1, *rising], rising, strict=False))


def floats(values: np.ndarray) -> bytes:
    """Numbers as a common exponent (a signed byte) and float16, little-endian: `float[k]`, k ≥ 1."""
    exponent, short = halves(values)
    return exponent.to_bytes(1, "little", signed=True) + short.astype("<f2").tobytes()


class Reader:
    """Takes fields off the front of bytes that may be anything.

    Raises:
        ValueError: in each method, where the bytes do not hold such a field.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.place:
            raise ValueError(f"{count} bytes are due at byte {self.place}, but only {len(self.data)} are there")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, low: int, high: int, what: str) -> int:
        """A whole number of `low` to `high`."""
        value = 0
        for i in range(9):
            (byte,) = self.take(1)
            value |= (byte & 127) << 7 * i
            if byte < 128:
                break
        else:
            raise ValueError(f"{what} has more than 63 bits")
        if byte == 0 and i:
            raise ValueError(f"{what} is written with more bytes than it needs")
        if not low <= value <= high:
            raise ValueError(f"{what} is {value}, not {low} to {high}")
        return value

    def text(self, longest: int, what: str) -> str:
        """UTF-8 behind its length in bytes."""
        raw = self.take(self.number(0, longest, f"the length of {what}"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no UTF-8") from None

    def gaps(self, longest: int, what: str) -> list[int]:
        """Rising whole numbers below 2^32."""
        found, last = [], -1
        for _ in range(self.number(0, min(longest, len(self.data)), f"the count of {what}")):
            last += 1 + self.number(0, 2**32, what)
            found.append(last)
        return found

    def floats(self, count: int, what: str) -> np.ndarray:
        """`float32[count]`, as `floats` wrote them: finite, the largest in [1, 2) times the power of two."""
        exponent = int.from_bytes(self.take(1), "little", signed=True)
        short = np.frombuffer(self.take(2 * count), dtype="<f2")
        if not np.isfinite(short).all():
            raise ValueError(f"{what} holds NaN or infinite values")
        largest = np.abs(short).max(initial=0)
        if not (1 <= largest < 2 or (largest == exponent == 0)):
            raise ValueError(f"{what} has an exponent that does not fit")
        return whole(exponent, short)

    def rest(self) -> bytes:
        """Whatever is left."""
        return self.take(len(self.data) - self.place)
