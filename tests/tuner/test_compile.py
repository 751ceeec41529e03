"""torch.compile without graph breaks or recompilation, gradient checkpointing, and export of a merged model."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, build, evaluate, output, trained
from packaging.version import Version
from peft import get_peft_model

from peft_intrinsic import AdapterBank, IntrinsicConfig

OLD = Version(torch.__version__) < Version("2.13")  # tried: 2.9.1
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CHECKPOINTED = ["bert", "gpt2", "llama", "t5", "vit"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "custom", "bart"])
def test_whole_graph_forward_and_backward_without_recompilation(name):
    if name == "t5" and OLD:
        pytest.skip("torch's compiler does not follow the copy.deepcopy in transformers' T5")
    model = trained(name, said=True)
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        expected = output(model, batch(name))
        expected.square().sum().backward()
        gradient, theta.grad = theta.grad, None
        found = output(compiled, batch(name))
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(theta.grad, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
        with torch.no_grad():
            theta.sub_(0.01 * theta.grad.sign())
        theta.grad = None
    assert graphs() == 1


@pytest.mark.slow
def test_the_default_backend_gives_the_same_output():
    """The default back end, with its own kernels."""
    model = trained("llama")
    expected = output(model, batch("llama"))
    found = output(torch.compile(model, fullgraph=True), batch("llama"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="torch's compiler does not read values that belong to a thread; the call raises")
def test_mixed_batches_compile_once():
    model = trained("llama")
    bank = AdapterBank(model, torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) / 500)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for index in ([0, 1, 2, -1], [3, 1, 0, 0], [4, 4, 2, 1]):
            with bank.select(index):
                expected = evaluate(model, "llama")  # first: it proves which modules are batch-first
                torch.testing.assert_close(output(compiled, batch("llama")), expected, **CLOSE)
        assert graphs() == 1
        torch.testing.assert_close(output(compiled, batch("llama")), evaluate(model, "llama"), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(build(name), IntrinsicConfig(d=60, said=True, init_weights=False, target_modules="all"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        output(model, batch(name)).square().sum().backward()
        gradients.append(torch.cat([p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "custom"])
def test_a_merged_model_can_be_exported(name):
    merged = trained(name).merge_and_unload()
    inputs = batch(name)
    options = {} if name != "llama" else {"use_cache": False}
    program = torch.export.export(merged, (), {**inputs, **options}, strict=False)
    torch.testing.assert_close(output(program.module(), {**inputs, **options}), evaluate(merged, name), **CLOSE)
