"""Outputs, gradients, files, masks and banks are the same on a CUDA device as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, batch, build, trained
from peft import PeftModel, get_peft_model

from peft_intrinsic import AdapterBank, IntrinsicConfig, SupermaskConfig
from peft_intrinsic.analysis import parameter_distance
from peft_intrinsic.codec import compress, load_packed

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""Tolerance of float32, because other kernels add up in another order."""


@pytest.fixture(autouse=True)
def _plain_float32():
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def to_device(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def run(model, inputs):
    """Return the logits, and the gradient of every trainable parameter."""
    model.zero_grad()
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach().cpu(), grads


def compare(model, family):
    expected, grads = run(model, batch(family))
    actual, others = run(model.to(DEVICE), to_device(batch(family)))
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert grads
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"said": True}, {"target_modules": "norms-and-biases", "d": 40}], ids=["did", "said", "vectors"]
)
def test_a_model_moved_to_the_device_has_the_same_outputs_and_gradients(family, options):
    compare(trained(family, **options), family)


def test_an_adapter_saved_on_the_device_loads_on_either(tmp_path):
    config = {"d": 200, "target_modules": "all", "init_weights": False}
    here = get_peft_model(build("bert"), IntrinsicConfig(**config))
    model = get_peft_model(build("bert").to(DEVICE), IntrinsicConfig(**config))
    expected = model(**to_device(batch("bert"))).logits
    model.save_pretrained(tmp_path)
    for base in (build("bert"), build("bert").to(DEVICE)):
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert {p.device.type for p in loaded.parameters()} == {next(base.parameters()).device.type}
        found = loaded(**{n: v.to(loaded.device) for n, v in batch("bert").items()}).logits
        torch.testing.assert_close(found, expected.to(loaded.device), **CLOSE)
    here.load_state_dict({n: v.cpu() for n, v in model.state_dict().items()})
    torch.testing.assert_close(here(**batch("bert")).logits, expected.cpu(), **CLOSE)


def test_merge_then_unmerge_restores_base_weights_bitwise_on_the_device():
    model = trained("bert").to(DEVICE)
    before = {name: p.clone() for name, p in model.get_base_model().state_dict().items() if "intrinsic" not in name}
    inputs = to_device(batch("bert"))
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_masks_have_the_same_outputs_and_gradients():
    model = get_peft_model(build("bert"), SupermaskConfig(initial_sparsity=0.2)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    compare(model, "bert")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_finite_float32_gradients(dtype):
    model = get_peft_model(build("bert").to(DEVICE, dtype), IntrinsicConfig(d=200))
    logits = model(**to_device(batch("bert"))).logits
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Inductor, on its choices
def test_a_compiled_model_has_the_same_outputs_and_gradients():
    model = trained("bert").to(DEVICE)
    inputs = to_device(batch("bert"))
    expected, grads = run(model, inputs)
    found, compiled = run(torch.compile(model, fullgraph=True), inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    for name, grad in grads.items():
        same = next(value for key, value in compiled.items() if key.endswith(name))
        torch.testing.assert_close(same, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_a_bank_gives_the_same_outputs():
    numbers = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) / 500
    found = []
    for place in ("cpu", DEVICE):
        model = trained("bert").to(place)
        inputs = {name: value.to(place) for name, value in batch("bert").items()}
        with AdapterBank(model, numbers).select([2, -1, 0, 1]), torch.no_grad():
            found.append(model(**inputs).logits.cpu())
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_packed_adapter_loads_on_the_device():
    packed = compress(trained("bert"), 16)
    here = load_packed(build("bert"), packed).eval()
    model = load_packed(build("bert").to(DEVICE), packed).eval()
    with torch.no_grad():
        found, expected = model(**to_device(batch("bert"))).logits, here(**batch("bert")).logits
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_distance_is_measured_between_devices():
    base = build("bert")
    tuned = copy.deepcopy(base).to(DEVICE)
    with torch.no_grad():
        for p in tuned.parameters():
            p.neg_()
    assert parameter_distance(base, tuned).total.angular == pytest.approx(1.0)
