"""The command, on files and a tiny model; and what its trials share."""

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

from peft_intrinsic.text.methods import adapter
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.text.tasks import Task, files
from peft_intrinsic.text.training import IGNORED, LanguageFit, TextFit, TokenFit, text_fit
from peft_intrinsic_command import main


def test_the_command_measures_and_goes_on(data, tmp_path, capsys):
    base = tiny("bert", tmp_path / "base")
    out = tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--method", "said", "--config", str(tmp_path / "more.yaml")]
    main(command(data, base, out, *options))
    told = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert told.startswith(f"d90 = {report['answers']['score']['d']}, 90 % interval [")
    assert told.splitlines()[1].startswith("full fine-tuning scores 1.0000 (median of 3 seeds), the target is 0.9000")
    assert report["majority"] == pytest.approx(2 / 3)
    assert (report["baseline"]["learning_rate"], report["points"][0]["learning_rate"]) == (0.01, 3e-4)
    assert report["settings"]["metric"] == "accuracy"
    assert all(score == pytest.approx(1) for score in report["baseline"]["scores"])
    assert report["examples"] == 24
    assert report["answers"]["score"]["d"] in [18, 42, 97, 222, 512]  # 8 numbers, less the scales, do not learn it
    assert (out / "curve.png").exists()
    before = (out / "trials.jsonl").read_text()
    main(command(data, base, out, *options))
    assert (out / "trials.jsonl").read_text() == before
    with pytest.raises(SystemExit) as ended:
        main(command(data, base, out, "--config", str(tmp_path / "more.yaml")))
    assert ended.value.code == 2
    assert "method: 'said' there, 'did' now" in capsys.readouterr().err


def test_a_newcomer_s_run(tmp_path):
    """From a CSV of their own, in a process of its own: look, measure, ask something else."""
    rows = [f"{GOOD if i % 3 else BAD},{'yes' if i % 3 else 'no'}" for i in range(48)]
    (tmp_path / "mine.csv").write_text("\n".join(["review,verdict", *rows]))
    tiny("bert", tmp_path / "base")
    (tmp_path / "more.yaml").write_text("max_steps: 60\nuse_cpu: true\ndataloader_pin_memory: false\n")

    def run(*words: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", "from peft_intrinsic_command import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asked = ["measure", "--model", "base", "--train", "mine.csv", "--eval", "mine.csv", "--text", "review"]
    asked += [
        "--label",
        "verdict",
        "--dims",
        "8,512,6",
        "--full-learning-rates",
        "0.01",
        "--learning-rates",
        "3e-4",
        "--batch",
        "8",
    ]
    asked += ["--config", "more.yaml", "--trials", "14", "--out", "run"]
    planned = run(*asked, "--dry-run")
    assert "base by did on 48 train, 48 eval examples, by accuracy" in planned
    assert "scan from below until the target is reached: 8, 18, 42, 97, 222, 512" in planned
    assert "at most 14 trials" in planned
    assert not (tmp_path / "run").exists()
    assert run(*asked).startswith("d90 ")
    trials = (tmp_path / "run" / "trials.jsonl").read_text()
    assert len(list((tmp_path / "run" / "logs").iterdir())) == len(trials.splitlines())
    told = run("analyze", "run", "--relative-to", "gain", "--target", "0.5", "--out", "half")
    assert told.startswith("d50 ")
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert report["answers"]["gain"]["target"] == pytest.approx(2 / 3 + 0.5 * (report["baseline"]["level"] - 2 / 3))
    assert (tmp_path / "run" / "trials.jsonl").read_text() == trials


def test_trials_share_the_base_and_leave_it_as_it_was(data, tmp_path):
    """In any order, and twice, a trial gives the same score; the base has no trace of it."""
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    quick = {"max_steps": 6, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments=quick)
    before = {name: p.clone() for name, p in fit.base.named_parameters()}
    first = [fit(20, 0, 1e-3)["score"], fit(300, 1, 1e-3)["score"], fit(None, 0, 1e-3)["score"]]
    again = [fit(None, 0, 1e-3)["score"], fit(300, 1, 1e-3)["score"], fit(20, 0, 1e-3)["score"]]
    assert first == again[::-1]
    assert all(torch.equal(p, before[name]) for name, p in fit.base.named_parameters())
    assert list(before) == [name for name, _ in fit.base.named_parameters()]
    assert not any(module._forward_pre_hooks for module in fit.base.modules())


def test_pairs_and_numbers(tmp_path):
    """A regression on two sentences, by Spearman's correlation."""
    rows = [{"a": GOOD, "b": GOOD if i % 2 else BAD, "score": 5.0 * (i % 2) + 0.01 * i} for i in range(24)]
    path = write(tmp_path, "pairs.jsonl", rows)
    task = files(path, path, ["a", "b"], "score", "spearman")
    assert task.majority() == 0
    quick = {"max_steps": 40, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments=quick, patience=None)
    assert isinstance(fit.base.classifier, nn.Linear)
    assert fit.base.classifier.out_features == 1
    assert fit(None, 0, 1e-2)["score"] > 0.7


def test_early_stopping(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    quick = {"num_train_epochs": 50, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, patience=10, arguments=quick)
    epochs = []
    scored = fit.scored
    fit.scored = lambda prediction: epochs.append(1) or scored(prediction)
    assert fit(None, 0, 1e-2)["score"] == pytest.approx(1)
    assert 11 < len(epochs) < 50  # the best epoch's weights, ten epochs after it


def test_the_fresh_head_is_the_same_for_full_training(data, tmp_path):
    base = tiny("bert", tmp_path / "base")
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    one, two = TextFit(base, task), TextFit(base, task)
    assert torch.equal(one.base.classifier.weight, two.base.classifier.weight)
    assert not torch.equal(one.base.classifier.weight, build("bert").classifier.weight[:2])


def test_classes_of_words(tmp_path):
    """Each word has a tag; a word that the tokenizer splits is asked once."""
    rows = [{"words": ["a", word, "film"], "tags": ["O", f"B-{word}", "O"]} for word in ["good", "bad"] * 12]
    path = write(tmp_path, "tags.jsonl", rows)
    task = files(path, path, ["words"], "tags", task_type="TOKEN_CLS")
    assert task.classes == ["B-bad", "B-good", "O"]
    assert task.majority() == pytest.approx(2 / 3)
    fit = TokenFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, "max_steps": 60})
    assert fit.data["train"][0]["labels"] == [2, 1, 2]
    assert fit(None, 0, 1e-2)["score"] == pytest.approx(1)
    assert fit(0, 0)["score"] < 1 <= fit(500, 0, 1e-3)["score"] + 1e-9

    class Halves:
        def __call__(self, words, **options):
            class found(dict):
                @staticmethod
                def word_ids(i):
                    return [None, 0, 1, 1, 2, None]

            return found(input_ids=[[0] * 6 for _ in words])

    fit.tokenizer = Halves()
    assert fit.tokenise({"words": [["a", "good", "film"]], "tags": [["O", "B-good", "O"]]})["labels"] == [
        [IGNORED, 2, 1, IGNORED, 2, IGNORED]
    ]


