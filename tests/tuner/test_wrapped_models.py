"""Names that wrappers of other libraries add are no part of the model's names."""

import pytest
import torch
from conftest import build, evaluate
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.names import canonical


def compiled(module):
    return torch.compile(module, backend="eager")


def model_with_wrapped_blocks(*wrappers):
    model = build("bert")
    for index, layer in enumerate(model.bert.encoder.layer):
        for wrap in wrappers:
            layer = wrap(layer)
        model.bert.encoder.layer[index] = layer
    return model


def model_with_wrapped_body():
    model = build("bert")
    model.bert = compiled(model.bert)
    return model


WRAPPED = {
    "compiled blocks": lambda: model_with_wrapped_blocks(compiled),
    "checkpointed blocks": lambda: model_with_wrapped_blocks(checkpoint_wrapper),
    "both": lambda: model_with_wrapped_blocks(checkpoint_wrapper, compiled),
    "compiled body": model_with_wrapped_body,
    "compiled model": lambda: compiled(build("bert")),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["query", "value"]}, {"target_modules": "all", "said": True}]
)
def test_an_adapter_fits_the_wrapped_and_the_plain_model(wrapped, options, tmp_path):
    plain, models = evaluate(build("bert"), "bert"), (WRAPPED[wrapped], lambda: build("bert"))
    manifests = set()
    for number, (train_on, load_on) in enumerate((models, models[::-1])):
        model = get_peft_model(train_on(), IntrinsicConfig(d=64, init_weights=False, **options))
        expected = evaluate(model, "bert")
        assert not torch.allclose(expected, plain, atol=1e-4)
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(load_on(), tmp_path / str(number))
        torch.testing.assert_close(evaluate(loaded, "bert"), expected, rtol=1e-5, atol=1e-6)
        manifests.add(model.peft_config["default"].manifest)
    assert len(manifests) == 1


@pytest.mark.slow
def test_fully_trained_modules_work_in_models_with_wrapped_blocks(tmp_path):
    config = IntrinsicConfig(d=64, init_weights=False, head="keep", modules_to_save=["classifier"])
    model = get_peft_model(WRAPPED["both"](), config)
    with torch.no_grad():
        model.base_model.classifier.modules_to_save["default"].bias.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    torch.testing.assert_close(evaluate(loaded, "bert"), evaluate(model, "bert"), rtol=1e-5, atol=1e-6)


class Inner(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.module = wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, x):
        return self.module(x)


def test_a_module_called_module_is_left_out_of_names_only_under_a_data_parallel_wrapper():
    plain, parallel = Inner(lambda module: module), Inner(nn.DataParallel)
    assert canonical("module.0.weight", plain) == "module.0.weight"
    assert canonical("module.module.0.weight", parallel) == "module.0.weight"
    names = [
        [layer.offsets["default"]["weight"].name for layer in get_peft_model(model, config).base_model.tuner_layers()]
        for model, config in ((m, IntrinsicConfig(d=4, target_modules="all")) for m in (plain, parallel))
    ]
    assert names == [["module.0.weight"]] * 2


def test_names_that_only_begin_like_a_wrapper_s_are_unchanged():
    assert canonical("encoder.base_layer_norm.weight") == "encoder.base_layer_norm.weight"
    assert canonical("base_layer.weight") == "base_layer.weight"
    assert canonical("query.base_layer.weight") == "query.weight"
