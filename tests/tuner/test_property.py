"""Random configurations: a working adapter, or ValueError or TypeError, and nothing else."""

from __future__ import annotations

import tempfile

import pytest
import torch
from conftest import batch, build, evaluate, output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig

odd = st.one_of(st.none(), st.text(max_size=4), st.floats(allow_nan=True), st.integers(-5, 300), st.booleans())
names = st.sampled_from(
    ["query", "dense", "classifier", "LayerNorm", "nowhere", "word_embeddings", "", ".*", "[", "layer"]
)


OPTIONS = {
    "d": st.integers(-1, 400),
    "said": st.booleans(),
    "lambda_granularity": st.sampled_from(["layer", "module", "tensor"]),
    "seed": st.integers(0, 2**64),
    "projection": st.sampled_from(["fastfood", "dense"]),
    "block_size": st.one_of(st.none(), st.sampled_from([1, 2, 3, 8, 64, 4096])),
    "scale": st.sampled_from(["fan_in", "isometric"]),
    "target_modules": st.one_of(st.none(), st.just("all-linear"), names, st.lists(names, max_size=3)),
    "exclude_modules": st.one_of(st.none(), names, st.lists(names, max_size=2)),
    "layers_to_transform": st.one_of(st.none(), st.integers(-1, 3), st.lists(st.integers(0, 2), max_size=2)),
    "layers_pattern": st.one_of(st.none(), st.just("layer")),
    "target_parameters": st.one_of(st.none(), st.lists(names, max_size=2)),
    "modules_to_save": st.one_of(st.none(), st.just(["classifier"])),
    "head": st.sampled_from(["subspace", "keep"]),
    "init_weights": st.booleans(),
    "task_type": st.one_of(st.none(), st.sampled_from(["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])),
}
WRONG = st.sampled_from(list(OPTIONS)).flatmap(lambda name: st.fixed_dictionaries({name: odd}))
BASE = evaluate(build("bert"), "bert")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT warns of names that match nothing
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.fixed_dictionaries({}, optional=OPTIONS), st.one_of(st.just({}), st.just({}), WRONG))
def test_random_options_give_a_working_adapter_or_name_an_option(options, wrong):
    options |= wrong
    try:
        model = get_peft_model(build("bert"), IntrinsicConfig(**options))
    except (ValueError, TypeError) as error:
        told = str(error)
        clear = [name for name in (*OPTIONS, "task type", "classifier") if name in told]
        if not clear:
            raise AssertionError(f"{told!r} names no option") from error
        return
    config = model.peft_config["default"]
    whole = config.full_modules is not None
    if not whole:
        assert model.get_nb_trainable_parameters()[0] == config.d
    if config.init_weights:
        assert torch.equal(evaluate(model.eval(), "bert"), BASE)
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert (theta.abs().max() == 0) == config.init_weights
    output(model.eval(), batch("bert")).square().sum().backward()
    assert theta.grad is None or theta.grad.isfinite().all()
    with tempfile.TemporaryDirectory() as folder:
        expected = evaluate(model, "bert")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(build("bert"), folder).eval()
        assert torch.equal(evaluate(loaded, "bert"), expected)