def test_f1_of_words_leaves_padding_out(tmp_path):
    class prediction:
        label_ids = np.array([[0, 1, IGNORED], [2, 2, 1]])
        predictions = np.eye(3)[np.array([[0, 1, 0], [2, 1, 1]])]

    rows = [{"words": ["a", "good", "film"], "tags": [0, 1, 2]}] * 4
    path = write(tmp_path, "tags.jsonl", rows)
    task = files(path, path, ["words"], "tags", "f1", "TOKEN_CLS")
    fit = TokenFit(tiny("bert", tmp_path / "base"), task)
    # By hand, class by class: 1; 2·2/(2·2+1); 2·1/(2·1+1).
    assert fit.scored(prediction)["score"] == pytest.approx((1 + 4 / 5 + 2 / 3) / 3)


def test_causal_language_model(tmp_path, capsys):
    """The score is minus the loss of transformers' own forward pass, the target a share of the gain."""
    rows = [{"text": GOOD if i % 2 else BAD} for i in range(64)]
    data = {"train": write(tmp_path, "train.jsonl", rows), "eval": write(tmp_path, "eval.jsonl", rows[:32])}
    base = tiny("llama", tmp_path / "base")
    task = files(data["train"], data["eval"], ["text"], task_type="CAUSAL_LM")
    fit = LanguageFit(base, task, max_length=10, arguments={**QUICK, "max_steps": 30})
    ids = torch.tensor(fit.data["eval"]["input_ids"])
    assert ids.shape == (12, 10)  # 32 · 4 words
    assert fit(0, 0)["score"] == pytest.approx(-fit.base(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert fit(None, 0, 1e-2)["score"] > fit(0, 0)["score"] + 0.5
    out = tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 30\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--task-type", "CAUSAL_LM", "--max-length", "10", "--config", str(tmp_path / "more.yaml")]
    main(command(data, base, out, *options))
    report = json.loads((out / "report.json").read_text())
    assert report["untrained"] == pytest.approx(fit(0, 0)["score"], abs=1e-5)
    gain = report["baseline"]["level"] - report["untrained"]
    assert report["answers"]["gain"]["target"] == pytest.approx(report["untrained"] + 0.9 * gain)
    assert "score" not in report["answers"]  # a share of a loss means nothing
    for more, message in ((["--relative-to", "score"], "a share of a loss"), (["--metric", "f1"], "by its loss")):
        with pytest.raises(SystemExit):
            main(command(data, base, tmp_path / "other", *options, *more))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command(data, base, tmp_path / "other", *options, "--max-length", "1000"))
    assert "max_length (--max-length) = 1000 leaves a split without" in capsys.readouterr().err


def test_the_training_data_are_scored_too(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"])
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, "max_steps": 3}, train_score=True)
    found = fit(20, 0, 2e-4)
    alone = TextFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, "max_steps": 3})
    assert found["score"] == alone(20, 0, 2e-4)["score"]
    alone.data["eval"] = alone.data["train"]
    assert found["train_score"] == alone(20, 0, 2e-4)["score"]


