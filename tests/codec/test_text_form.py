"""PackedAdapter adapters as a line of text and as a picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import zxingcpp
from conftest import build, evaluate, trained
from helpers.samples import GOLDEN
from PIL import Image

from peft_intrinsic.codec import PackedAdapter, adapter_from_string, adapter_to_string, compress, load_packed, qr_code

golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


@golden
def test_text_gives_back_the_bytes(path):
    data = path.read_bytes()
    assert adapter_from_string(adapter_to_string(data)) == data


@golden
def test_text_needs_no_escapes_in_a_url(path):
    text = adapter_to_string(path.read_bytes())
    assert re.fullmatch(r"[A-Za-z0-9_-]+", text)
    assert len(text) == -(-len(path.read_bytes()) * 4 // 3)


@pytest.mark.parametrize("length", [61, 62, 63])
def test_text_of_every_padding_gives_back_the_bytes(length):
    model = trained("bert")
    model.peft_config["default"].base_model_name_or_path = "x" * length
    data = compress(model, 1)
    assert adapter_from_string(adapter_to_string(data)) == data


@pytest.mark.parametrize("around", ["{}\n", "\r\n\t {}", "\u00a0{}\u2003\n"])
def test_white_space_around_the_text_does_no_harm(around):
    data = GOLDEN[0].read_bytes()
    assert adapter_from_string(around.format(adapter_to_string(data))) == data


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
    ],
)
def test_another_text_is_refused(change):
    text = change(adapter_to_string(GOLDEN[0].read_bytes()))
    with pytest.raises(ValueError, match=r"packed adapter.*(URL-safe base64|checksum)"):
        adapter_from_string(text)


def test_a_message_shows_only_the_beginning_of_the_text():
    with pytest.raises(ValueError, match="not URL-safe base64") as error:
        adapter_from_string("x y" * 100_000)
    assert len(str(error.value)) < 200


def scanned(path) -> str:
    """What a phone would read from the picture."""
    with Image.open(path) as picture:
        (found,) = zxingcpp.read_barcodes(picture.convert("L"))
    return found.text


@golden
@pytest.mark.parametrize("scale", [2, 4])
def test_scanned_picture_gives_back_the_bytes(path, scale, tmp_path):
    qr_code(path.read_bytes(), tmp_path / "adapter.png", scale=scale)
    assert adapter_from_string(scanned(tmp_path / "adapter.png")) == path.read_bytes()


def test_an_adapter_survives_the_way_through_a_picture(tmp_path):
    model = trained("bert", said=True)
    data = compress(model, 4)
    qr_code(data, str(tmp_path / "adapter.png"))
    loaded = load_packed(build("bert"), adapter_from_string(scanned(tmp_path / "adapter.png")))
    assert (evaluate(loaded, "bert") == evaluate(load_packed(build("bert"), data), "bert")).all()


def test_scale_is_in_pixels_of_a_dot(tmp_path):
    for scale in (1, 3):
        qr_code(GOLDEN[0].read_bytes(), tmp_path / f"{scale}.png", scale=scale)
    with Image.open(tmp_path / "1.png") as small, Image.open(tmp_path / "3.png") as large:
        assert large.size == (3 * small.width, 3 * small.height)


def test_drawing_as_svg_has_the_dots_of_the_picture(tmp_path):
    """Its path, drawn line by line here, gives the text again."""
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
    Image.fromarray(np.kron(dots, np.ones((4, 4), dtype=np.uint8))).save(tmp_path / "drawn.png")
    assert adapter_from_string(scanned(tmp_path / "drawn.png")) == data


@pytest.mark.parametrize("name", ["adapter.jpg", "adapter", "adapter.pia", "png"])
def test_another_ending_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.* must end in \.png or \.svg"):
        qr_code(GOLDEN[0].read_bytes(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_more_bytes_than_a_picture_holds_are_refused(tmp_path):
    qr_code(bytes(2214), tmp_path / "adapter.png")
    with pytest.raises(ValueError, match=r"2215 bytes exceed the 2,214 of a QR code"):
        qr_code(bytes(2215), tmp_path / "more.png")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.png"]


def test_the_picture_in_the_documentation_holds_an_adapter():
    with Image.open(Path(__file__).parents[2] / "docs/adapter.png") as picture:
        (found,) = zxingcpp.read_barcodes(picture.convert("L"))
    packed = PackedAdapter.from_bytes(adapter_from_string(found.text))
    assert (packed.d, packed.base, len(packed.values)) == (200, "all-MiniLM-L6-v2", 8)
