"""Per-sample gradients of θ and λ, and private training with them under opacus."""

from __future__ import annotations

import math
import re
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import batch, output, trained
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.privacy import check_clipping, compute_sample_gradients, find_noise, pop_norms

with_opacus = pytest.mark.skipif(find_spec("opacus") is None, reason="opacus is not installed")
quiet = pytest.mark.filterwarnings("ignore:Secure RNG turned off")
CLOSE = 1e-4
"""Largest error of a float32 gradient, relative to its norm."""


def losses_of(model, samples: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy over the tokens of each sample, or that of the sample."""
    inputs = {name: value for name, value in samples.items() if name != "labels"}
    logits = output(model, inputs).float()
    values = cross_entropy(logits.movedim(-1, 1), samples["labels"], reduction="none")
    mask = samples.get("attention_mask")
    if values.dim() == 1:
        return values
    return values.mean(1) if mask is None else (values * mask).sum(1) / mask.sum(1)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def parameters_of(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients_one_by_one(model, losses, samples: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The gradient of every sample alone, by plain backward passes."""
    rows = []
    for sample in samples:
        model.zero_grad()
        losses(sample).sum().backward()
        rows.append([parameter.grad.clone() for parameter in parameters_of(model)])
    model.zero_grad()
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found - expected).norm(dim=1) < CLOSE * expected.norm(dim=1)).all()
    assert expected.norm(dim=1).min() > 0


MODELS = {
    "every parameter": ("bert", {"target_modules": "all"}),
    "every parameter, SAID": ("bert", {"target_modules": "all", "said": True}),
    "embeddings": ("bert", {"target_modules": ["word_embeddings"]}),
    "norms and biases": ("roberta", {"target_modules": "norms-and-biases"}),
    "dense": ("gpt2", {"projection": "dense", "target_modules": "all", "d": 40}),
    "value biases": ("llama", {"projection": "value_bias", "target_modules": None, "d": 20}),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_every_sample_alone_without_padding(name):
    family, options = MODELS[name]
    model = without_dropout(trained(family, **options))
    ids, lengths = batch(family)["input_ids"], [7, 4, 5, 7]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    labels = torch.tensor([0, 1, 2, 1]) if family == "bert" else ids % 3
    together = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    compute_sample_gradients(model, partial(losses_of, model), together)
    found = [parameter.grad_sample for parameter in parameters_of(model)]
    alone = [
        {key: value[i : i + 1] if value.dim() == 1 else value[i : i + 1, :n] for key, value in together.items()}
        for i, n in enumerate(lengths)
    ]
    for one, other in zip(found, gradients_one_by_one(model, partial(losses_of, model), alone), strict=True):
        assert_close(one, other)
    assert len(found) == (2 if options.get("said") else 1)
    norms = torch.cat(found, 1).norm(dim=1)
    assert torch.equal(pop_norms(model), norms)
    assert all(parameter.grad_sample is None for parameter in parameters_of(model))


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = without_dropout(trained("bert"))
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        samples = {**batch("bert"), "labels": torch.tensor([0, 1, 2, 1])}
        compute_sample_gradients(model, partial(losses_of, model), samples)
        found.append(parameters_of(model)[0].grad_sample)
    assert_close(*found)


class Tiny(nn.Module):
    """A classifier of vectors with two classes; `mixing` sees all samples."""

    def __init__(self, mixing: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mixing, self.head = nn.Linear(5, 8), mixing or nn.Identity(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixing(self.first(x)).tanh())


def tiny(mixing: nn.Module | None = None, **options):
    return get_peft_model(Tiny(mixing), IntrinsicConfig(**{"d": 6, "target_modules": ["first", "head"], **options}))


def points(count: int, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return [(row, int(row.sum() > 0)) for row in x]


def losses_of_points(model, samples) -> torch.Tensor:
    x, y = samples
    return cross_entropy(model(x), y, reduction="none")


@with_opacus
@quiet
@pytest.mark.parametrize("part", [None, 3])
def test_a_step_of_opacus_adds_the_clipped_gradients_of_all_parts_of_a_poisson_batch(part):
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model, data, clip, expected_size = tiny().train(), points(20), 400.0, 10
    losses = partial(losses_of_points, model)
    (theta,) = parameters_of(model)
    start = theta.detach().clone()
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([theta], lr=1e-4),
        data_loader=DataLoader(data, batch_size=expected_size, generator=torch.Generator().manual_seed(0)),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        grad_sample_mode="no_op",
    )
    seen: list[tuple[torch.Tensor, ...]] = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=part or 20, optimizer=optimizer) as parts:
        for samples in parts:
            seen += zip(*samples, strict=True)
            compute_sample_gradients(model, losses, samples)
            optimizer.step()
            optimizer.zero_grad()
            if not optimizer._is_last_step_skipped:
                break
    found = theta.detach().clone()
    theta.data.copy_(start)
    (rows,) = gradients_one_by_one(model, losses, [(x[None], y[None]) for x, y in seen])
    factors = (clip / rows.norm(dim=1)).clamp(max=1.0)
    assert 0 < (factors < 1).float().mean() < 1
    torch.testing.assert_close(found, start - 1e-4 * (factors @ rows) / expected_size)


@with_opacus
@quiet
def test_an_empty_batch_adds_noise_only():
    from opacus import PrivacyEngine

    model = tiny().train()
    (theta,) = parameters_of(model)
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([theta], lr=1.0),
        data_loader=DataLoader(points(20), batch_size=10),
        noise_multiplier=2.0,
        max_grad_norm=3.0,
        noise_generator=torch.Generator().manual_seed(5),
        grad_sample_mode="no_op",
    )
    start = theta.detach().clone()
    compute_sample_gradients(model, partial(losses_of_points, model), loader.collate_fn([]))
    assert theta.grad_sample.shape == (0, 6)
    optimizer.step()
    noise = torch.normal(0.0, 6.0, (6,), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(theta.detach(), start - noise / 10)


@with_opacus
@quiet
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_of_a_training_is_that_of_its_noise_and_steps(accountant):
    """By the accountant alone, and by the noise that was found for it."""
    from opacus import PrivacyEngine
    from opacus.accountants import create_accountant

    data, steps, delta = points(60), 9, 1e-3
    model, engine = tiny().train(), PrivacyEngine(accountant=accountant)
    loader: DataLoader = DataLoader(data, batch_size=20)
    noise = find_noise(2.0, delta, 1 / len(loader), steps, accountant)
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(parameters_of(model), lr=1e-5),
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=1.0,
        grad_sample_mode="no_op",
    )
    for _ in range(3):
        for samples in loader:
            compute_sample_gradients(model, partial(losses_of_points, model), samples)
            optimizer.step()
            optimizer.zero_grad()
    alone = create_accountant(accountant)
    alone.history = [(noise, 20 / 60, steps)]
    assert engine.get_epsilon(delta) == alone.get_epsilon(delta)
    assert 1.98 < engine.get_epsilon(delta) <= 2.0


