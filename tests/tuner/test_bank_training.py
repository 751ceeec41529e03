"""Training the rows of a bank: each row as its own adapter alone."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, build, output
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, set_seed

from peft_intrinsic import AdapterBank, IntrinsicConfig, RowAdam

CLOSE = 1e-3
"""Relative distance of gradients in float32, whose sums have other orders in other batches."""

TRAINED = 1e-4
"""Relative distance of trained vectors and losses. The models are float64: Adam makes whole steps of entries that are
noise around zero. P is float32."""

EPS = 5e-3
"""The same for SparseAdam, which adds ε before it corrects the bias of the second moment, and Adam after."""

INDEX = [2, 2, -1, 0]


def bank_of(name: str, rows: int = 3, **options) -> AdapterBank:
    """A bank in training mode, with rows of its own and without dropout."""
    config = {"d": 60, "target_modules": "all-linear", **options}
    model = get_peft_model(build(name), IntrinsicConfig(**config)).train()
    for module in model.modules():
        for own in ("p", "dropout"):  # of nn.Dropout, and of T5's attention
            if isinstance(getattr(module, own, None), float):
                setattr(module, own, 0.0)
    generator = torch.Generator().manual_seed(1)
    return AdapterBank(model, (torch.randn(rows, 60, generator=generator) / 500).requires_grad_())


def loss(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model, inputs).square().flatten(1).sum(1)


def by_loop(bank: AdapterBank, inputs: dict[str, torch.Tensor], index: list[int]) -> torch.Tensor:
    """The gradients of the rows, each sample by itself with its row as the attached adapter."""
    vector = bank.model.base_model.vector
    parts = [v["default"].weight for v in (vector.intrinsic_theta, vector.intrinsic_lambda) if "default" in v]
    gradients = torch.zeros_like(bank.vectors)
    for i, row in enumerate(index):
        if row >= 0:
            for part, values in zip(parts, bank.vectors[row].split([len(p) for p in parts]), strict=True):
                part.data.copy_(values)
                part.grad = None
            loss(bank.model, {key: value[i : i + 1] for key, value in inputs.items()}).sum().backward()
            gradients[row] += torch.cat([part.grad for part in parts])
    return gradients


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = CLOSE) -> None:
    """Compare all values by their distance, relative to their norm."""
    assert expected.any()
    assert float(((found - expected).norm() / expected.norm()).detach()) < tolerance


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradients_of_the_rows_are_those_of_each_sample_alone(name, said):
    bank = bank_of(name, said=said)
    with bank.select(INDEX):
        loss(bank.model, batch(name)).sum().backward()
    found = bank.vectors.grad.to_dense()
    assert found.any(1).tolist() == [True, False, True]
    assert_near(found, by_loop(bank, batch(name), INDEX))


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_checkpointing_recomputes_with_the_rows_of_its_own_forward_pass(name, thread):
    """Several forward passes before one backward pass, which may be in another thread, as on a GPU, and inside of
    another choice."""
    bank, first, second = bank_of(name, said=True), INDEX, [1, 1, 0, -1]
    expected = by_loop(bank, batch(name), first) + by_loop(bank, batch(name), second)
    bank.model.gradient_checkpointing_enable()
    with bank.select(first):
        total = loss(bank.model, batch(name)).sum()
    with bank.select(second):
        total = total + loss(bank.model, batch(name)).sum()
        if thread:
            backward = threading.Thread(target=total.backward)
            backward.start()
            backward.join()
        else:
            total.backward()
    assert_near(bank.vectors.grad.to_dense(), expected)
    theta = bank.model.base_model.vector.intrinsic_theta["default"].weight
    theta.grad = None
    loss(bank.model, batch(name)).sum().backward()  # without a choice: the adapter itself
    checkpointed, theta.grad = theta.grad, None
    for module in bank.model.modules():
        module.gradient_checkpointing = False
    loss(bank.model, batch(name)).sum().backward()
    assert_near(checkpointed, theta.grad)
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in bank.model.unload().modules()]
    assert {function.func for function in functions if function} == {checkpoint}


def test_checkpointing_that_cannot_know_the_rows_raises():
    bank = bank_of("llama")
    bank.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    bank.model.enable_input_require_grads()
    with (
        pytest.raises(RuntimeError, match=r"of a batch with several adapters.*'use_reentrant': False"),
        bank.select(INDEX),
    ):
        output(bank.model, batch("llama"))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: self.second(self.first(x).tanh()), x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the proof
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_model_s_own_raises_instead_of_using_other_rows(reentrant):
    model = get_peft_model(Checkpointed(reentrant), IntrinsicConfig(d=10, target_modules="all"))
    bank = AdapterBank(model, torch.randn(3, 10).div(500).requires_grad_())
    with bank.select([0, 1]):
        total = model(torch.randn(2, 6).requires_grad_()).sum()
        with pytest.raises(
            RuntimeError, match=r"which adapters the samples had is unknown.*gradient_checkpointing_enable"
        ):
            total.backward()
    assert bank.vectors.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_random_numbers_are_those_of_one_adapter(checkpointing):
    """The first mixed batch, too, which the model runs on other batches before."""
    config = IntrinsicConfig(d=60, target_modules="all-linear", init_weights=False)
    model = get_peft_model(build("bert"), config).train()
    bank = AdapterBank(model, 3)
    theta = model.base_model.vector.intrinsic_theta["default"].weight
    if checkpointing:
        model.gradient_checkpointing_enable()
    values = []
    for index in (None, [0, 1, 2, 0]):
        torch.manual_seed(0)
        found = loss(model, batch("bert")) if index is None else bank(adapter_index=index, **batch("bert")).logits
        found = found if index is None else found.square().sum(1)
        found.sum().backward()
        values.append((found.detach(), torch.rand(1)))
    assert_near(values[1][0], values[0][0])
    assert torch.equal(values[1][1], values[0][1])
    assert_near(bank.vectors.grad.to_dense().sum(0), theta.grad)


def test_autocast_in_bfloat16_gives_the_gradients_of_one_adapter():
    bank = bank_of("bert")
    bank.vectors.data[:] = bank.vectors[0]
    theta = bank.model.base_model.vector.intrinsic_theta["default"].weight
    theta.data.copy_(bank.vectors[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss(bank.model, batch("bert")).sum().backward()
        with bank.select([0, 1, 2, 0]):
            loss(bank.model, batch("bert")).sum().backward()
    assert bank.vectors.grad.dtype == torch.float32
    assert_near(bank.vectors.grad.to_dense().sum(0), theta.grad, 0.05)  # bfloat16 has three digits


class Scaled(nn.Module):
    """Multiplies by a buffer, which the backward pass needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        x = self.layer(x) * self.scale
        return x if shift is None else x + shift


