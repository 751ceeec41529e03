"""Quantization-aware training: straight-through gradients, the codebook, and the adapter afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import batch, build, evaluate, output, train, trained
from peft import PeftModel
from torch import nn

from peft_intrinsic.codec import compress, load_packed, quantization_aware, read_packed
from peft_intrinsic.codec.quantize import fit_codebook, quantize

LABELS = torch.tensor([0, 1, 2, 1])
INPUTS = {**batch("bert"), "labels": LABELS}


def theta_of(model: PeftModel, name: str = "default") -> nn.Module:
    return model.get_base_model().intrinsic.intrinsic_theta[name]


def loss_of(model: PeftModel) -> torch.Tensor:
    return nn.functional.cross_entropy(output(model, batch("bert")), LABELS)


def at_quantized(levels: int, **options) -> PeftModel:
    """The same adapter, with θ at its quantized values."""
    model = trained("bert", **options)
    weight = theta_of(model).weight
    weight.data = torch.from_numpy(quantize(weight.detach().numpy(), levels))
    return model


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 4, 16, 256])
def test_the_forward_pass_is_that_of_the_quantized_theta(levels, said):
    model, other = trained("bert", said=said), at_quantized(levels, said=said)
    with quantization_aware(model, levels):
        assert theta_of(model)().tolist() == theta_of(other).weight.tolist()
        assert torch.equal(evaluate(model, "bert"), evaluate(other, "bert"))


@pytest.mark.parametrize("said", [False, True])
def test_gradients_are_those_at_the_quantized_theta_summed_for_the_codebook(said):
    model, other = trained("bert", said=said), at_quantized(4, said=said)
    loss_of(other).backward()
    point, gradient = theta_of(other).weight.detach(), theta_of(other).weight.grad
    with quantization_aware(model, 4):
        loss_of(model).backward()
        vector = theta_of(model)
    torch.testing.assert_close(vector.weight.grad, gradient, rtol=1e-3, atol=1e-6)
    values = vector.codebook.tolist()
    assert values == point.unique().tolist()
    expected = torch.tensor([gradient[point == value].sum() for value in values])
    torch.testing.assert_close(vector.codebook.grad, expected, rtol=1e-3, atol=1e-5)


def test_gradients_of_a_known_function():
    """θ = (0, 1, 2, 9, 11) has the values 1 and 10; the gradient of Σ iθᵢ² is 2i·valueᵢ, summed for the values."""
    model = trained("bert", d=5)
    theta_of(model).weight.data = torch.tensor([0.0, 1.0, 2.0, 9.0, 11.0])
    with quantization_aware(model, 2):
        (torch.arange(5) * theta_of(model)() ** 2).sum().backward()
        vector = theta_of(model)
        assert vector.codebook.tolist() == [1.0, 10.0]
        assert vector.weight.grad.tolist() == [0.0, 2.0, 4.0, 60.0, 80.0]
        assert vector.codebook.grad.tolist() == [6.0, 140.0]


def test_values_that_training_swaps_still_quantize_to_the_nearest():
    model = trained("bert", d=4)
    theta_of(model).weight.data = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with quantization_aware(model, 2):
        theta_of(model).codebook.data = torch.tensor([2.5, 0.5])
        assert theta_of(model)().tolist() == [0.5, 0.5, 2.5, 2.5]


@pytest.mark.parametrize("levels", [1, 2, 5, 16])
@pytest.mark.parametrize("steps", [0, 3])
def test_packing_afterwards_loses_nothing(levels, steps):
    model = trained("bert", said=True)
    with quantization_aware(model, levels):
        train(model, INPUTS, steps, lr=1e-3)
        inside = theta_of(model)().detach()
    theta = theta_of(model).weight.detach()
    assert len(theta.unique()) <= levels
    torch.testing.assert_close(theta, inside, rtol=0, atol=2.0**-11 * float(inside.abs().max()))
    data = compress(model, levels)
    assert read_packed(data).theta.tolist() == theta.tolist()


def test_a_loaded_adapter_has_the_outputs_of_the_trained_model():
    model = trained("bert")
    with quantization_aware(model, 4):
        train(model, INPUTS, 3, lr=1e-3)
    model.eval()
    assert torch.equal(evaluate(load_packed(build("bert"), compress(model, 4)), "bert"), evaluate(model, "bert"))


@pytest.mark.parametrize("levels", [2, 4])
def test_training_lowers_the_loss_and_trains_the_codebook(levels):
    model = trained("bert")
    with quantization_aware(model, levels):
        losses = train(model, INPUTS, 40, lr=1e-4)
        codebook = theta_of(model).codebook.detach().numpy()
    assert losses[-1] < 0.9 * losses[0]
    assert not np.allclose(codebook, fit_codebook(theta_of(trained("bert")).weight.detach().numpy(), levels))
    assert loss_of(model).item() < 0.9 * losses[0]


def trainable(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_codebook_is_trainable_inside_and_modes_are_unchanged(frozen):
    model = trained("bert").train()
    theta_of(model).weight.requires_grad_(not frozen)
    before = trainable(model)
    with quantization_aware(model, 3):
        assert theta_of(model).training
        assert trainable(model) == [*before, "base_model.model.intrinsic.intrinsic_theta.default.codebook"]
    assert theta_of(model).training
    assert trainable(model) == before


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_exception_inside_restores_the_vector_even_after_divergence(value):
    model = trained("bert")
    vector = theta_of(model)

    def stop() -> None:
        for parameter in theta_of(model).parameters() if value is not None else ():
            parameter.data.fill_(value)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), quantization_aware(model, 4):
        stop()
    assert theta_of(model) is vector
    assert value is not None or len(vector.weight.unique()) == 4


def test_only_the_named_adapter_is_quantized():
    model = trained("bert")
    model.add_adapter("second", trained("bert", d=50, seed=2).peft_config["default"])
    first = theta_of(model).weight.detach().clone()
    with quantization_aware(model, 2, adapter="second"):
        assert torch.equal(theta_of(model)(), first)
        assert len(theta_of(model, "second")().detach().unique()) <= 3
    assert torch.equal(theta_of(model).weight, first)
    assert len(theta_of(model, "second").weight.unique()) == 2


def test_saving_inside_writes_the_unquantized_adapter(tmp_path):
    model = trained("bert", said=True)
    expected = evaluate(model, "bert")
    with quantization_aware(model, 3):
        model.save_pretrained(tmp_path)
    assert torch.equal(evaluate(PeftModel.from_pretrained(build("bert"), tmp_path).eval(), "bert"), expected)


@pytest.mark.parametrize(
    ("levels", "adapter", "message"),
    [
        (0, None, "levels must be an integer from 1 to 256"),
        (257, None, "levels must be an integer from 1 to 256"),
        (4, "nope", "adapter='nope'"),
    ],
)
def test_bad_arguments_raise_and_leave_the_adapter_unchanged(levels, adapter, message):
    model = trained("bert")
    vector, before = theta_of(model), theta_of(model).weight.detach().clone()
    with pytest.raises(ValueError, match=message), quantization_aware(model, levels, adapter=adapter):
        pass
    assert theta_of(model) is vector
    assert torch.equal(vector.weight, before)