def advantage(bound: bool) -> tuple[float, float]:
    """The advantage of the best threshold that detects a canary in one step, and the one that ε and δ allow.

    The canary's gradient is far longer than others. `bound` is whether it is clipped.
    """
    from opacus import PrivacyEngine
    from opacus.accountants import create_accountant

    noise, clip, repeats = 2.0, 1.0, 1500
    data = points(8)
    canary = (1000 * torch.ones(5), 0)
    model = tiny().train()
    (theta,) = parameters_of(model)
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([theta], lr=1.0),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=noise,
        max_grad_norm=clip,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(0),
        grad_sample_mode="no_op",
    )
    if not bound:  # the same noise, and a clip that is far too long
        optimizer.max_grad_norm, optimizer.noise_multiplier = 1e6 * clip, noise / 1e6
    sums = []
    for rows in (data, [*data, canary]):
        samples = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
        compute_sample_gradients(model, partial(losses_of_points, model), samples)
        gradients, direction = theta.grad_sample, theta.grad_sample[-1]
        found = []
        for _ in range(repeats):
            theta.grad_sample, theta.summed_grad = gradients.clone(), None
            optimizer.clip_and_accumulate()
            optimizer.add_noise()
            found.append(theta.grad.clone())
        theta.grad_sample = None
        sums.append(torch.stack(found))
    outside, inside = (each @ (direction / direction.norm()) for each in sums)
    thresholds = torch.cat([outside, inside])
    differences = (inside[:, None] > thresholds).float().mean(0) - (outside[:, None] > thresholds).float().mean(0)
    accountant, delta = create_accountant("prv"), 0.1
    accountant.history = [(noise, 1.0, 1)]
    epsilon = accountant.get_epsilon(delta)
    allowed = (math.exp(epsilon) - 1 + 2 * delta) / (math.exp(epsilon) + 1)
    return differences.abs().max().item(), allowed + 5 * math.sqrt(0.5 / repeats)


@with_opacus
@quiet
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # by the accountant, where all samples are used
def test_a_canary_is_recognized_as_rarely_as_epsilon_promises():
    """(ε, δ) bounds the advantage by (e^ε − 1 + 2δ) / (e^ε + 1); five standard errors are added."""
    found, allowed = advantage(bound=True)
    assert 0.1 < found <= allowed < 0.5
    found, allowed = advantage(bound=False)
    assert found > allowed


def contrastive(model, samples) -> torch.Tensor:
    x, y = samples
    logits = model(x)
    return cross_entropy(logits @ logits.detach().T, torch.arange(len(y)), reduction="none")