def test_the_first_batch_of_another_kind_does_not_break_an_earlier_backward_pass():
    """Its proof runs between the forward and the backward pass of the first."""
    model = get_peft_model(Scaled(), IntrinsicConfig(d=10, target_modules="all"))
    bank, x = AdapterBank(model, 2), torch.randn(2, 6)
    (bank(x, adapter_index=[0, 1]).sum() + bank(x, torch.ones(2, 6), adapter_index=[1, 0]).sum()).backward()
    assert bank.vectors.grad.to_dense().any(1).tolist() == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by the compiler
def test_a_compiled_bank_learns_as_an_uncompiled_one_without_recompilation():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    bank = bank_of("llama", said=True)
    compiled, inputs = torch.compile(bank, backend="aot_eager"), batch("llama")
    graphs = []
    for index in (INDEX, [0, 0, 1, 2], [2, -1, 1, 1]):
        gradients = []
        for call in (compiled, bank):  # the compiled one first: it has no uncompiled pass before
            call(adapter_index=index, **inputs).logits.square().sum().backward()
            gradients.append(bank.vectors.grad.to_dense())
            bank.vectors.grad = None
        assert_near(*gradients)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 3
    torch.compiler.reset()


OPTIMIZERS: dict[str, Any] = {
    "SGD": (lambda p: torch.optim.SGD(p, 1e-6), lambda p: torch.optim.SGD(p, 1e-6)),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(list(p), 1e-3), lambda p: torch.optim.Adam(p, 1e-3)),
    "RowAdam": (
        lambda p: RowAdam(p, 1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    ),
}
EVERY = [[0, 1, 2]] * 6
SOME = [[0, 1], [0], [1, 0], [2], [2, 1], [2, 0]]


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(
    ("kind", "steps"), [("SGD", EVERY), ("SGD", SOME), ("SparseAdam", EVERY), ("RowAdam", EVERY), ("RowAdam", SOME)]
)
def test_adapters_trained_together_equal_adapters_trained_one_by_one(kind, steps, said):
    """Each step has two samples of each of these adapters, whose mean losses are added."""
    together, alone = OPTIMIZERS[kind]
    model = get_peft_model(build("bert"), IntrinsicConfig(d=60, said=said, target_modules="all-linear")).eval().double()
    vector = model.base_model.vector
    start = vector.concatenate("default").detach().clone()
    generator = torch.Generator().manual_seed(2)
    data = [
        (torch.randint(3, 50, (3, 2, 7), generator=generator), torch.randint(3, (3, 2), generator=generator))
        for _ in steps
    ]
    bank = AdapterBank(model, 3)
    optimizer = together(bank.parameters())
    for (ids, labels), rows in zip(data, steps, strict=True):
        before = bank.vectors.detach().clone()
        index = [row for row in rows for _ in range(2)]
        logits = bank(adapter_index=index, input_ids=ids[rows].flatten(0, 1)).logits
        (nn.functional.cross_entropy(logits, labels[rows].flatten()) * len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        others = [row for row in range(3) if row not in rows]
        assert torch.equal(bank.vectors[others], before[others])
    for row in range(3):
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for part, values in zip(parameters, start.split([len(p) for p in parameters]), strict=True):
                part.copy_(values)
        optimizer = alone(parameters)
        for (ids, labels), rows in zip(data, steps, strict=True):
            if row in rows:
                nn.functional.cross_entropy(model(input_ids=ids[row]).logits, labels[row]).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_near(
            bank.vectors[row] - start, vector.concatenate("default") - start, EPS if kind == "SparseAdam" else TRAINED
        )


def test_only_the_rows_are_parameters_and_only_they_learn():
    bank = AdapterBank(get_peft_model(build("bert"), IntrinsicConfig(d=60, said=True)), 5)
    model = copy.deepcopy(bank.model)
    assert [p.shape for p in bank.parameters()] == [(5, 60)]
    optimizer = RowAdam(bank.parameters())
    bank(adapter_index=[1, 3, 3, 1], **batch("bert")).logits.sum().backward()
    assert bank.vectors.grad.is_sparse
    assert bank.vectors.grad.coalesce().indices().tolist() == [[1, 3]]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bank.model.parameters(), model.parameters(), strict=True))
    changed = (bank.vectors != model.base_model.vector.concatenate("default")).any(1)
    assert changed.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}]
)
def test_options_of_row_adam_out_of_range_raise_as_in_torch(wrong):
    parameters = list(torch.nn.Embedding(2, 3, sparse=True).parameters())
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* must be"):
        RowAdam(parameters, **wrong)


