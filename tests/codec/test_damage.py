"""Damaged and hostile packed adapters raise a ValueError, in bounded time and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from constriction import stream
from helpers.samples import GOLDEN, contents, few_values, resealed, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_intrinsic.codec import PackedAdapter, adapter_from_string, adapter_to_string

golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def read_or_raise(read: Callable, data: bytes | str) -> PackedAdapter | bytes | None:
    """Read data; None if that raises a ValueError of this package. Any other exception fails the test."""
    try:
        return read(data)
    except BaseException as error:  # Rust's panics are no Exception
        caught = error
    if type(caught) is not ValueError or len(str(caught)) < 30:  # those of json, numpy and Unicode are subclasses
        pytest.fail(f"{type(caught).__name__}: {caught} for {data!r}")
    return None


def is_well_formed(packed: PackedAdapter) -> bool:
    """Whether a packed adapter has finite values and the right lengths, and can be written again."""
    m = len(packed.scales)
    whole = packed.d == len(packed.theta) + m and len(packed.values) <= 256 and packed.options["said"] == (m > 0)
    finite = np.isfinite(packed.theta).all() and np.isfinite(packed.scales).all()
    return bool(whole and finite) and contents(PackedAdapter.from_bytes(packed.to_bytes())) == contents(packed)


def check_resealed(data: bytes) -> None:
    """Give data a new checksum: reading it raises, or gives a well-formed adapter."""
    packed = read_or_raise(PackedAdapter.from_bytes, resealed(data))
    assert packed is None or is_well_formed(packed), data


@golden
def test_every_truncation_flipped_bit_and_appended_byte_raises(path):
    data = path.read_bytes()
    flips = (bytes([*data[: i // 8], data[i // 8] ^ 1 << i % 8, *data[i // 8 + 1 :]]) for i in range(8 * len(data)))
    longer = [data + more for more in (b"\0", b"\n", data)]
    for changed in (*(data[:length] for length in range(len(data))), *flips, *longer, *map(resealed, longer)):
        assert read_or_raise(PackedAdapter.from_bytes, changed) is None, changed


@golden
def test_truncated_and_substituted_bytes_with_a_new_checksum_raise_or_are_well_formed(path):
    data = path.read_bytes()
    for length in range(4, len(data)):
        check_resealed(data[:length])
    for i, old in enumerate(data[:-4]):
        for new in {0, 1, 127, 128, 255, *(old ^ 1 << bit for bit in range(8))} - {old}:
            check_resealed(data[:i] + bytes([new]) + data[i + 1 :])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutations_with_a_new_checksum_raise_or_are_well_formed(data):
    raw = data.draw(st.sampled_from(GOLDEN)).read_bytes()[:-4]
    for _ in range(data.draw(st.integers(1, 4))):
        start, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 6))
        raw = raw[:start] + data.draw(st.binary(max_size=6)) + raw[start + length :]
    check_resealed(raw + b"....")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_after_the_magic_raise_or_are_well_formed(tail):
    check_resealed(b"PIA\x01" + tail + b"....")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=80) | st.text("ABCDEFabcdef0123-_=", max_size=80))
def test_random_strings_raise(text):
    assert read_or_raise(adapter_from_string, text) is None


@golden
def test_changed_strings_raise(path):
    text = adapter_to_string(path.read_bytes())
    for i in range(len(text)):
        other = "A" if text[i] != "A" else "B"
        for changed in (text[:i], text[:i] + other + text[i + 1 :], text[:i] + " " + text[i:] if i else text + "="):
            assert read_or_raise(adapter_from_string, changed) is None, changed


PLAIN = synthetic(few_values(20, 3))
SAID = synthetic(few_values(20, 3), [0.5])
JSON = synthetic(few_values(20, 3), target_modules=["x"])


def swapped(packed: PackedAdapter, old: bytes, new: bytes) -> bytes:
    """Replace one field of a file, and give it a new checksum."""
    data = packed.to_bytes()
    assert data.count(old) == 1, data
    return resealed(data.replace(old, new))


def body(*parts: bytes, of: PackedAdapter = PLAIN) -> bytes:
    """A file of an adapter's head and another body."""
    return resealed(of.encode_head() + b"".join(parts) + b"....")


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def halves(*values: float, exponent: int = 0) -> bytes:
    return exponent.to_bytes(1, "little", signed=True) + np.array(values, dtype="<f2").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no packed adapter: it begins with b''"),
        (b"GIF89a..", "no packed adapter: it begins with b'GIF'"),
        (b"PIA\x01", "checksum"),
        (b"PIA\x03" + bytes(40), r"format version 3; peft_intrinsic .* reads versions 1 and 2\. Upgrade"),
        (PLAIN.to_bytes()[:-1], "checksum does not fit"),
        (swapped(PLAIN, b"PIA\x01\x01\x14", b"PIA\x01\x01\x00"), "d is 0"),
        (swapped(PLAIN, b"PIA\x01\x01\x14", b"PIA\x01\x01\x81\x80\x80\x08"), "d is 16777217"),
        (swapped(PLAIN, b"PIA\x01\x01\x14", b"PIA\x01\x01\x94\x00"), "d is written with more bytes than it needs"),
        (swapped(PLAIN, b"PIA\x01\x01\x14", b"PIA\x01\x01\x14" + b"\xff" * 9), "the seed has more than 63 bits"),
        (swapped(PLAIN, b"PIA\x01\x01\x14", b"PIA\x01\x00\x14"), "algorithm"),
        (swapped(PLAIN, b"\x00\x06\x00\x00", b"\x06\x06\x00\x00"), "lambda_granularity has index 3 of 3"),
        (swapped(PLAIN, b"\x00\x06\x00\x00", b"\x18\x06\x00\x00"), "its head is not in canonical form"),
        (swapped(PLAIN, b"\x00\x06\x00\x00", b"\x00\xc6\x00\x00"), "target_modules has index 3 of 3"),
        (swapped(PLAIN, b"\x00\x06\x00\x00", b"\x00\x06\x07\x00"), "task_type has index 7 of 7"),
        (swapped(PLAIN, b"\x0asome/model", b"\xff\x01some/model"), "255 bytes are needed at byte 13"),
        (swapped(PLAIN, b"\x0asome/model", b"\x80\x02some/model"), "length of the base model's name is 256"),
        (swapped(PLAIN, b"some/model", b"some/mode\xff"), "base model's name is not UTF-8"),
        (swapped(JSON, b'["x"]', b'["x",'), "other options are not JSON"),
        (swapped(JSON, b'["x"]', b'["x" '), "other options are not JSON"),
        (swapped(JSON, b'"target_modules"', b'"target_modulos"'), "other options are not some of target_modules"),
        (swapped(JSON, b"\x00\x86\x00", b"\x00\x06\x00"), "head is not in canonical form"),
        (swapped(JSON, b':["x"]', b': "x"'), r"needed|not JSON|canonical"),
        (body(b"\x02\x11", halves(-1, 0, 1), b"\0"), "weights 17 exceed 16"),
        (body(b"\x01\x01", halves(0, 1), b"\0"), "do not occur as often"),
        (body(b"\x02\x01", halves(-1, 1, 0), b"\0"), "codebook is not increasing"),
        (body(b"\x02\x01", halves(-1, 1, 1), b"\0"), "codebook is not increasing"),
        (body(b"\x02\x01", halves(-1, 0, np.nan), b"\0"), "codebook has NaN or infinite"),
        (body(b"\x02\x01", halves(-1, 0, np.inf), b"\0"), "codebook has NaN or infinite"),
        (body(b"\x02\x01", halves(-0.5, 0, 0.25), b"\0"), "codebook has an exponent that does not fit"),
        (body(b"\x02\x01", halves(-4, 0, 0.25), b"\0"), "codebook has an exponent that does not fit"),
        (body(b"\x00\x01", halves(0, exponent=3), b"\0"), "codebook has an exponent that does not fit"),
        (body(b"\xff\x01", halves(-1, 0, 1)), "512 bytes are needed"),
        (body(b"\x02\x00", halves(-1, 0, 1), b"\x00\x01\0"), "a count is 0"),
        (body(b"\x02\x00", halves(-1, 0, 1), b"\x0a\x0a\0"), "counts exceed the length of θ"),
        (body(b"\x00\x01", halves(1), b"\x01", halves(1)), "number of λ is 1"),
        (body(b"\x00\x01", halves(1), b"\x00", of=SAID), "number of λ is 0"),
        (body(b"\x00\x01", halves(1), b"\x15", halves(1), of=SAID), "number of λ is 21"),
        (body(b"\x00\x01", halves(1), b"\x14", halves(1), of=SAID), "40 bytes are needed"),
        (body(b"\x00\x01", halves(1), b"\0", b"\x01"), "code of a single value must be empty"),
        (body(b"\x01\x01", halves(0, 1), b"\0", b"\x00\x01"), "code begins with a zero byte"),
        (body(b"\x01\x01", halves(0, 1), b"\0", b"\xff" * 30), "code has more or fewer symbols than θ"),
    ],
)
def test_the_message_names_the_field(data, message):
    with pytest.raises(ValueError, match=message):
        PackedAdapter.from_bytes(data)