def normalized_by_the_batch(model, samples) -> torch.Tensor:
    x, y = samples
    return cross_entropy(model(x), y, reduction="none") / len(y)


def relative_to_the_first(model, samples) -> torch.Tensor:
    x, y = samples
    return cross_entropy(model(x) + 3 * model(x)[:1], y, reduction="none")


def summed_by_pairs(model, samples) -> torch.Tensor:
    each = losses_of_points(model, samples)
    return torch.stack([each[i - i % 2 : i - i % 2 + 2].sum() for i in range(len(each))])


@pytest.mark.parametrize("losses", [contrastive, normalized_by_the_batch])
def test_losses_that_depend_on_other_samples_raise(losses):
    model = tiny()
    samples = next(iter(DataLoader(points(8), batch_size=8)))
    compute_sample_gradients(model, partial(losses_of_points, model), samples)
    pop_norms(model)
    with pytest.raises(ValueError, match=r"losses of samples \[0, .* depend on other samples"):
        compute_sample_gradients(model, partial(losses, model), samples)
    assert model.training


class Mixup(nn.Module):
    """Mixes a sample with the one before it, in training alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.3 * x.roll(1, 0) if self.training else x


def test_layers_that_mix_samples_in_training_alone_raise():
    samples = next(iter(DataLoader(points(8), batch_size=8)))
    for layer in (Mixup(), nn.Dropout(0.5)):
        model = tiny(layer).train()
        with pytest.raises(ValueError, match="depend on other samples") if layer.__class__ is Mixup else nullcontext():
            compute_sample_gradients(model, partial(losses_of_points, model), samples)


def at_the_start(model, samples) -> torch.Tensor:
    """All losses are about log(2)."""
    x, y = samples
    return cross_entropy(0.02 * model(x), y, reduction="none")


def divided_by_the_mean(model, samples) -> torch.Tensor:
    each = at_the_start(model, samples)
    return each / each.mean().detach()


def relative_to_the_first_by_value(model, samples) -> torch.Tensor:
    each = at_the_start(model, samples)
    return each - 0.9 * each[:1].detach()


def coupled_by_gradient(model, samples) -> torch.Tensor:
    each = at_the_start(model, samples)
    return each * (1 + 0.5 * (each.mean() - each.mean().detach()))  # the value is that of the sample alone


@pytest.mark.parametrize("losses", [divided_by_the_mean, relative_to_the_first_by_value, coupled_by_gradient])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_that_hide_their_dependence_at_the_start_raise(losses, autocast):
    model = tiny()
    samples = next(iter(DataLoader(points(8), batch_size=8)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compute_sample_gradients(model, partial(at_the_start, model), samples)
        pop_norms(model)
        with pytest.raises(ValueError, match="depend on other samples"):
            compute_sample_gradients(model, partial(losses, model), samples)
    assert all(parameter.grad_sample is None for parameter in parameters_of(model))
    assert model.training


def test_losses_that_depend_on_others_only_in_a_later_batch_raise():
    def losses(samples) -> torch.Tensor:
        x, y, lengths = samples
        return cross_entropy(model(x), y, reduction="none") * lengths / lengths.max()

    model = tiny()
    x, y = next(iter(DataLoader(points(8), batch_size=8)))
    equal, ragged = torch.full((8,), 5.0), torch.arange(1.0, 9.0)
    for lengths in (equal, ragged, ragged):
        compute_sample_gradients(model, losses, [x, y, lengths])
        pop_norms(model)
    with pytest.raises(ValueError, match="depend on other samples"):  # batch 4
        compute_sample_gradients(model, losses, [x, y, ragged])


@pytest.mark.parametrize("losses", [relative_to_the_first, summed_by_pairs])
def test_losses_that_depend_on_samples_of_the_same_half_raise(losses):
    model = tiny()
    samples = next(iter(DataLoader(points(8), batch_size=8)))
    with pytest.raises(ValueError, match="depend on other samples"):
        compute_sample_gradients(model, partial(losses, model), samples)


@pytest.mark.filterwarnings("ignore:Training updates the running statistics")
def test_layers_with_statistics_of_the_batch_raise_and_are_named():
    samples = next(iter(DataLoader(points(8), batch_size=8)))
    model = tiny(nn.BatchNorm1d(8)).train()
    with pytest.raises(ValueError, match="statistics of all samples of a batch: mixing"):
        compute_sample_gradients(model, partial(losses_of_points, model), samples)
    model.get_base_model().mixing.eval()
    compute_sample_gradients(model, partial(losses_of_points, model), samples)
    model = tiny(nn.BatchNorm1d(8, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="statistics of all samples of a batch: mixing"):
        compute_sample_gradients(model, partial(losses_of_points, model), samples)


def unfrozen(model):
    model.get_base_model().first.base_layer.weight.requires_grad_(True)
    return model


def frozen(model):
    model.set_requires_grad("default", False)
    return model


def both_active(model):
    model.add_adapter("second", IntrinsicConfig(d=6, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(target_modules=["first"], modules_to_save=["head"]), r"modules_to_save=\['head'\].*outside θ"),
        (
            lambda: trained("bert", target_modules=["query"], trainable_token_indices=[1]),
            "trainable_token_indices=.*outside θ",
        ),
        (lambda: unfrozen(tiny()), r"outside θ and have no.*first.base_layer.weight.*requires_grad_\(False\)"),
        (lambda: frozen(tiny()), "Adapter 'default' is frozen"),
        (lambda: both_active(tiny()), r"\['default', 'second'\].*exactly one"),
        (lambda: get_peft_model(Tiny(), LoraConfig(target_modules=["head"])), "exactly one, of an IntrinsicConfig"),
        (lambda: nn.Sequential(tiny()), "Pass your PeftModel itself, not the module that make_private returns"),
        (lambda: trained("vit"), "cls_token.*projection.weight.*exclude_modules"),
    ],
)
def test_models_that_cannot_be_trained_privately_raise(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        compute_sample_gradients(model, lambda samples: pytest.fail("the model was called"), [torch.zeros(2, 5)])


def test_invalid_losses_and_batches_raise():
    model = tiny()
    x, y = next(iter(DataLoader(points(8), batch_size=8)))
    losses = partial(losses_of_points, model)
    with pytest.raises(ValueError, match=r"no per-sample gradients\. Call compute_sample_gradients first"):
        pop_norms(model)
    with pytest.raises(ValueError, match=r"one value for each of the 8 samples.*shape \(\)"):
        compute_sample_gradients(model, lambda samples: cross_entropy(model(x), y), [x, y])
    with pytest.raises(ValueError, match=r"first axes of \[7, 8\]"):
        compute_sample_gradients(model, losses, [x, y[:7]])
    for other in ("texts", None, 3, torch.tensor(3)):
        with pytest.raises(ValueError, match=rf"contains '.*' \({type(other).__name__}\).*must be a tensor"):
            compute_sample_gradients(model, losses, {"x": x, "y": y, "other": other})
    with pytest.raises(ValueError, match=r"gradients of samples \[2\] of the batch are not finite"):
        compute_sample_gradients(model, losses, [x.index_fill(0, torch.tensor([2]), float("inf")), y])
    compute_sample_gradients(model, losses, [x, y])
    with pytest.raises(ValueError, match=r"batch before are still there.*optimizer.zero_grad\(\)"):
        compute_sample_gradients(model, losses, [x, y])


@with_opacus
@pytest.mark.filterwarnings("ignore:Optimal order is the")
@pytest.mark.parametrize(("accountant", "epsilon"), [("rdp", 0.05), ("prv", 0.001)])
def test_an_epsilon_that_cannot_be_reached_raises_and_states_the_smallest(accountant, epsilon):
    with pytest.raises(ValueError, match=f"epsilon={epsilon} cannot be reached by accountant='{accountant}'") as raised:
        find_noise(epsilon, 1e-5, 0.01, 100, accountant)
    smallest = float(re.search(r"computes (\S+)\. Choose a larger", str(raised.value))[1])
    assert find_noise(1.1 * smallest + 0.01, 1e-5, 0.01, 100, accountant) > 1


@with_opacus
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_an_epsilon_that_cannot_be_reached_raises_where_the_accountant_is_slow():
    with pytest.raises(ValueError, match=r"epsilon=0\.001 cannot be reached.*noise multiplier of 100"):
        find_noise(0.001, 1 / 600, 0.5, 4, "rdp")
    assert 0.5 < find_noise(3.0, 1 / 600, 0.5, 4, "rdp") < 5


@with_opacus
@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"epsilon": 200.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"sample_rate": 2.0},
        {"steps": 0},
        {"steps": 10.5},
        {"steps": float("inf")},
    ],
)
def test_budgets_out_of_range_raise(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be .*greater than 0"):
        find_noise(**{"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.01, "steps": 10, **wrong})


def test_without_opacus_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=r"peft_intrinsic\[privacy\]"):
        find_noise(1.0, 1e-5, 0.01, 100)


def test_a_clip_of_nearly_all_or_nearly_none_warns():
    norms = torch.linspace(1, 2, 101)
    check_clipping(norms, 1.5)
    with pytest.warns(UserWarning, match=r"max_grad_norm=0.5 clips 100% .* median is 1.5. Raise it"):
        check_clipping(norms, 0.5)
    with pytest.warns(UserWarning, match=r"max_grad_norm=3 clips 0% .* Lower it"):
        check_clipping(norms, 3.0)
    for wrong in (torch.empty(0), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match=r"norms=tensor\(.*at least one value, all of them finite"):
            check_clipping(wrong, 1.0)
