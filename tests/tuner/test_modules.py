"""Kinds of modules: convolutions, recurrent layers, attention that reads its children, odd embeddings."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import batch, build, evaluate, trained
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.modules import IntrinsicEmbedding, IntrinsicLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:Training updates the running statistics")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(5, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bilinear(x, x)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


KINDS = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, groups=2)), noise(2, 4, 7)),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, bias=False)), noise(2, 4, 7, 6)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2)), noise(2, 2, 4, 5, 3)),
    "ConvTranspose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), noise(2, 4, 5, 5)),
    "BatchNorm2d": (lambda: nn.Sequential(nn.BatchNorm2d(4)), noise(2, 4, 5, 5)),
    "GroupNorm": (lambda: nn.Sequential(nn.GroupNorm(2, 4)), noise(2, 4, 5)),
    "RMSNorm": (lambda: nn.Sequential(nn.RMSNorm(6)), noise(2, 3, 6)),
    "PReLU": (lambda: nn.Sequential(nn.PReLU(4)), noise(2, 4, 5)),
    "Bilinear": (Twice, noise(2, 5)),
    "LSTM": (lambda: Recurrent(nn.LSTM), noise(2, 4, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), noise(2, 4, 6)),
    "attention": (Attention, noise(2, 4, 6)),
    "attention without bias": (lambda: Attention(bias=False, add_bias_kv=True), noise(2, 4, 6)),
    "attention of two widths": (lambda: Attention(kdim=6, vdim=6, dropout=0.0), noise(2, 4, 6)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        noise(2, 4, 6),
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), noise(2, 4, 6)),
    "weight_norm": (lambda: nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3))), noise(2, 4, 7)),
}


def call(model: nn.Module, kind: str, x: torch.Tensor) -> torch.Tensor:
    return model(x, x) if kind in ("TransformerDecoderLayer",) else model(x)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_unmerged_with_and_without_gradients(kind):
    """Merging writes plain parameters into a plain module: an independent account of what the forward pass must do."""
    make, x = KINDS[kind]
    torch.manual_seed(0)
    base = make().eval()
    plain = call(base, kind, x).detach()
    d = min(20, sum(p.numel() for p in base.parameters()))
    model = get_peft_model(base, IntrinsicConfig(d=d, init_weights=False, target_modules="all")).eval()
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    with torch.no_grad():
        quick = call(model, kind, x)
    slow = call(model, kind, x)
    slow.square().sum().backward()
    assert theta.grad.abs().min() > 0
    torch.testing.assert_close(quick, slow.detach(), **CLOSE)
    merged = model.merge_and_unload()
    assert (quick - plain).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(call(merged, kind, x), quick, **CLOSE)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "LSTM", "attention", "TransformerEncoder", "weight_norm"])
def test_gradients_equal_finite_differences(kind):
    make, x = KINDS[kind]
    torch.manual_seed(0)
    config = IntrinsicConfig(d=5, block_size=8, init_weights=False, target_modules="all")
    model = get_peft_model(make().double().eval(), config).double()
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    weights = noise(*call(model, kind, x.double()).shape).double()
    (call(model, kind, x.double()) * weights).sum().backward()
    with torch.no_grad():
        for j in range(5):
            values = []
            for sign in (1, -1):
                theta[j] += sign * 1e-5
                values.append((call(model, kind, x.double()) * weights).sum())
                theta[j] -= sign * 1e-5
            # The projection computes in float32, so the step cannot be small.
            slope = (values[0] - values[1]) / 2e-5
            assert abs(slope - theta.grad[j]) < 2e-3 * theta.grad.abs().max()


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_embedding_options_work_as_without_an_adapter(options):
    """Output and gradient against a plain embedding with the weight W0 + ΔW."""
    torch.manual_seed(0)
    index = torch.tensor([[0, 1, 2, 2], [4, 0, 1, 0]])
    model = get_peft_model(
        nn.Sequential(nn.Embedding(5, 6, **options)),
        IntrinsicConfig(d=7, block_size=8, init_weights=False, target_modules="all"),
    )
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    plain = nn.Embedding(5, 6, **options)
    (layer,) = model.base_model.tuner_layers()
    with torch.no_grad():
        plain.weight.copy_(layer.base_parameter("weight") + layer.get_delta_weight("default"))
        columns = []
        saved = theta.clone()
        for j in range(7):
            theta.zero_()
            theta[j] = 1
            columns.append(layer.get_delta_weight("default").flatten())
        theta.copy_(saved)
    weights = noise(2, 4, 6)
    torch.testing.assert_close(model(index), plain(index), **CLOSE)
    if "scale_grad_by_freq" in options:
        return  # torch rescales the gradient of the table, which is not the gradient of the loss
    (model(index) * weights).sum().backward()
    (plain(index) * weights).sum().backward()
    expected = torch.stack(columns) @ plain.weight.grad.flatten()
    torch.testing.assert_close(theta.grad, expected, **CLOSE)


def test_modules_get_the_wrapper_of_their_kind():
    model = trained("whisper").get_base_model()
    assert isinstance(model.model.decoder.embed_tokens, IntrinsicEmbedding)
    assert isinstance(model.model.decoder.layers[0].fc1, IntrinsicLinear)
    assert isinstance(model.model.decoder.layer_norm, nn.LayerNorm)  # in place, under its own name
    assert "weight" in dict(model.model.decoder.layer_norm.named_parameters())
    assert isinstance(trained("mamba").get_base_model().backbone.layers[0].mixer.conv1d, nn.Conv1d)


def test_a_wrapper_has_the_attributes_of_its_layer():
    layer = trained("bert").get_base_model().bert.embeddings.word_embeddings
    assert (layer.num_embeddings, layer.padding_idx) == (97, 0)
    with pytest.raises(AttributeError, match="nowhere"):
        layer.nowhere  # noqa: B018


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_an_adapted_linear_layer_see_its_calls(register):
    model = trained("bert")
    layer = model.get_base_model().bert.encoder.layer[0].intermediate.dense
    expected, seen = evaluate(model, "bert"), []
    getattr(layer.base_layer, register)(lambda module, *tensors: seen.append(tensors[0][0].shape))
    torch.testing.assert_close(evaluate(model, "bert"), expected, **CLOSE)
    assert len(seen) == 1


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_preserve_the_training_mode_of_their_layers(training):
    base = build("bert").train(training)
    base.classifier.train(not training)
    before = {name: module.training for name, module in base.named_modules() if not list(module.children())}
    model = get_peft_model(base, IntrinsicConfig(d=30, target_modules="all")).get_base_model()
    assert {name: model.get_submodule(name).training for name in before} == before
    assert model.classifier.base_layer.training is not training


def test_mamba_decodes_like_the_merged_model():
    """Its step-by-step decoding reads the convolution's weight."""
    model = trained("mamba")
    model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.mul_(5)
    ids = batch("mamba")["input_ids"]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    found = model.generate(input_ids=ids, **fixed)
    base = build("mamba").generate(input_ids=ids, **fixed)
    assert torch.equal(found, model.merge_and_unload().generate(input_ids=ids, **fixed))
    assert not torch.equal(found, base)