@pytest.mark.parametrize("depth", [10, 400, 900, 990, 2000, 30_000])
def test_nested_options_raise_without_exhausting_the_stack(depth):
    nested = b'{"target_modules":' + b"[" * depth + b"]" * depth + b"}"
    data = swapped(JSON, b'\x18{"target_modules":["x"]}', varint(len(nested)) + nested)
    packed = read_or_raise(PackedAdapter.from_bytes, data)
    assert packed is None or depth < 1000


@pytest.mark.parametrize(("count", "fits"), [(15, True), (5, False)])
def test_a_table_must_count_what_the_code_holds(count, fits):
    symbols = np.repeat(np.array([0, 1], dtype=np.int32), (15, 5))
    coder = stream.stack.AnsCoder()
    weights = np.array([count, 20 - count], dtype=np.float64)
    coder.encode_reverse(symbols, stream.model.Categorical(weights, perfect=False))
    code = coder.get_compressed()[::-1].astype(">u4").tobytes().lstrip(b"\0")
    data = body(b"\1\0", halves(0, 1), varint(count), b"\0", code)
    if fits:
        assert PackedAdapter.from_bytes(data).theta.tolist() == symbols.tolist()
    else:
        with pytest.raises(ValueError, match="do not occur as often"):
            PackedAdapter.from_bytes(data)


