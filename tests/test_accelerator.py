"""The same on a CUDA device as on the processor: outputs, gradients, files, masks, banks, other code's devices."""

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
"""Other kernels add up in another order; float32 throughout."""


@pytest.fixture(autouse=True)
def _plain_float32():
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def there(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def run(model, inputs):
    """Logits, and the gradient of every trained parameter."""
    model.zero_grad()
    found = model(**inputs)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach().cpu(), grads


def compare(model, family):
    here, grads = run(model, batch(family))
    other, moved = run(model.to(DEVICE), there(batch(family)))
    torch.testing.assert_close(other, here, **CLOSE)
    assert grads
    assert grads.keys() == moved.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(moved[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"said": True}, {"target_modules": "norms-and-biases", "d": 40}], ids=["did", "said", "vectors"]
)
def test_a_model_that_moves_there_gives_the_same(family, options):
    compare(trained(family, **options), family)


def test_an_adapter_made_there_is_the_same_adapter(tmp_path):
    config = {"d": 200, "target_modules": "all", "init_weights": False}
    here = get_peft_model(build("bert"), IntrinsicConfig(**config))
    model = get_peft_model(build("bert").to(DEVICE), IntrinsicConfig(**config))
    expected = model(**there(batch("bert"))).logits
    model.save_pretrained(tmp_path)
    for base in (build("bert"), build("bert").to(DEVICE)):
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert {p.device.type for p in loaded.parameters()} == {next(base.parameters()).device.type}
        found = loaded(**{n: v.to(loaded.device) for n, v in batch("bert").items()}).logits
        torch.testing.assert_close(found, expected.to(loaded.device), **CLOSE)
    here.load_state_dict({n: v.cpu() for n, v in model.state_dict().items()})
    torch.testing.assert_close(here(**batch("bert")).logits, expected.cpu(), **CLOSE)


def test_merging_there_and_back():
    model = trained("bert").to(DEVICE)
    before = {name: p.clone() for name, p in model.get_base_model().state_dict().items() if "intrinsic" not in name}
    inputs = there(batch("bert"))
    with torch.no_grad():
        expected = model(**inputs).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_masks_give_the_same():
    model = get_peft_model(build("bert"), SupermaskConfig(initial_sparsity=0.2)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    compare(model, "bert")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_there(dtype):
    model = get_peft_model(build("bert").to(DEVICE, dtype), IntrinsicConfig(d=200))
    logits = model(**there(batch("bert"))).logits
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Inductor, on what it chose
def test_compiled_there():
    model = trained("bert").to(DEVICE)
    inputs = there(batch("bert"))
    expected, grads = run(model, inputs)
    found, compiled = run(torch.compile(model, fullgraph=True), inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    for name, grad in grads.items():
        same = next(value for key, value in compiled.items() if key.endswith(name))
        torch.testing.assert_close(same, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_a_bank_serves_there():
    numbers = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) / 500
    found = []
    for place in ("cpu", DEVICE):
        model = trained("bert").to(place)
        inputs = {name: value.to(place) for name, value in batch("bert").items()}
        with AdapterBank(model, numbers).select([2, -1, 0, 1]), torch.no_grad():
            found.append(model(**inputs).logits.cpu())
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_packed_adapter_loads_there():
    packed = compress(trained("bert"), 16)
    here = load_packed(build("bert"), packed).eval()
    model = load_packed(build("bert").to(DEVICE), packed).eval()
    with torch.no_grad():
        found, expected = model(**there(batch("bert"))).logits, here(**batch("bert")).logits
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_distance_of_a_model_there_to_one_here():
    base = build("bert")
    tuned = copy.deepcopy(base).to(DEVICE)
    with torch.no_grad():
        for p in tuned.parameters():
            p.neg_()
    assert parameter_distance(base, tuned).total.angular == pytest.approx(1.0)
