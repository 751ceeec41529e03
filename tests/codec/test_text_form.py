"""Packed adapters as a line of text and as a QR code."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import zxingcpp
from helpers.samples import GOLDEN, synthetic
from PIL import Image

from peft_intrinsic.codec import adapter_from_string, adapter_to_string, qr_code, read_packed

DATA = [*(path.read_bytes() for path in GOLDEN), *(synthetic([0, 1], base=n * "x").to_bytes() for n in range(3))]


@pytest.mark.parametrize("data", DATA, ids=len)
def test_text_is_url_safe_without_padding_and_gives_the_bytes_back(data):
    text = adapter_to_string(data)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", text)
    assert len(text) == -(-len(data) * 4 // 3)
    for around in ("{}", "{}\n", "\r\n\t {}", "\u00a0{}\u2003\n"):
        assert adapter_from_string(around.format(text)) == data


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: " ",
        lambda text: text + "=",
        lambda text: text[:40] + "\n" + text[40:],
        lambda text: text[:40] + "+" + text[41:],
        lambda text: text[:40] + "ä" + text[41:],
        lambda text: text[:-2],
        lambda text: "UElB",
        lambda text: text + text,
        lambda text: "hello",
        lambda text: "x y" * 100_000,
    ],
)
def test_another_text_raises_a_short_error(change):
    text = change(adapter_to_string(GOLDEN[0].read_bytes()))
    with pytest.raises(ValueError, match=r"packed adapter.*(URL-safe base64|checksum)") as error:
        adapter_from_string(text)
    assert len(str(error.value)) < 200


def scan(path: Path) -> bytes:
    """Read the adapter in a picture, as a phone does."""
    with Image.open(path) as picture:
        (code,) = zxingcpp.read_barcodes(picture.convert("L"))
    return adapter_from_string(code.text)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("scale", "form"), [(2, str), (4, Path)])
def test_a_scanned_picture_gives_the_bytes_back(path, scale, form, tmp_path):
    qr_code(path.read_bytes(), form(tmp_path / "adapter.png"), scale=scale)
    assert scan(tmp_path / "adapter.png") == path.read_bytes()


def test_scale_is_the_width_of_a_dot_in_pixels(tmp_path):
    for scale in (1, 3):
        qr_code(GOLDEN[0].read_bytes(), tmp_path / f"{scale}.png", scale=scale)
    with Image.open(tmp_path / "1.png") as small, Image.open(tmp_path / "3.png") as large:
        assert large.size == (3 * small.width, 3 * small.height)


def test_an_svg_gives_the_bytes_back(tmp_path):
    """The test draws the path of the SVG, and scans the drawing."""
    data = GOLDEN[0].read_bytes()
    qr_code(data, tmp_path / "adapter.svg", scale=1)
    root = ElementTree.parse(tmp_path / "adapter.svg").getroot()
    dots = np.full((int(root.attrib["height"]), int(root.attrib["width"])), 255, dtype=np.uint8)
    x = y = 0.0
    (lines,) = (element.attrib["d"] for element in root.iter() if element.tag.endswith("path"))
    for command, first, second in re.findall(r"([Mmh])(-?[\d.]+)(?:[ ,]?(-?[\d.]+))?", lines):
        if command == "h":
            dots[int(y), int(x) : int(x + float(first))] = 0
            x += float(first)
        else:
            x, y = float(first) + x * (command == "m"), float(second) + y * (command == "m")
    Image.fromarray(np.kron(dots, np.ones((4, 4), dtype=np.uint8))).save(tmp_path / "dots.png")
    assert scan(tmp_path / "dots.png") == data


@pytest.mark.parametrize("name", ["adapter.jpg", "adapter", "adapter.pia", "png"])
def test_another_ending_raises(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.* must end in \.png or \.svg"):
        qr_code(GOLDEN[0].read_bytes(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_more_bytes_than_a_qr_code_holds_raise(tmp_path):
    qr_code(bytes(2214), tmp_path / "adapter.png")
    with pytest.raises(ValueError, match=r"2215 bytes exceed the 2,214 of a QR code"):
        qr_code(bytes(2215), tmp_path / "more.png")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.png"]


def test_the_picture_in_the_documentation_is_a_packed_adapter():
    packed = read_packed(scan(Path(__file__).parents[2] / "docs/adapter.png"))
    assert (packed.d, packed.base, len(packed.values)) == (200, "all-MiniLM-L6-v2", 8)
