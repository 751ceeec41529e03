"""Training with θ rounded: straight-through gradients, the codebook, and what is left after it."""

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


def theta_of(model: PeftModel, name: str = "default") -> nn.Module:
    return model.get_base_model().intrinsic.intrinsic_theta[name]


def loss_of(model: PeftModel) -> torch.Tensor:
    return nn.functional.cross_entropy(output(model, batch("bert")), LABELS)


def at_rounded(levels: int, **options) -> PeftModel:
    """The same adapter, θ set to its rounded values."""
    model = trained("bert", **options)
    weight = theta_of(model).weight
    weight.data = torch.from_numpy(quantize(weight.detach().numpy(), levels))
    return model


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 4, 16, 256])
def test_forward_is_the_one_of_the_rounded_theta(levels, said):
    model = trained("bert", said=said)
    with quantization_aware(model, levels):
        found = evaluate(model, "bert")
    assert torch.equal(found, evaluate(at_rounded(levels, said=said), "bert"))


def test_forward_has_exactly_the_values_of_the_codebook():
    model = trained("bert")
    expected = quantize(theta_of(model).weight.detach().numpy(), 4)
    with quantization_aware(model, 4):
        assert theta_of(model)().tolist() == expected.tolist()


@pytest.mark.parametrize("said", [False, True])
def test_gradient_of_theta_is_the_one_at_the_rounded_point(said):
    model, other = trained("bert", said=said), at_rounded(4, said=said)
    loss_of(other).backward()
    with quantization_aware(model, 4):
        loss_of(model).backward()
        found = theta_of(model).weight.grad
    torch.testing.assert_close(found, theta_of(other).weight.grad, rtol=1e-3, atol=1e-6)


def test_gradient_of_the_codebook_is_the_sum_over_members():
    """By hand: each entry of the gradient at the rounded point goes to the value that it was rounded to."""
    model, other = trained("bert"), at_rounded(4)
    loss_of(other).backward()
    point, gradient = theta_of(other).weight.detach(), theta_of(other).weight.grad
    with quantization_aware(model, 4):
        loss_of(model).backward()
        values, found = theta_of(model).codebook.detach(), theta_of(model).codebook.grad
    assert values.tolist() == point.unique().tolist()
    expected = torch.tensor([gradient[point == value].sum() for value in values.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_gradients_of_a_known_function():
    """θ = (0, 1, 2, 9, 11) in two values, 1 and 10, under Σ iθᵢ²: dθᵢ = 2i·valueᵢ, and their sums for the values."""
    model = trained("bert", d=5)
    theta_of(model).weight.data = torch.tensor([0.0, 1.0, 2.0, 9.0, 11.0])
    with quantization_aware(model, 2):
        (torch.arange(5) * theta_of(model)() ** 2).sum().backward()
        vector = theta_of(model)
        assert vector.codebook.tolist() == [1.0, 10.0]
        assert vector.weight.grad.tolist() == [0.0, 2.0, 4.0, 60.0, 80.0]
        assert vector.codebook.grad.tolist() == [6.0, 140.0]


def test_values_that_pass_each_other_in_training_still_round_to_the_nearest():
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
        train(model, {**batch("bert"), "labels": LABELS}, steps, lr=1e-3)
        inside = theta_of(model)().detach()
    theta = theta_of(model).weight.detach()
    assert len(theta.unique()) <= levels
    torch.testing.assert_close(theta, inside, rtol=0, atol=2.0**-11 * float(inside.abs().max()))
    assert read_packed(compress(model, levels)).theta.tolist() == theta.tolist()


def test_loaded_outputs_are_those_of_the_trained_model():
    model = trained("bert")
    with quantization_aware(model, 4):
        train(model, {**batch("bert"), "labels": LABELS}, 3, lr=1e-3)
    model.eval()
    assert torch.equal(evaluate(load_packed(build("bert"), compress(model, 4)), "bert"), evaluate(model, "bert"))


@pytest.mark.parametrize("levels", [2, 4])
def test_training_inside_lowers_the_loss(levels):
    model = trained("bert")
    with quantization_aware(model, levels):
        losses = train(model, {**batch("bert"), "labels": LABELS}, 40, lr=1e-4)
        trained_along = theta_of(model).codebook.detach().numpy()
    assert losses[-1] < 0.9 * losses[0]
    assert not np.allclose(trained_along, fit_codebook(theta_of(trained("bert")).weight.detach().numpy(), levels))
    assert loss_of(model).item() < 0.9 * losses[0]


def test_codebook_is_trained_along():
    model = trained("bert")
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with quantization_aware(model, 4):
        inside = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert inside == [*before, before[0].replace("weight", "codebook")]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before


def test_an_exception_inside_still_restores():
    model = trained("bert")
    vector = theta_of(model)
    with pytest.raises(RuntimeError, match="stop"), quantization_aware(model, 4):
        raise RuntimeError("stop")
    assert theta_of(model) is vector
    assert len(vector.weight.unique()) == 4


def diverge(vector: nn.Module, value: float) -> None:
    """What a training with too large steps does, and the Trainer's answer."""
    for parameter in vector.parameters():
        parameter.data.fill_(value)
    raise RuntimeError("stop")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_that_diverged_still_restores(value):
    model = trained("bert")
    vector = theta_of(model)
    with pytest.raises(RuntimeError, match="stop"), quantization_aware(model, 4):
        diverge(theta_of(model), value)
    assert theta_of(model) is vector


def test_only_the_named_adapter_is_rounded():
    model = trained("bert")
    model.add_adapter("second", trained("bert", d=50, seed=2).peft_config["default"])
    first = theta_of(model).weight.detach().clone()
    with quantization_aware(model, 2, adapter="second"):
        assert torch.equal(theta_of(model)(), first)
        assert len(theta_of(model, "second")().detach().unique()) <= 3
    assert torch.equal(theta_of(model).weight, first)
    assert len(theta_of(model, "second").weight.unique()) == 2


def test_what_is_saved_inside_is_a_usual_adapter(tmp_path):
    model = trained("bert", said=True)
    expected = evaluate(model, "bert")
    with quantization_aware(model, 3):
        model.save_pretrained(tmp_path)
    assert torch.equal(evaluate(PeftModel.from_pretrained(build("bert"), tmp_path).eval(), "bert"), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_mode_and_gradients_stay_as_they_were(frozen):
    model = trained("bert").train()
    theta_of(model).weight.requires_grad_(not frozen)
    with quantization_aware(model, 3):
        assert theta_of(model).training
        assert theta_of(model).weight.requires_grad is not frozen
    assert theta_of(model).training
    assert theta_of(model).weight.requires_grad is not frozen


@pytest.mark.parametrize("levels", [0, 257])
def test_levels_out_of_range_are_refused_and_nothing_changes(levels):
    model = trained("bert")
    vector, before = theta_of(model), theta_of(model).weight.detach().clone()
    with (
        pytest.raises(ValueError, match="levels must be an integer from 1 to 256"),
        quantization_aware(model, levels),
    ):
        pass
    assert theta_of(model) is vector
    assert torch.equal(vector.weight, before)
