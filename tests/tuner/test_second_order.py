"""Derivatives of every order and kind, against a dense float64 model that holds W0 + P θ explicitly."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, grad, hessian, jvp, vmap

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.batches import Choices, Route, _confirmed

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")  # torch's, in forward mode

TOLERANCE = 2e-6  # relative; projections compute in float32


class Cosine(nn.Module):
    """A layer that computes something of its own from its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class Net(nn.Module):
    """Wrapped layers (embedding, linear) and parameters that are adapted in place, one of them at the root."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.convolution = nn.Embedding(10, 2, padding_idx=0), nn.Conv1d(2, 4, 3)
        self.cosine, self.linear = Cosine(), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, index):
        x = torch.tanh(self.convolution(self.embedding(index).mT))
        return self.linear(torch.tanh(self.cosine(x.mT)).mean(1) * self.scale)


X = torch.arange(48).view(6, 8) * 7 % 10
Y = torch.tensor([0, 1, 2, 0, 1, 2])
OPTIONS: tuple[dict, ...] = (
    {},
    {"projection": "dense"},
    {"projection": "global", "block_size": 128},
    {"said": True, "lambda_granularity": "tensor"},
    {"target_modules": ["convolution"]},
)
IDS = [str(options) for options in OPTIONS]


def losses(options):
    """The loss as a function of θ, by the adapter and by the oracle; and a θ."""
    torch.manual_seed(1)
    config = IntrinsicConfig(d=20, init_weights=False, scale="isometric", **{"target_modules": "all", **options})
    model = get_peft_model(Net(), config).double()
    name = next(name for name, _ in model.named_parameters() if "intrinsic_theta" in name)
    theta = model.get_parameter(name).detach().clone()
    plain = Net().double()
    base = {name: p.detach() for name, p in plain.named_parameters()}
    columns = {}
    for layer in model.base_model.tuner_layers():
        for offset in layer.offsets["default"].values():
            scale = 1
            if offset.group is not None:
                scale = model.base_model.vector.intrinsic_lambda["default"].weight[offset.group].detach()
            columns[offset.name] = offset.materialize(torch.eye(len(theta))).double() * scale

    def loss(theta, x=X, y=Y):
        return nn.functional.cross_entropy(functional_call(model, {name: theta}, (x,)), y)

    def oracle(theta, x=X, y=Y):
        moved = {name: base[name] + torch.einsum("k,k...->...", theta, p) for name, p in columns.items()}
        return nn.functional.cross_entropy(functional_call(plain, {**base, **moved}, (x,)), y)

    return loss, oracle, theta


def assert_equal(found, wanted):
    assert float((found - wanted).detach().norm()) <= TOLERANCE * float(wanted.norm())


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_second_derivatives_equal_those_of_the_dense_model(options):
    loss, oracle, theta = losses(options)
    wanted = torch.autograd.functional.hessian(oracle, theta)
    assert float(wanted.norm()) > 1e-3
    assert_equal(torch.autograd.functional.hessian(loss, theta), wanted)
    assert_equal(torch.autograd.functional.hessian(loss, theta, vectorize=True), wanted)
    vector = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_equal(torch.autograd.grad(gradient @ vector, leaf)[0], wanted @ vector)


def test_third_derivatives_equal_those_of_the_dense_model():
    loss, oracle, theta = losses({"target_modules": ["convolution", "linear"]})
    vector = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)

    def third(function):
        value = leaf = theta.clone().requires_grad_()
        value = function(leaf)
        for _ in range(2):
            value = torch.autograd.grad(value, leaf, create_graph=True)[0] @ vector
        return torch.autograd.grad(value, leaf)[0]  # a vector: in its sum, terms would cancel

    assert_equal(third(loss), third(oracle))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[3:], ids=IDS[:1] + IDS[3:])
def test_function_transforms_equal_those_of_the_dense_model(options):
    loss, oracle, theta = losses(options)
    vector = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    thetas = theta + torch.linspace(-1, 1, 3, dtype=theta.dtype)[:, None] * vector
    assert_equal(hessian(loss)(theta), hessian(oracle)(theta))
    assert_equal(jvp(loss, (theta,), (vector,))[1], jvp(oracle, (theta,), (vector,))[1])
    assert_equal(vmap(loss)(thetas), torch.stack([oracle(each) for each in thetas]))

    def samples(function):
        return vmap(grad(lambda theta, x, y: function(theta, x[None], y[None])), (None, 0, 0))(theta, X, Y)

    assert_equal(samples(loss), samples(oracle))
    with dual_level():
        found, wanted = (unpack_dual(function(make_dual(theta, vector))).tangent for function in (loss, oracle))
    assert_equal(found, wanted)


def test_the_operator_of_compiled_mixed_batches_passes_gradients_of_every_order():
    theta = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    choices = Choices()
    with choices.use([Route("default", theta, theta[:, :0])]):
        (first,) = torch.autograd.grad(_confirmed(theta).pow(3).sum(), theta, create_graph=True)
    assert torch.equal(first, 3 * theta**2)
    assert torch.equal(torch.autograd.grad(first.sum(), theta)[0], 6 * theta)
