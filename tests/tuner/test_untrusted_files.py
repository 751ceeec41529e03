"""An adapter's folder is untrusted input: loading raises a clear error or gives the adapter that was saved."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import build, evaluate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from peft_intrinsic import IntrinsicConfig

SEARCH = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
CLEAR = (ValueError, TypeError, KeyError, SafetensorError, RuntimeError)


def folder() -> Path:
    """A saved adapter of BERT, and its output."""
    path = Path(tempfile.mkdtemp())
    torch.manual_seed(9)
    model = get_peft_model(build("bert"), IntrinsicConfig(d=40, said=True, init_weights=False)).eval()
    model.save_pretrained(path)
    torch.save(evaluate(model, "bert"), path / "expected")
    return path


@pytest.fixture(scope="module")
def saved():
    path = folder()
    yield path
    shutil.rmtree(path)


def check_error_or_saved_output(path: Path) -> None:
    try:
        model = PeftModel.from_pretrained(build("bert"), path).eval()
    except CLEAR:
        return
    assert torch.equal(evaluate(model, "bert"), torch.load(path / "expected"))


HUGE = [2**20, 2**26, 2**40, 2**62, 2**63, 2**200]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*HUGE, *(-value for value in HUGE)]),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["(.|..)+x", "(a|aa)+", "(", "a{99999999}", "fastfood", "dense", "all-linear", "../..", ":!"]),
    st.lists(st.one_of(st.text(max_size=3), st.integers(-2, 2**70), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = list(IntrinsicConfig(d=1).to_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, **SEARCH)
@given(st.sampled_from(FIELDS), VALUES)
def test_hostile_values_of_any_field_raise_or_load_the_saved_adapter(saved, field, value):
    with tempfile.TemporaryDirectory() as name:
        path = Path(shutil.copytree(saved, name, dirs_exist_ok=True))
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        check_error_or_saved_output(path)


@pytest.mark.slow
@settings(max_examples=100, **SEARCH)
@given(st.data())
def test_any_bit_flip_of_the_weights_raises_or_loads_the_saved_adapter(saved, data):
    """It may load only if the flipped bit means nothing, such as white space of the header."""
    whole = (saved / "adapter_model.safetensors").read_bytes()
    position = data.draw(st.integers(0, 8 * len(whole) - 1))
    with tempfile.TemporaryDirectory() as name:
        path = Path(shutil.copytree(saved, name, dirs_exist_ok=True))
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        (path / "adapter_model.safetensors").write_bytes(changed)
        check_error_or_saved_output(path)


@pytest.mark.slow
@settings(max_examples=60, **SEARCH)
@given(st.data())
def test_any_truncation_raises_or_loads_the_saved_adapter(saved, data):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (saved / file).read_bytes()
        keep = data.draw(st.integers(0, len(whole) - 1))
        with tempfile.TemporaryDirectory() as name:
            path = Path(shutil.copytree(saved, name, dirs_exist_ok=True))
            (path / file).write_bytes(whole[:keep])
            check_error_or_saved_output(path)