def test_target_parameters_adapts_experts():
    """Three-dimensional parameters of a mixture of experts, alone, and a second adapter on top."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = trained("moe", target_parameters=names)
    adapted = evaluate(model, "moe")
    model.add_adapter("second", IntrinsicConfig(d=30, seed=1, target_parameters=names[:1], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = evaluate(model, "moe")
    assert (both - adapted).abs().max() > 1e-3
    moved = {name for name, p in model.merge_and_unload().named_parameters()}
    plain = dict(build("moe").named_parameters())
    changed = {
        name for name in moved if not torch.equal(dict(model.get_base_model().named_parameters())[name], plain[name])
    }
    assert changed == {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}
    torch.testing.assert_close(evaluate(model.get_base_model(), "moe"), both, **CLOSE)


def test_parameters_that_are_not_floating_point_are_reported_once(caplog):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.turn = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    with caplog.at_level(logging.INFO):
        model = get_peft_model(Odd(), IntrinsicConfig(d=4, target_modules="all"))
        model.add_adapter("second", IntrinsicConfig(d=3, target_modules="all"))
    reported = [(record.levelname, record.getMessage()) for record in caplog.records if "turn" in record.getMessage()]
    assert reported == [("INFO", "Not adapted (not floating point): turn")]


@torch.no_grad()
def test_fast_path_of_torch_encoders_is_not_silently_unadapted():
    """In evaluation without gradients torch's encoder layer reads the weights of its children itself."""
    for targets in (None, ["linear1"], ["self_attn"], ["out_proj"], ["norm1"]):
        model = trained("custom", target_modules=targets, d=20)
        adapted = evaluate(model, "custom")
        with torch.enable_grad():
            slow = evaluate(model, "custom")
        torch.testing.assert_close(adapted, slow, **CLOSE)
        assert not torch.allclose(adapted, evaluate(build("custom"), "custom"), atol=1e-5)


