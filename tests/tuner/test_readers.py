"""Layers that compute something else than x·Wᵀ, and modules that read the weights of others: all see the offset."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from conftest import build, evaluate, trained
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.layer import Offset
from peft_intrinsic.tuner.modules import IntrinsicLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Cosine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), nn.functional.normalize(self.weight, dim=-1))


class Masked(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.tril(), self.bias)


class LinearWithoutBase(nn.Module):
    """Named as a linear layer, but x·W."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 6
        self.weight = nn.Parameter(noise(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def replaced() -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight).relu()
    return layer


def router() -> nn.Module:
    config = PhimoeConfig(hidden_size=6, num_local_experts=6)
    return PhimoeTopKRouter(config)


ODD = {
    "cosine": lambda: Cosine(6, 6),
    "masked": lambda: Masked(6, 6),
    "x·W": LinearWithoutBase,
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "new weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5),
    "router": router,
    "replaced forward": replaced,
}


class Inside(nn.Module):
    """A first layer, and `part`, used by `use`."""

    def __init__(self, part: nn.Module, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part, self.use = nn.Linear(6, 6), part, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.part, self.first(x))


def merged_as_unmerged(base: nn.Module, x: torch.Tensor, **options) -> None:
    model = get_peft_model(
        base.eval(), IntrinsicConfig(**{"d": 12, "init_weights": False, "target_modules": "all", **options})
    ).eval()
    inner = model.get_base_model()
    found = inner(x)
    theta = inner.intrinsic.intrinsic_theta["default"].weight
    found.square().sum().backward()
    assert theta.grad.count_nonzero() >= 9  # of 12: a layer may have no use for its bias
    with model.disable_adapter():
        assert (inner(x) - found).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(inner(x), found, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ODD)
def test_linear_subclasses_compute_with_their_offsets(kind):
    def use(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result = part(x)
        return result[0].float() if isinstance(result, tuple) else result

    torch.manual_seed(1)
    part = ODD[kind]()
    merged_as_unmerged(Inside(part, use), noise(3, 6))


def test_new_parametrized_layers_can_be_adapted_many_times():
    """Their weights are computed at each read, so they have no identity."""
    for _ in range(60):
        base = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)))
        get_peft_model(base, IntrinsicConfig(d=5, target_modules="all"))


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 6)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.wte(index.to(self.wte.weight.device))


class Tied(nn.Module):
    """As in nanoGPT: the parent reads the device, the grandparent multiplies by the weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Embedder()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.body(index) @ self.body.wte.weight.T

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.body.wte.weight


def test_a_weight_that_a_grandparent_reads_has_its_offset():
    merged_as_unmerged(Tied(), torch.tensor([[0, 1, 5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_that_is_read_has_the_dtype_of_the_base(dtype):
    model = get_peft_model(build("bert").to(dtype), IntrinsicConfig(d=30, init_weights=False, target_modules="all"))
    layer = model.get_base_model().classifier
    for name in ("weight", "bias"):
        offset = layer.get_delta_weight("default", name)
        assert offset.abs().max() > 0
        assert torch.equal(getattr(layer, name) + 0, layer.base_parameter(name) + offset.to(dtype))


class Scaled(Tied):
    """A parameter of its own, read in another method than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x) * self.scale


@pytest.mark.parametrize("kind", [Tied, Scaled])
def test_a_weight_that_is_read_outside_forward_has_its_offset(kind):
    model = get_peft_model(kind(), IntrinsicConfig(d=12, init_weights=False, target_modules="all")).eval()
    base = model.get_base_model()
    x = noise(3, 6)
    found = base.encode(x)
    with model.disable_adapter():
        assert (base.encode(x) - found).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(base.encode(x), found, **CLOSE)


class Product(torch.autograd.Function):
    """As fused kernels do, it takes a weight as it is and gives its gradient itself."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_gradients_pass_through_a_custom_function():
    gradients = []
    for product in (Product.apply, nn.functional.linear):
        torch.manual_seed(4)
        base = Inside(nn.Linear(6, 6), lambda part, x, f=product: f(x, part.weight))
        torch.manual_seed(5)
        model = get_peft_model(base, IntrinsicConfig(d=12, init_weights=False, target_modules="all"))
        model(noise(3, 6)).square().sum().backward()
        gradients.append(model.get_base_model().intrinsic.intrinsic_theta["default"].weight.grad)
    torch.testing.assert_close(*gradients)


class Int8Child(nn.Module):
    """A quantized layer whose parent reads the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.codes = nn.Linear(6, 6, bias=False)
        self.codes.weight = nn.Parameter((noise(6, 6) * 40).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.first(x), self.codes.weight.float() / 40)


def test_a_quantized_weight_that_is_read_is_the_base_s():
    model = get_peft_model(Int8Child(), IntrinsicConfig(d=12, init_weights=False, target_modules="all")).eval()
    base, x = model.get_base_model(), noise(3, 6)
    expected = nn.functional.linear(base.first(x), noise(6, 6).mul(40).to(torch.int8).float() / 40)
    torch.testing.assert_close(base(x), expected, **CLOSE)


class Parts(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part(x) for part in self.values())


class Children(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part(x) for part in self.children())


def test_a_container_that_runs_its_items_skips_the_adapter():
    for kind in (Parts, nn.Sequential):
        torch.manual_seed(0)
        parts = [nn.Linear(6, 6), nn.Linear(6, 6)]
        base = kind(dict(zip("ab", parts, strict=True))) if kind is Parts else kind(*parts)
        model = get_peft_model(base, IntrinsicConfig(d=12, init_weights=False, target_modules="all"))
        assert len(model.get_base_model()) == 2
        found, plain = model(noise(3, 6)), model.unload()
        assert type(plain) is kind
        merged_as_unmerged(plain, noise(3, 6))
        assert found.shape == (3, 6)
    with pytest.raises(RuntimeError, match=r"calls each of its children\(\)"):
        get_peft_model(Children({"a": nn.Linear(6, 6)}), IntrinsicConfig(d=12, target_modules="all"))(noise(3, 6))


@pytest.mark.parametrize("name", ["vit", "mamba"])
def test_offloaded_models_with_direct_parameters_are_adapted(name):
    torch.manual_seed(0)
    model = get_peft_model(build(name), IntrinsicConfig(d=60, init_weights=False, target_modules="all")).eval()
    expected = evaluate(model, name)
    offloaded = get_peft_model(
        cpu_offload(build(name), execution_device="cpu"), IntrinsicConfig(d=60, target_modules="all")
    ).eval()
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    offloaded.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.copy_(theta)
    torch.testing.assert_close(evaluate(offloaded, name), expected, rtol=1e-5, atol=1e-5)
    offloaded.merge_adapter()
    torch.testing.assert_close(evaluate(offloaded, name), expected, **CLOSE)


def test_reading_a_dtype_does_not_materialize_the_weight(monkeypatch):
    """T5 only reads the dtype of a weight."""
    layer = trained("t5").get_base_model().encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer, IntrinsicLinear)
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    made = []
    monkeypatch.setattr(Offset, "materialize", lambda self, theta: made.append(self.name))
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), expected.shape)
    assert isinstance(weight, nn.Parameter)
    assert made == []
    monkeypatch.undo()
    torch.testing.assert_close(weight + 0, expected, **CLOSE)
