"""Federated training: the mean of the clients' θ, and Flower's FedAvg on it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import build
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from peft_intrinsic import IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def adapted(**options):
    return get_peft_model(build("bert"), IntrinsicConfig(d=50, target_modules="all", **options))


def theta_of(model) -> torch.nn.Parameter:
    return model.get_base_model().intrinsic.intrinsic_theta["default"].weight


def test_the_mean_of_vectors_is_the_mean_of_the_models():
    generator = torch.Generator().manual_seed(0)
    thetas = torch.randn(3, 50, generator=generator) / 500
    merged = []
    for theta in (*thetas, thetas.mean(0)):
        model = adapted()
        theta_of(model).data.copy_(theta)
        merged.append(model.merge_and_unload().state_dict())
    *clients, server = merged
    for name, value in server.items():
        if value.is_floating_point():
            mean = torch.stack([each[name].double() for each in clients]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(clients[0][name], server[name]) for name in server)


def test_a_round_of_one_step_with_equal_data_is_one_step_on_all_data():
    pytest.importorskip("flwr", reason="flwr is not installed")
    pytest.importorskip("opacus", reason="opacus is not installed")
    from federated import FlowerClient, federate

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (12, 7), generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    model = adapted().eval()  # without dropout

    def step(rows: slice) -> None:
        optimizer = torch.optim.SGD([theta_of(model)], lr=1e-5)
        cross_entropy(model(input_ids=ids[rows]).logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    rounds: list[int] = []
    clients = [FlowerClient(model, partial(step, slice(start, start + 4)), 4) for start in (0, 4, 8)]
    federate(clients, 1, rounds.append)
    found = theta_of(model).detach().clone()
    theta_of(model).data.zero_()
    step(slice(0, 12))
    torch.testing.assert_close(found, theta_of(model).detach(), **CLOSE)
    assert found.abs().max() > 1e-4
    assert rounds == [0, 1]
