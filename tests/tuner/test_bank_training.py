"""Training the rows of a bank: each row as its own adapter alone."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import batch, build, output
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_intrinsic import AdapterBank, IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
INDEX = [2, 0, -1, 2]


def bank_of(name: str, rows: int = 3, **options) -> AdapterBank:
    """A bank in training mode, with rows of its own and without dropout."""
    config = {"d": 60, "target_modules": "all-linear", **options}
    model = get_peft_model(build(name), IntrinsicConfig(**config)).train()
    for module in model.modules():
        for own in ("p", "dropout"):  # of nn.Dropout, and of T5's attention
            if isinstance(getattr(module, own, None), float):
                setattr(module, own, 0.0)
    generator = torch.Generator().manual_seed(1)
    return AdapterBank(model, (torch.randn(rows, 60, generator=generator) / 500).requires_grad_())


def loss(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model, inputs).square().flatten(1).sum(1)


def by_loop(bank: AdapterBank, inputs: dict[str, torch.Tensor], index: list[int]) -> torch.Tensor:
    """The gradients of the rows, each sample by itself with its row as the attached adapter."""
    vector = bank.model.base_model.vector
    parts = [v["default"].weight for v in (vector.intrinsic_theta, vector.intrinsic_lambda) if "default" in v]
    gradients = torch.zeros_like(bank.vectors)
    for i, row in enumerate(index):
        if row >= 0:
            for part, values in zip(parts, bank.vectors[row].split([len(p) for p in parts]), strict=True):
                part.data.copy_(values)
                part.grad = None
            loss(bank.model, {key: value[i : i + 1] for key, value in inputs.items()}).sum().backward()
            gradients[row] += torch.cat([part.grad for part in parts])
    return gradients


def assert_gradients(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradients_of_the_rows_are_those_of_each_sample_alone(name, said):
    bank = bank_of(name, said=said)
    with bank.select(INDEX):
        loss(bank.model, batch(name)).sum().backward()
    found = bank.vectors.grad
    assert found.any(1).tolist() == [True, False, True]
    assert_gradients(found, by_loop(bank, batch(name), INDEX))


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_checkpointing_recomputes_with_the_rows_of_its_own_forward_pass(name, thread):
    """Several forward passes before one backward pass, which may be in another thread, as on a GPU, and inside of
    another choice."""
    bank, first, second = bank_of(name, said=True), INDEX, [1, 1, 0, -1]
    expected = by_loop(bank, batch(name), first) + by_loop(bank, batch(name), second)
    bank.model.gradient_checkpointing_enable()
    with bank.select(first):
        total = loss(bank.model, batch(name)).sum()
    with bank.select(second):
        total = total + loss(bank.model, batch(name)).sum()
        if thread:
            backward = threading.Thread(target=total.backward)
            backward.start()
            backward.join()
        else:
            total.backward()
    assert_gradients(bank.vectors.grad, expected)
    theta = bank.model.base_model.vector.intrinsic_theta["default"].weight
    theta.grad = None
    loss(bank.model, batch(name)).sum().backward()  # without a choice: the adapter itself
    checkpointed, theta.grad = theta.grad, None
    for module in bank.model.modules():
        module.gradient_checkpointing = False
    loss(bank.model, batch(name)).sum().backward()
    assert_gradients(checkpointed, theta.grad)


def test_checkpointing_that_cannot_know_the_rows_raises():
    bank = bank_of("llama")
    bank.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    bank.model.enable_input_require_grads()
    with (
        pytest.raises(RuntimeError, match=r"of a batch with several adapters.*'use_reentrant': False"),
        bank.select(INDEX),
    ):
        output(bank.model, batch("llama"))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: self.second(self.first(x).tanh()), x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the proof
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_model_s_own_raises_instead_of_using_other_rows(reentrant):
    model = get_peft_model(Checkpointed(reentrant), IntrinsicConfig(d=10, target_modules="all"))
    bank = AdapterBank(model, torch.randn(3, 10).div(500).requires_grad_())
    with bank.select([0, 1]):
        total = model(torch.randn(2, 6).requires_grad_()).sum()
        with pytest.raises(
            RuntimeError, match=r"which adapters the samples had is unknown.*gradient_checkpointing_enable"
        ):
            total.backward()
    assert bank.vectors.grad is None
