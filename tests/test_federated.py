"""Federated training: the mean of the clients' θ, and Flower's FedAvg on it."""

from __future__ import annotations

import pytest
import torch
from conftest import build
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from peft_intrinsic import IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-7}

simulated = pytest.mark.filterwarnings("ignore")
"""Flower and Ray warn, and leave processes to end later."""


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


@simulated
def test_a_round_of_one_step_with_equal_data_is_one_step_on_all_data():
    """In Flower's simulation, in which Ray's processes are the clients."""
    pytest.importorskip("flwr.simulation", reason="flwr is not installed")
    pytest.importorskip("opacus", reason="opacus is not installed")
    from federated import build_client, build_server, run_simulation

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (12, 7), generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    model = adapted().eval()  # without dropout

    def step(rows: slice) -> int:
        optimizer = torch.optim.SGD([theta_of(model)], lr=1e-5)
        cross_entropy(model(input_ids=ids[rows]).logits, labels[rows]).backward()
        optimizer.step()
        return len(ids[rows])

    def train(client: int) -> int:
        return step(slice(4 * client, 4 * client + 4))

    rounds: list[int] = []
    server = build_server(model, 3, 1, rounds.append)
    run_simulation(server, build_client(model, train), num_supernodes=3)
    found = theta_of(model).detach().clone()
    theta_of(model).data.zero_()
    theta_of(model).grad = None
    step(slice(0, 12))
    torch.testing.assert_close(found, theta_of(model).detach(), **CLOSE)
    assert found.abs().max() > 1e-4
    assert rounds == [0, 1]


@simulated
def test_a_client_that_fails_ends_the_training():
    pytest.importorskip("flwr.simulation", reason="flwr is not installed")
    pytest.importorskip("opacus", reason="opacus is not installed")
    from federated import build_client, build_server, run_simulation

    def train(client: int) -> int:
        return [4, 4][client]  # the third has no rows

    model = adapted()
    with pytest.raises(RuntimeError, match=r"Of 3 clients, \[[012]\] finished"):
        run_simulation(build_server(model, 3, 1, lambda done: None), build_client(model, train), num_supernodes=3)
