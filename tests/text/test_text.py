"""Trials on text with a tiny model, and the command that measures them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from helpers.texts import BAD, GOOD, QUICK, command, write
from peft import get_peft_model
from test_documents import tiny
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.text.methods import build_config
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.text.tasks import IGNORED, Task
from peft_intrinsic.text.training import TextFit, TextTraining
from peft_intrinsic_cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny("bert", tmp_path_factory.mktemp("models") / "base")


def build_fit(base: str, data: dict[str, str], steps: int = 3, arguments: dict | None = None, **options) -> TextFit:
    return TextFit(TextOptions(base, **data, arguments={**QUICK, "max_steps": steps, **(arguments or {})}, **options))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_without_a_tokenizer_raises(family, data, tmp_path):
    """transformers makes a BERT tokenizer without words, which would read every text alike."""
    build(family).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        _ = build_fit(str(tmp_path / "bare"), data).training


@pytest.mark.slow
def test_command_measures_and_then_resumes_without_a_trial(base, data, tmp_path, capsys):
    out = tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 100\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--method", "said", "--dims", "8,512,3", "--config", str(tmp_path / "more.yaml")]
    main(command(data, base, out, *options))
    output = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert output.startswith(f"d90 = {report['answers']['score']['d']}, 90 % interval [")
    assert output.splitlines()[1].startswith("full fine-tuning scores 1.0000 (median of 3 seeds), the target is 0.9000")
    assert report["majority"] == pytest.approx(2 / 3)
    assert (report["baseline"]["learning_rate"], report["points"][0]["learning_rate"]) == (0.01, 3e-4)
    assert report["settings"]["metric"] == "accuracy"
    assert all(score == pytest.approx(1) for score in report["baseline"]["scores"])
    assert report["examples"] == 24
    assert report["answers"]["score"]["d"] in [64, 512]  # d = 8 minus the scales is too few
    assert (out / "curve.png").exists()
    before = (out / "trials.jsonl").read_text()
    main(command(data, base, out, *options))
    assert (out / "trials.jsonl").read_text() == before
    with pytest.raises(SystemExit) as ended:
        main(command(data, base, out, *options[2:]))
    assert ended.value.code == 2
    assert "method: 'said' there, 'did' now" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_is_measured_and_analyzed_from_a_csv_with_other_columns(base, tmp_path, monkeypatch, capsys):
    """The plan is printed by a process of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [f"{GOOD if i % 3 else BAD},{'yes' if i % 3 else 'no'}" for i in range(48)]
    (tmp_path / "mine.csv").write_text("\n".join(["review,verdict", *rows]))
    (tmp_path / "more.yaml").write_text("max_steps: 60\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["measure", "--model", base, "--train", "mine.csv", "--eval", "mine.csv", "--text", "review"]
    options += ["--label", "verdict", "--dims", "8,512,6", "--full-learning-rates", "0.01", "--learning-rates", "3e-4"]
    options += ["--batch-size", "8", "--config", "more.yaml", "--trials", "5", "--out", "run"]
    code = "from peft_intrinsic_cli import main; main()"
    call = [sys.executable, "-W", "ignore", "-c", code, *options, "--dry-run"]
    planned = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "base by did on 48 train, 48 eval examples, by accuracy" in planned
    assert "scan from below until the target is reached: 8, 18, 42, 97, 222, 512" in planned
    assert "at most 5 trials" in planned
    assert not (tmp_path / "run").exists()
    main(options)
    assert capsys.readouterr().out.startswith("d90 ")
    trials = (tmp_path / "run" / "trials.jsonl").read_text()
    assert len(list((tmp_path / "run" / "logs").iterdir())) == len(trials.splitlines()) == 5
    main(["analyze", "run", "--relative-to", "gain", "--target", "0.5", "--out", "half"])
    assert capsys.readouterr().out.startswith("d50 ")
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert report["answers"]["gain"]["target"] == pytest.approx(2 / 3 + 0.5 * (report["baseline"]["level"] - 2 / 3))
    assert (tmp_path / "run" / "trials.jsonl").read_text() == trials


@pytest.mark.slow
def test_trials_leave_the_shared_base_unchanged(base, data):
    """A trial has the same score in any order, and again."""
    fit = build_fit(base, data, 6)
    before = {name: p.clone() for name, p in fit.base.named_parameters()}
    first = [fit(20, 0, 1e-3)["score"], fit(300, 1, 1e-3)["score"], fit(None, 0, 1e-3)["score"]]
    again = [fit(None, 0, 1e-3)["score"], fit(300, 1, 1e-3)["score"], fit(20, 0, 1e-3)["score"]]
    assert first == again[::-1]
    assert all(torch.equal(p, before[name]) for name, p in fit.base.named_parameters())
    assert list(before) == [name for name, _ in fit.base.named_parameters()]
    assert not any(module._forward_pre_hooks for module in fit.base.modules())


def test_regression_on_pairs_of_texts_learns(base, tmp_path):
    """The metric is Spearman's correlation."""
    rows = [{"a": GOOD, "b": GOOD if i % 2 else BAD, "score": 5.0 * (i % 2) + 0.01 * i} for i in range(24)]
    path = write(tmp_path, "pairs.jsonl", rows)
    columns = {"columns": ("a", "b"), "label": "score", "metric": "spearman"}
    fit = build_fit(base, {"train": path, "eval": path}, 40, **columns)
    assert fit.task.score_majority() == 0
    assert isinstance(fit.base.classifier, nn.Linear)
    assert fit.base.classifier.out_features == 1
    assert fit(None, 0, 1e-2)["score"] > 0.7


def test_early_stopping_restores_the_best_epoch(base, data):
    fit = build_fit(base, data, -1, {"num_train_epochs": 50}, patience=10)
    epochs = []
    scored = fit.training.compute_metrics
    fit.training.compute_metrics = lambda prediction: epochs.append(1) or scored(prediction)
    assert fit(None, 0, 1e-2)["score"] == pytest.approx(1)
    assert 11 < len(epochs) < 50  # the best epoch's weights, ten epochs after it


def test_new_head_is_initialized_alike_for_full_fine_tuning(base, data):
    one, two = build_fit(base, data), build_fit(base, data)
    assert torch.equal(one.base.classifier.weight, two.base.classifier.weight)
    assert not torch.equal(one.base.classifier.weight, build("bert").classifier.weight[:2])


@pytest.mark.slow
def test_classes_of_words_learn_from_first_tokens(base, tmp_path):
    """A word that the tokenizer splits is scored once."""
    rows = [{"words": ["a", word, "film"], "tags": ["O", f"B-{word}", "O"]} for word in ["good", "bad"] * 12]
    path = write(tmp_path, "tags.jsonl", rows)
    words = {"columns": ("words",), "label": "tags", "task_type": "TOKEN_CLS"}
    fit = build_fit(base, {"train": path, "eval": path}, 60, **words)
    task = fit.task
    assert task.classes == ["B-bad", "B-good", "O"]
    assert task.score_majority() == pytest.approx(2 / 3)
    assert fit.training.data["train"][0]["labels"] == [2, 1, 2]
    assert fit(None, 0, 1e-2)["score"] == pytest.approx(1)
    assert fit(0, 0)["score"] < 1 <= fit(500, 0, 1e-3)["score"] + 1e-9

    class Halves:
        def __call__(self, words, **options):
            class found(dict):
                @staticmethod
                def word_ids(i):
                    return [None, 0, 1, 1, 2, None]

            return found(input_ids=[[0] * 6 for _ in words])

    fit.training.tokenizer = Halves()
    assert fit.training.tokenize({"words": [["a", "good", "film"]], "tags": [["O", "B-good", "O"]]})["labels"] == [
        [IGNORED, 2, 1, IGNORED, 2, IGNORED]
    ]


def test_f1_of_words_ignores_padding(base, tmp_path):
    class prediction:
        label_ids = np.array([[0, 1, IGNORED], [2, 2, 1]])
        predictions = np.eye(3)[np.array([[0, 1, 0], [2, 1, 1]])]

    rows = [{"words": ["a", "good", "film"], "tags": [0, 1, 2]}] * 4
    path = write(tmp_path, "tags.jsonl", rows)
    words = {"columns": ("words",), "label": "tags", "metric": "f1", "task_type": "TOKEN_CLS"}
    fit = build_fit(base, {"train": path, "eval": path}, **words)
    # By hand, class by class: 1; 2·2/(2·2+1); 2·1/(2·1+1).
    assert fit.training.compute_metrics(prediction)["score"] == pytest.approx((1 + 4 / 5 + 2 / 3) / 3)


@pytest.mark.slow
def test_language_model_is_scored_by_its_negative_loss(tmp_path, capsys):
    """The loss is that of transformers' own forward pass; the target is a fraction of the gain."""
    rows = [{"text": GOOD if i % 2 else BAD} for i in range(64)]
    data = {"train": write(tmp_path, "train.jsonl", rows), "eval": write(tmp_path, "eval.jsonl", rows[:32])}
    base = tiny("llama", tmp_path / "base")
    fit = build_fit(base, data, 30, task_type="CAUSAL_LM", max_length=10)
    ids = torch.tensor(fit.training.data["eval"]["input_ids"])
    assert ids.shape == (16, 10)  # 32 · (4 words and their end)
    assert fit(0, 0)["score"] == pytest.approx(-fit.base(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert fit(None, 0, 1e-2)["score"] > fit(0, 0)["score"] + 0.5
    out = tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 30\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--task-type=CAUSAL_LM", "--max-length=10", f"--config={tmp_path / 'more.yaml'}", "--trials=5"]
    main(command(data, base, out, *options))
    report = json.loads((out / "report.json").read_text())
    assert report["untrained"] == pytest.approx(fit(0, 0)["score"], abs=1e-5)
    gain = report["baseline"]["level"] - report["untrained"]
    assert report["answers"]["gain"]["target"] == pytest.approx(report["untrained"] + 0.9 * gain)
    assert "score" not in report["answers"]  # a fraction of a loss is no target
    errors = {"--relative-to=score": "does not work for a loss", "--metric=f1": "by its loss"}
    for option, message in errors.items():
        with pytest.raises(SystemExit):
            main(command(data, base, tmp_path / "other", *options, option))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command(data, base, tmp_path / "other", *options, "--max-length", "1000"))
    assert "max_length (--max-length) = 1000 leaves a split without" in capsys.readouterr().err


@pytest.mark.slow
def test_train_score_is_the_score_on_training_data(base, data):
    found = build_fit(base, data, train_score=True)(20, 0, 2e-4)
    alone = build_fit(base, data)
    assert found["score"] == alone(20, 0, 2e-4)["score"]
    alone.training.data["eval"] = alone.training.data["train"]
    assert found["train_score"] == alone(20, 0, 2e-4)["score"]


def test_data_are_tokenized_once_per_folder(base, data, tmp_path, monkeypatch):
    options, out = TextOptions(base, **data, max_length=8, arguments=QUICK), tmp_path / "run"
    first = TextFit(options, folder=out).training.data["train"][:]
    monkeypatch.setattr(TextTraining, "tokenize", lambda *rows: pytest.fail("tokenized again"))
    assert TextFit(options, folder=out).training.data["train"][:] == first
    monkeypatch.undo()
    shorter = TextFit(replace(options, max_length=3), folder=out).training.data["train"]
    assert len(shorter[0]["input_ids"]) == 3


def test_encoder_decoder_predictions_with_hidden_states_are_scored(tmp_path):
    """Every row has one `good`, BART's end of a sentence."""
    rows = [{"text": GOOD if i % 2 else "a good film", "label": i % 2} for i in range(16)]
    path = write(tmp_path, "rows.jsonl", rows)
    model = tiny("bert", tmp_path / "model")  # for its tokenizer
    build("bart").save_pretrained(model)
    assert 0 <= build_fit(model, {"train": path, "eval": path}, 2)(50, 0, 2e-4)["score"] <= 1


def test_values_that_yaml_reads_as_text_are_converted(base, data):
    numbers = {"weight_decay": "1e-2", "warmup_steps": "1e-1", "max_steps": "1e0"}
    fit = build_fit(base, data, arguments=numbers)
    assert {name: fit.training.arguments[name] for name in numbers} == {
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "max_steps": 1,
    }
    assert 0 <= fit(8, 0, 0.01)["score"] <= 1


def test_diverged_classifier_scores_nan(base, data):
    fit = build_fit(base, data, 2, {"max_grad_norm": 0})
    assert math.isnan(fit(None, 0, 1e30)["score"])
    assert math.isfinite(fit(None, 0, 1e-3)["score"])


def test_row_stores_correct_predictions_and_trial_is_logged(base, data, tmp_path):
    fit = TextFit(TextOptions(base, **data, arguments={**QUICK, "max_steps": 3}), folder=tmp_path)
    row = fit(20, 1, 2e-4)
    assert len(row["correct"]) == 24
    assert 0 < np.mean(row["correct"]) == row["score"] < 1
    training = fit.training
    untrained = training.build_trainer(fit.base, str(tmp_path / "out"), {}).predict(training.data["eval"])
    assert (training.correct == (untrained.predictions.argmax(1) == untrained.label_ids)).all()
    assert "train_loss" in (tmp_path / "logs" / "d=20,seed=1,lr=0.0002.jsonl").read_text()


def test_correct_predictions_have_one_order_in_all_trials(base, tmp_path):
    """Grouped by length, transformers evaluates in another order for each seed."""
    rows = [{"text": " ".join([GOOD, BAD][i % 2] for _ in range(1 + i % 7)), "label": i * i % 5 % 2} for i in range(40)]
    path = write(tmp_path, "rows.jsonl", rows)
    fit = build_fit(base, {"train": path, "eval": path}, 1, {"train_sampling_strategy": "group_by_length"})
    first, second = (fit(None, seed, 1e-20)["correct"] for seed in (0, 1))
    assert first == second
    assert 0 < sum(first) < 40


@pytest.mark.slow
@pytest.mark.parametrize("method", ["did", "said", "default", "lora", "unilora", "tinylora"])
def test_trial_is_determined_by_d_seed_and_learning_rate(method, base, data):
    fit = build_fit(base, data, method=method)
    torch.manual_seed(5)
    losses = []
    scored = fit.training.compute_metrics
    fit.training.compute_metrics = lambda prediction: losses.append(prediction.predictions.sum()) or scored(prediction)
    fit(600, 0, 1e-3)
    torch.manual_seed(6)
    fit(600, 0, 1e-3)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["default", "lora", "unilora", "tinylora"])
def test_methods_have_at_most_d_parameters_and_a_frozen_head(method):
    base = build("bert")
    least = 2 * 2 * (base.config.hidden_size * 2)  # LoRA in two layers, queries and values
    d = 2 * least if method == "lora" else 62
    model = get_peft_model(base, build_config(method, d, 0, base, "SEQ_CLS"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == (d if method != "tinylora" else 4 * (d // 4))
    if method == "lora":
        with pytest.raises(
            ValueError, match=f"d={least - 1} is below the {least} parameters that lora needs for this model"
        ):
            build_config(method, least - 1, 0, base, "SEQ_CLS")


def test_default_method_adapts_the_head_from_its_current_values():
    base = build("bert")
    head = base.classifier.weight.clone()
    configs = build_config("default", 62, 0, base, "SEQ_CLS"), IntrinsicConfig(d=62, task_type="SEQ_CLS")
    models = [get_peft_model(build("bert"), config) for config in configs]
    layers = [list(model.base_model.tuner_layers()) for model in models]
    names = [{offset.name for layer in own for offset in layer.offsets["default"].values()} for own in layers]
    assert "classifier.weight" in names[0] == names[1]
    assert torch.equal(models[0].get_base_model().classifier.base_layer.weight, head)


def test_default_method_has_the_projection_of_stored_trials_for_decoders():
    base = build("llama").to("meta")  # --dry-run loads no weights
    model = get_peft_model(base, build_config("default", 20, 0, base, "CAUSAL_LM"))
    assert model.peft_config["default"].projection == "fastfood"


def test_user_arguments_override_those_of_early_stopping(base, data):
    more = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 20}
    fit = build_fit(base, data, arguments=more, patience=1)
    assert fit.training.arguments["eval_strategy"] == "steps"
    assert fit.training.arguments["load_best_model_at_end"]
    assert 0 <= fit(8, 0, 0.01)["score"] <= 1


def test_model_names_classes_as_the_data_do(base, data, tmp_path):
    assert build_fit(base, data).base.config.id2label == {0: "no", 1: "yes"}
    names = ClassLabel(names=["contra", "pro"])
    rows = Dataset.from_dict({"text": [GOOD, BAD], "label": [1, 0]})
    rows.cast_column("label", names).to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"))["train"]
    assert Task(DatasetDict(train=stored, eval=stored), ("text",), "label", "accuracy").head_options()["label2id"] == {
        "contra": 0,
        "pro": 1,
    }