def test_a_gradient_that_is_not_finite_updates_no_row():
    bank = AdapterBank(get_peft_model(build("bert"), IntrinsicConfig(d=60)), 3)
    optimizer, before = RowAdam(bank.parameters()), bank.vectors.detach().clone()
    factors = torch.tensor([1.0, float("inf"), 1.0, 1.0])[:, None]
    (bank(adapter_index=[0, 1, 2, 2], **batch("bert")).logits * factors).sum().backward()
    with pytest.raises(ValueError, match=r"gradients of rows \[1\] are not finite, so no row was updated"):
        optimizer.step()
    assert torch.equal(bank.vectors, before)
    bank.vectors.grad = torch.zeros_like(bank.vectors)
    with pytest.raises(ValueError, match="gradient is dense"):
        optimizer.step()


ROWS = 32
IDS = torch.randint(3, 90, (ROWS, 7), generator=torch.Generator().manual_seed(3))


def trainer(model: nn.Module, folder: Path, index: list[int], optimizer: Any, steps: int = 8, **options) -> Trainer:
    """Trainer on a dataset with the column `adapter_index`, and one that no model takes."""
    columns = {"input_ids": IDS.tolist(), "labels": (IDS[:, 0] % 3).tolist()}
    data = Dataset.from_dict({**columns, "adapter_index": index, "comment": ["a film"] * ROWS})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        logging_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        optimizer_cls_and_kwargs=optimizer,
        compute_metrics=lambda found: {"correct": int((found.predictions.argmax(-1) == found.label_ids).sum())},
    )


def of_users(names: list[str] | None = None, seed: int = 0) -> AdapterBank:
    model = get_peft_model(build("bert").double(), IntrinsicConfig(d=60, seed=seed, said=True, task_type="SEQ_CLS"))
    return AdapterBank(model.double(), 4, names=names)


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_trainer_trains_a_row_as_the_adapter_itself(tmp_path, options):
    """With its default clipping of gradients, and an evaluation with labels."""
    bank = of_users()
    run = trainer(bank, tmp_path, [2] * ROWS, (RowAdam, {"lr": 1e-3}), **options)
    run.train()
    found = run.evaluate()
    model = of_users().model
    plain = trainer(model, tmp_path, [2] * ROWS, (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.0}), **options)
    plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=TRAINED)
    assert_near(bank.vectors[2], model.base_model.vector.concatenate("default"), TRAINED)
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=TRAINED)
    assert "eval_correct" in found