def test_tokenised_once_per_folder(data, tmp_path, monkeypatch):
    base, out = tiny("bert", tmp_path / "base"), tmp_path / "run"
    options = TextOptions(base, **data, max_length=8, arguments=QUICK)
    first = text_fit(options, folder=out)
    monkeypatch.setattr(TextFit, "tokenise", lambda *rows: pytest.fail("tokenised again"))
    again = text_fit(options, folder=out)
    assert again.data["train"][:] == first.data["train"][:]
    monkeypatch.undo()
    assert len(text_fit(replace(options, max_length=3), folder=out).data["train"][0]["input_ids"]) == 3


def test_an_encoder_decoder(tmp_path):
    """Its predictions come with hidden states. Every row has one `good`, BART's end of a sentence."""
    rows = [{"text": GOOD if i % 2 else "a good film", "label": i % 2} for i in range(16)]
    task = files(*[write(tmp_path, "rows.jsonl", rows)] * 2, ["text"])
    tokenizer = tiny("bert", tmp_path / "tokenizer")
    build("bart").save_pretrained(tokenizer)
    fit = TextFit(tokenizer, task, arguments={**QUICK, "max_steps": 2})
    assert 0 <= fit(50, 0, 2e-4)["score"] <= 1


def test_yaml_s_numbers(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"])
    numbers = {"weight_decay": "1e-2", "warmup_steps": "1e-1", "max_steps": "1e0"}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, **numbers})
    assert {name: fit.arguments[name] for name in numbers} == {
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "max_steps": 1,
    }
    assert 0 <= fit(8, 0, 0.01)["score"] <= 1


def test_a_classifier_that_diverges_has_no_score(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"])
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, "max_steps": 2, "max_grad_norm": 0})
    assert math.isnan(fit(None, 0, 1e30)["score"])
    assert math.isfinite(fit(None, 0, 1e-3)["score"])


def test_what_is_right_is_kept(data, tmp_path):
    """Of each held-out example; and what the trial logged."""
    task = files(data["train"], data["eval"], ["text"])
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments={**QUICK, "max_steps": 3}, logs=str(tmp_path))
    row = fit(20, 1, 2e-4)
    assert len(row["correct"]) == 24
    assert 0 < np.mean(row["correct"]) == row["score"] < 1
    answers = fit.trainer(fit.base, str(tmp_path / "out"), {}).predict(fit.data["eval"])  # untrained: another model
    assert (fit.right == (answers.predictions.argmax(1) == answers.label_ids)).all()
    assert "train_loss" in (tmp_path / "d=20,seed=1,lr=0.0002.jsonl").read_text()


@pytest.mark.parametrize("method", ["did", "said", "default", "lora", "unilora", "tinylora"])
def test_a_trial_is_determined_by_d_seed_and_rate(method, data, tmp_path):
    task = files(data["train"], data["eval"], ["text"])
    fit = TextFit(tiny("bert", tmp_path / "base"), task, method, arguments={**QUICK, "max_steps": 3})
    torch.manual_seed(5)
    losses = []
    scored = fit.scored
    fit.scored = lambda prediction: losses.append(prediction.predictions.sum()) or scored(prediction)
    fit(600, 0, 1e-3)
    torch.manual_seed(6)
    fit(600, 0, 1e-3)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["default", "lora", "unilora", "tinylora"])
def test_other_methods_on_the_same_axis(method):
    """At most d numbers, the head as it was drawn."""
    base = build("bert")
    least = 2 * 2 * (base.config.hidden_size * 2)  # of LoRA: two layers, queries and values
    d = 2 * least if method == "lora" else 62
    model = get_peft_model(base, adapter(method, d, 0, base, "SEQ_CLS"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == (d if method != "tinylora" else 4 * (d // 4))
    if method == "lora":
        with pytest.raises(ValueError, match=f"lora has {least} numbers at least for this model, got d={least - 1}"):
            adapter(method, least - 1, 0, base, "SEQ_CLS")


def test_arguments_win_over_what_early_stopping_asks(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"])
    more = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 20}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, patience=1, arguments={**QUICK, **more})
    assert fit.arguments["eval_strategy"] == "steps"
    assert fit.arguments["load_best_model_at_end"]
    assert 0 <= fit(8, 0, 0.01)["score"] <= 1


def test_a_model_names_the_classes_as_the_data_do(data, tmp_path):
    base = tiny("bert", tmp_path / "base")
    quick = {**QUICK, "max_steps": 1}
    assert TextFit(base, files(data["train"], data["eval"], ["text"]), arguments=quick).base.config.id2label == {
        0: "no",
        1: "yes",
    }
    names = ClassLabel(names=["contra", "pro"])
    rows = Dataset.from_dict({"text": [GOOD, BAD], "label": [1, 0]})
    rows.cast_column("label", names).to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"))["train"]
    assert Task(DatasetDict(train=stored, eval=stored), ("text",), "label", "accuracy").head()["label2id"] == {
        "contra": 0,
        "pro": 1,
    }