@torch.no_grad()
def test_tied_weights_share_one_offset():
    """Targeting one of a tied pair adapts both: merging does not change the output, and they remain tied."""
    model = trained("llama", target_modules=["embed_tokens"])
    expected = evaluate(model, "llama")
    merged = model.merge_and_unload()
    torch.testing.assert_close(evaluate(merged, "llama"), expected, **CLOSE)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


class Holder(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class Encoder(nn.Linear):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


READERS = {  # what a module has, and how it uses it without calling it
    "a parameter of a module that never runs": (Holder, lambda part, x: x * part.gamma),
    "a scalar": (lambda: nn.Parameter(torch.tensor(1.5)), lambda part, x: x * part),
    "ParameterList": (lambda: nn.ParameterList([torch.ones(4), torch.ones(4)]), lambda part, x: x * part[0] + part[1]),
    "ParameterDict": (
        lambda: nn.ParameterDict({"k": torch.ones(4), "z": torch.ones(4)}),
        lambda p, x: x * p.k + p["z"],
    ),
    "weights in a loop": (
        lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        lambda part, x: sum(nn.functional.linear(x, layer.weight, layer.bias) for layer in part),
    ),
    "the weight of a grandchild": (
        lambda: nn.Sequential(nn.Sequential(nn.Embedding(4, 4))),
        lambda part, x: nn.functional.linear(x, part[0][0].weight),
    ),
    "another method": (lambda: Encoder(4, 4), lambda part, x: part.encode(x)),
}


@pytest.mark.parametrize("kind", READERS)
def test_parameters_that_are_read_without_a_call_have_their_offsets(kind):
    make, use = READERS[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.part = nn.Linear(4, 4), make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return use(self.part, self.first(x))

    x = noise(3, 4)
    model = get_peft_model(Model(), IntrinsicConfig(d=12, init_weights=False, target_modules="all")).eval()
    found = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), Model()(x))
    torch.testing.assert_close((merged := model.merge_and_unload())(x), found, **CLOSE)
    assert not any(torch.equal(p, q) for p, q in zip(merged.parameters(), Model().parameters(), strict=True))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.normalization, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.normalization(x))


def test_running_statistics_warn_and_are_saved_with_modules_to_save(tmp_path):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1
    with pytest.warns(UserWarning, match=r"running statistics of 1 modules \(normalization\).*modules_to_save"):
        get_peft_model(Normalized(), IntrinsicConfig(d=2))
    model = get_peft_model(Normalized(), IntrinsicConfig(d=2, modules_to_save=["normalization"])).train()
    model(x)
    model.save_pretrained(tmp_path)
    expected = model.eval()(x)
    assert not torch.allclose(expected, Normalized().eval()(x), atol=0.1)
    assert torch.equal(PeftModel.from_pretrained(Normalized(), tmp_path).eval()(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), Normalized().eval()(x))
