"""Modules whose code or parameters are not torch's plain ones: scripted, traced, compiled, split over devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import build, evaluate
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from peft_intrinsic import IntrinsicConfig, SupermaskConfig

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
WAYS = {"scripted": torch.jit.script, "traced": lambda module: torch.jit.trace(module, X)}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.* is deprecated:DeprecationWarning",
    "ignore:.*torch.jit.* is deprecated:FutureWarning",
    "ignore:.*torch.jit.* is not supported:DeprecationWarning",
)


class Net(nn.Module):
    """A block of three modules, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def net(way: str, place: str) -> nn.Module:
    """The model with one submodule scripted or traced."""
    model = Net().eval()
    model.set_submodule(place, WAYS[way](model.get_submodule(place)))
    return model


SECOND = {"target_modules": ["second.0", "second.2"]}


@pytest.mark.parametrize(
    "config", [IntrinsicConfig(d=8, init_weights=False, **SECOND), SupermaskConfig(initial_sparsity=0.5, **SECOND)]
)
@pytest.mark.parametrize("place", ["first", "first.1", "first.2"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_of_other_modules_work_beside_a_scripted_one(way, place, config, tmp_path):
    plain = get_peft_model(Net().eval(), copy.copy(config))
    model = get_peft_model(net(way, place), copy.copy(config))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(plain.get_parameter(name))
    torch.testing.assert_close(model(X), plain(X))
    assert not torch.allclose(plain(X), Net().eval()(X))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(way, place), tmp_path)
    assert torch.equal(loaded(X), model(X))
    torch.testing.assert_close(loaded.merge_and_unload()(X), plain(X))


@pytest.mark.parametrize("target", [None, "all", ["first.1", "first.2"]])
@pytest.mark.parametrize("way", WAYS)
def test_a_scripted_module_is_named_with_the_option_that_leaves_it_out(way, target):
    options: dict[str, Any] = {"d": 8, "target_modules": target}
    words = r"first\.1: a scripted or traced module .* exclude_modules=\['first\.1'\]"
    model = net(way, "first.1")
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, IntrinsicConfig(**options))
    assert not hasattr(model, "intrinsic")
    model = get_peft_model(model, IntrinsicConfig(**options, exclude_modules=["first.1"]))
    assert model.get_nb_trainable_parameters()[0] == 8
    assert model(X).shape == X.shape


def test_a_scripted_copy_that_shares_its_weights_is_named_with_the_original():
    """It would silently compute with the base weights."""
    model = Net()
    model.twin = torch.jit.script(model.first[0])
    with pytest.raises(ValueError, match=r"first\.0, twin: .* exclude_modules=\['first\.0', 'twin'\]"):
        get_peft_model(model, IntrinsicConfig(d=8, target_modules=["first.0"]))
    get_peft_model(model, IntrinsicConfig(d=8, target_modules="all", exclude_modules=["first.0", "twin"]))


@pytest.mark.parametrize("config", [IntrinsicConfig(d=8), SupermaskConfig(), SupermaskConfig(target_modules=["0"])])
@pytest.mark.parametrize("way", WAYS)
def test_a_scripted_model_raises(way, config):
    with pytest.raises(ValueError, match=r"The model is scripted or traced: .* script or trace that after merging"):
        get_peft_model(WAYS[way](nn.Sequential(nn.Linear(8, 8)).eval()), copy.copy(config))


@pytest.mark.parametrize("config", [IntrinsicConfig(d=8, target_modules="all"), SupermaskConfig()])
def test_a_layer_that_was_compiled_by_itself_raises(config):
    """Its compiled code calls the layer that was there, and not what replaces it."""
    model = Net()
    model.second = torch.compile(nn.Linear(8, 8), backend="eager")
    with pytest.raises(ValueError, match=r"was compiled by itself, .* compile after|a OptimizedModule; masks need"):
        get_peft_model(model, copy.copy(config))


@pytest.mark.parametrize("config", [IntrinsicConfig(d=8, target_modules="all-linear"), SupermaskConfig()])
def test_all_linear_layers_of_a_compiled_block_are_adapted(config):
    plain, model = Net(), Net()
    model.first = torch.compile(model.first, backend="eager")
    names = [
        {name for name, p in get_peft_model(each, copy.copy(config)).named_parameters() if p.dim() == 2}
        for each in (plain, model)
    ]
    assert {name.replace("_orig_mod.", "") for name in names[1]} == names[0]


def test_graph_modules_of_fx_are_adapted():
    plain = get_peft_model(Net(), IntrinsicConfig(d=8, target_modules="all"))
    model = get_peft_model(torch.fx.symbolic_trace(Net()), IntrinsicConfig(d=8, target_modules="all"))
    for each in (plain, model):
        each.base_model.vector.intrinsic_theta["default"].weight.data.copy_(torch.linspace(-1e-3, 1e-3, 8))
    assert (plain(X) - Net()(X)).abs().max() > 1  # outputs near those whose tolerance is the default
    torch.testing.assert_close(model(X), plain(X))
    torch.testing.assert_close(model.merge_and_unload()(X), plain(X))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is a group by itself: its parameters are split as those of several are."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def parallel(mesh: Any) -> nn.Module:
    return parallelize_module(build("llama"), mesh, {"model.layers.*.self_attn.q_proj": ColwiseParallel()})


@pytest.mark.parametrize("target", ["all", ["q_proj"]])
def test_weights_split_by_tensor_parallelism_raise(mesh, target):
    model = get_peft_model(parallel(mesh), IntrinsicConfig(d=20, target_modules=target))
    with pytest.raises(RuntimeError, match=r"q_proj.weight is a DTensor: .* Tensor parallelism is not .* tp_plan"):
        evaluate(model, "llama")
    model.add_adapter("norms", IntrinsicConfig(d=20))
    model.set_adapter("norms")
    model.delete_adapter("default")
    evaluate(model, "llama")


def test_masks_of_weights_split_by_tensor_parallelism_raise(mesh):
    with pytest.raises(ValueError, match=r"q_proj, a Linear; masks need .* without .*tp_plan and ZeRO-3"):
        get_peft_model(parallel(mesh), SupermaskConfig())


def test_what_is_not_split_is_adapted_beside_tensor_parallelism(mesh):
    model = get_peft_model(parallel(mesh), IntrinsicConfig(d=20))
    plain = get_peft_model(build("llama"), IntrinsicConfig(d=20))
    for each in (model, plain):
        each.base_model.vector.intrinsic_theta["default"].weight.data.copy_(torch.linspace(-1, 1, 20))
    torch.testing.assert_close(evaluate(model, "llama"), evaluate(plain, "llama"))
    assert not torch.allclose(evaluate(plain, "llama"), evaluate(build("llama"), "llama"))


def test_norms_that_were_sharded_before_attaching_raise(mesh):
    base = build("llama")
    for module in (*base.model.layers, base):
        fully_shard(module, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"norm.weight is a DTensor: .* attach the adapter before fully_shard"):
        evaluate(get_peft_model(base, IntrinsicConfig(d=20, target_modules="norms-and-biases")), "llama")


def test_masks_under_zero_3_raise():
    model = get_peft_model(build("bert"), SupermaskConfig())
    for parameter in model.parameters():
        parameter.ds_id = 0
    with pytest.raises(RuntimeError, match="ZeRO-3 splits weights, and masks need them whole"):
        evaluate(model, "bert")
    base = build("bert")
    for parameter in base.parameters():
        parameter.ds_id = 0
    with pytest.raises(ValueError, match=r"masks need .* without .*tp_plan and ZeRO-3"):
        get_peft_model(base, SupermaskConfig())