def test_an_interrupted_training_resumes_with_its_optimizer_state(tmp_path):
    index, optimizer = [i % 4 for i in range(ROWS)], (RowAdam, {"lr": 1e-3})
    whole = of_users(list("abcd"))
    trainer(whole, tmp_path / "whole", index, optimizer).train()
    trainer(of_users(list("abcd")), tmp_path / "killed", index, optimizer, steps=4).train()
    resumed = of_users(list("abcd"))
    trainer(resumed, tmp_path / "killed", index, optimizer).train(resume_from_checkpoint=True)
    assert_near(resumed.vectors - of_users().vectors, whole.vectors - of_users().vectors, TRAINED)
    saved = load_file(tmp_path / "killed/checkpoint-8/model.safetensors")
    assert {name: len(values) for name, values in saved.items()} == {"rows.weight": 4, "_extra_state": 42}
    other = trainer(of_users(list("abdc")), tmp_path / "killed", index, optimizer)
    with pytest.raises(ValueError, match="rows in the checkpoint have other names, or another order"):
        other.train(resume_from_checkpoint=True)
    other = trainer(of_users(list("abcd"), seed=9), tmp_path / "killed", index, optimizer)
    with pytest.raises(ValueError, match=r"rows in the checkpoint have another projection.*such as seed=9"):
        other.train(resume_from_checkpoint=True)
    bank = of_users(list("abcd"))
    bank.load_state_dict(saved)
    assert torch.equal(bank.vectors, resumed.vectors)
    with pytest.raises(ValueError, match=r"no adapter_config\.json, so it is no saved bank.*bank\.load_state_dict"):
        AdapterBank.from_pretrained(bank.model, tmp_path / "killed/checkpoint-8")


def test_trainer_accepts_a_bank_on_a_quantized_base(tmp_path):
    bank = of_users()
    bank.get_base_model().is_quantized = True
    trainer(bank, tmp_path, [0] * ROWS, (RowAdam, {"lr": 1e-3}))


def test_smoothed_labels_of_a_language_model_are_shifted(tmp_path):
    """Trainer shifts them for the classes that it knows by name."""
    model = get_peft_model(build("llama"), IntrinsicConfig(d=60, task_type="CAUSAL_LM"))
    ids = torch.randint(3, 90, (8, 10), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for one, more in ((model, {}), (AdapterBank(model, 2), {"adapter_index": [0] * 8})):
        data = Dataset.from_dict({"input_ids": ids, "labels": ids, **more})
        arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
        found.append(Trainer(one, arguments, eval_dataset=data).evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=TRAINED)


def test_training_continues_with_appended_rows(tmp_path):
    """The optimizer has the moments of the old rows, and new rows learn as from the start."""
    bank = of_users()
    run = trainer(bank, tmp_path, [2] * ROWS, (RowAdam, {"lr": 1e-3}), steps=2)
    run.train()
    before = bank.vectors.detach().clone()
    bank.append(1)
    run.train_dataset = run.train_dataset.remove_columns("adapter_index").add_column("adapter_index", [4] * ROWS)
    set_seed(0)  # of the order of the data, and of dropout
    run.train()
    assert torch.equal(bank.vectors[:4], before)
    fresh = of_users()
    alone = trainer(fresh, tmp_path, [0] * ROWS, (RowAdam, {"lr": 1e-3}), steps=2)
    set_seed(0)
    alone.train()
    assert_near(bank.vectors[4], fresh.vectors[0], TRAINED)


def test_a_bank_copies_the_vectors_that_it_is_made_of():
    start = torch.zeros(2, 60, dtype=torch.float64)
    banks = [AdapterBank(of_users().model, start.requires_grad_()) for _ in range(2)]
    with torch.no_grad():
        banks[0].vectors.add_(1.0)
    assert not start.any()
    assert AdapterBank(banks[1].model, banks[1].vectors).vectors.data_ptr() != banks[1].vectors.data_ptr()


def test_what_a_bank_cannot_merge_raises():
    bank = of_users()
    with pytest.raises(ValueError, match="A bank has many adapters"):
        bank.merge_and_unload()
    with bank.select([0, 1]), pytest.raises(ValueError, match=r"Merge outside of select\(\)"):
        bank.model.merge_adapter()