@pytest.mark.parametrize("of", [PLAIN, SAID])
def test_values_beyond_float32_raise(of):
    scales = b"\1" + halves(2, exponent=127) if of is SAID else b"\0"
    with pytest.raises(ValueError, match="damaged"):
        PackedAdapter.from_bytes(body(b"\0\1", halves(1 if of is SAID else 2, exponent=127), scales, of=of))


def test_few_bytes_that_claim_the_longest_fields_take_bounded_memory():
    huge, said = replace(PLAIN, d=2**24), replace(SAID, d=2**24)
    files = [
        body(b"\x00\x01", halves(1), b"\0", of=huge),
        body(b"\x01\x01", halves(0, 1), b"\0", of=huge),
        body(b"\x01\x00", halves(0, 1), b"\x01", b"\0", b"\xff" * 40, of=huge),
        body(b"\xff\x10", halves(*np.arange(256) / 128), b"\0", b"\xff" * 40, of=huge),
        body(b"\x00\x01", halves(1), varint(2**24 - 2), halves(1), of=said),
        body(b"\x00\x01", halves(1), b"\x01", halves(1), of=said),
        swapped(PLAIN, b"manifest\0", b"manifest" + varint(2**63 - 1)),
        swapped(PLAIN, b"manifest\0", b"manifest" + varint(2**20)),
        swapped(PLAIN, b"\0\x0asome/model", varint(2**16) + b"\x0asome/model"),
    ]
    assert max(map(len, files)) < 700
    tracemalloc.start()
    try:
        for data in files:
            read_or_raise(PackedAdapter.from_bytes, data)
        mebibytes = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert 64 < mebibytes < 512  # 2^24 values and symbols; less would mean a broken measurement
