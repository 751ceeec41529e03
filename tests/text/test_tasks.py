"""Tasks on text: files, datasets, and errors of options."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers.texts import BAD, GOOD, command, write
from test_documents import tiny
from transformers import MPNetConfig, RobertaConfig

from peft_intrinsic.text.launch import LaunchedFit
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.text.tasks import load_files, load_task
from peft_intrinsic.text.training import select_dims
from peft_intrinsic.version import pip_install
from peft_intrinsic_cli import main


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "sentence"}, "has no column 'sentence' (--text, --label), only ['text', 'label']"),
        ({"--label": "class"}, "has no column 'class'"),
        ({"--train": "train.txt"}, "train.txt: the suffix must be one of"),
        ({"--task": "glue/mrpc"}, "(--train) does not go with task='glue/mrpc' (--task)"),
        ({"--config": "absent.yaml"}, "absent.yaml"),
        ({"--dims": "9,5,3"}, "dims (--dims): A grid needs 1 <= low < high"),
        ({"--dims": "many"}, "argument --dims: 'many'"),
        (
            {"--metric": "spearman"},
            "column 'label' does not hold a number, which metric='spearman' (--metric) needs ('no')",
        ),
        ({"--task-type": "TOKEN_CLS", "--metric": "spearman"}, "metric='spearman' is for texts"),
        ({"--train": "tags.jsonl"}, "tags.jsonl, line 1: column 'label' does not hold one label per row"),
        ({"--task-type": "TOKEN_CLS"}, "column 'text' does not hold lists of words ('a very bad film')"),
        ({"--label": "text"}, "label='text' (--label) is a column of the text too"),
        (
            {"--train": "mixed.jsonl", "--eval": "mixed.jsonl"},
            "labels of several types: bool (True; mixed.jsonl, line 1), number (2; mixed.jsonl, line 2)",
        ),
        ({"--eval": "one.jsonl"}, "one.jsonl: every row has the same label, 'yes'"),
        ({"--max-length": "-1"}, "max_length (--max-length) must be at least 1, got -1"),
        ({"--patience": "0"}, "patience (--patience) must be at least 1, got 0"),
        ({"--learning-rates": "nan"}, "(--full-learning-rates, --learning-rates) must be above 0"),
        ({"--target": "90"}, "target must lie in (0, 1], got 90.0"),
        ({"--seeds": "0"}, "seeds must be at least 1, got 0"),
        (
            {"--learning-rates": "fast"},
            "argument --learning-rates: 'fast' is neither 'auto' nor learning rates such as 5e-5",
        ),
        ({"--task": "glue/mrpc", "--dataset": "imdb"}, "a GLUE task (--task, got glue/mrpc) or a dataset"),
    ],
)
def test_command_rejects_invalid_options_and_data(change, message, data, tmp_path, capsys, monkeypatch):
    write(tmp_path, "tags.jsonl", [{"text": GOOD, "label": ["O", "B"]}])
    write(tmp_path, "one.jsonl", [{"text": GOOD, "label": "yes"}] * 2)
    write(tmp_path, "mixed.jsonl", [{"text": GOOD, "label": True}, {"text": BAD, "label": 2}])
    monkeypatch.chdir(tmp_path)
    arguments = command(data, "no-model", tmp_path / "run")
    for option, value in change.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rate: 0.1", "learning_rate: set by each trial"),
        ("learning_rat: 0.1", "TrainingArguments have no learning_rat"),
        ("warmup_steps: a tenth", "warmup_steps='a tenth' of the TrainingArguments is not a number"),
        ("- a list", "more.yaml must hold names and values"),
        ("max_steps: [1]", "max_steps=[1] of the TrainingArguments is not a number"),
        ("lr_scheduler_type: foo", "TrainingArguments (--config, --epochs, --batch-size) cannot work: "),
        ("report_to: [wandbb]", "wandbb is not supported"),
    ],
)
def test_command_rejects_invalid_training_arguments(yaml, message, data, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text(yaml)
    with pytest.raises(SystemExit):
        main(command(data, tiny("bert", tmp_path / "base"), tmp_path / "run", "--config", str(tmp_path / "more.yaml")))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "said", "--dims", "2,512,3"], "(--method) for base (bert): d=2 must exceed the number of λ"),
        (["--method", "lora", "--dims", "8,300,3"], "d must be a multiple of 192, and the grid must hold two"),
        (["--epochs", "-1"], "num_train_epochs (--epochs) must be above 0, got -1"),
        (["--batch-size", "0"], "per_device_train_batch_size (--batch-size) must be at least 1, got 0"),
        (["--method", "bitfit"], "argument --method: invalid choice: 'bitfit' (choose from "),
        (["--max-length", "4000"], "max_length (--max-length) = 4000: base has "),
        (["--dims", "8,1000000,3"], "weights, fewer than 1000000"),
        (["--engine", "ray"], pip_install("[ray]")),
    ],
)
def test_command_rejects_options_that_do_not_fit_the_model(options, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    tiny("bert", tmp_path / "base")
    with pytest.raises(SystemExit):
        main(command(data, "base", tmp_path / "run", *options))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "trials.jsonl").exists()


@pytest.mark.parametrize("options", [{"eval": "mine.csv"}, {"train": "mine.csv"}, {"label": "class"}])
def test_options_of_data_beside_a_task_raise(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"\(--{name}\) does not go with task='glue/mrpc' \(--task\)"):
        TextOptions("no-model", task="glue/mrpc", **options)


def test_columns_beside_a_task_raise():
    with pytest.raises(ValueError, match=r"text=\['title'\] \(--text\) does not go with task='glue/mrpc'"):
        load_task(TextOptions("no-model", task="glue/mrpc", columns=("title",)))


def test_unknown_method_raises_value_error(data, tmp_path):
    options = TextOptions(tiny("bert", tmp_path / "base"), train=data["train"], eval=data["eval"], method="bitfit")
    with pytest.raises(ValueError, match=r"method='bitfit' .* is unknown. Known are did, said"):
        select_dims(options, (8, 16))


def test_splits_of_a_dataset_are_loaded_without_unlabeled_rows(tmp_path, monkeypatch):
    """The current folder has folders with their names. A label of -1 is no label."""
    names = ClassLabel(names=["no", "yes"])
    rows = {"text": [GOOD, BAD, GOOD], "label": [1, 0, -1]}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Dataset.from_dict(rows, features=Features(text=Value("string"), label=names)).to_parquet(
            tmp_path / "hub" / f"{split}.parquet"
        )
    monkeypatch.chdir(tmp_path)
    options = TextOptions("no-model", dataset="hub", train="train", eval="test")
    task = load_task(options)
    assert (task.classes, {split: len(task.data[split]) for split in task.data}) == ([0, 1], {"train": 2, "eval": 2})
    nothing = Dataset.from_dict({"text": [GOOD], "label": [-1]}, features=Features(text=Value("string"), label=names))
    nothing.to_parquet(tmp_path / "hub" / "validation.parquet")
    with pytest.raises(ValueError, match="validation: it has no labeled rows"):
        load_task(replace(options, eval="validation"))
    assert (options.to_settings()["train"], LaunchedFit(options, "python", tmp_path).options.eval) == ("train", "test")


def test_device_options_are_checked_on_the_device_only(tmp_path):
    """Workers of a cluster may have what this machine lacks."""
    arguments = {"bf16": True, "tf32": True, "deepspeed": "absent.json"}
    select_dims(TextOptions(tiny("bert", tmp_path / "base"), task="glue/rte", arguments=arguments), (10, 20))


@pytest.mark.parametrize(("method", "kept"), [("lora", (192, 384)), ("did", (100, 200, 300, 400))])
def test_dims_of_lora_are_multiples_of_its_smallest(method, kept, tmp_path):
    """LoRA has no d between two of its ranks."""
    options = TextOptions(tiny("bert", tmp_path / "base"), task="glue/rte", method=method)
    assert select_dims(options, (100, 200, 300, 400)) == kept


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_that_begin_after_the_padding_are_counted(pad, tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = RobertaConfig(**sizes, pad_token_id=pad)
    config.save_pretrained(tmp_path)
    most = config.max_position_embeddings - config.pad_token_id - 1
    select_dims(TextOptions(str(tmp_path), task="glue/rte", max_length=most), (10, 20))
    with pytest.raises(ValueError, match=rf"--max-length\) = {most + 1}: .* has {most} positions"):
        select_dims(TextOptions(str(tmp_path), task="glue/rte", max_length=most + 1), (10, 20))


def test_method_that_does_not_support_a_model_raises(tmp_path):
    MPNetConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    for method in ("lora", "unilora"):
        with pytest.raises(ValueError, match=rf"'{method}' \(--method\) for .*\(mpnet\): Please specify"):
            select_dims(TextOptions(str(tmp_path), task="glue/rte", method=method), (10, 20))


def test_none_and_na_are_classes_not_missing_values(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nn/a,None\na film,NA\nnull,null\n")
    task = load_files(str(path), str(path), ["text"])
    assert list(task.data["eval"]["text"]) == ["n/a", "a film", "null"]
    assert task.classes == ["NA", "None", "null"]


def test_missing_text_raises_with_its_line(tmp_path):
    path = write(tmp_path, "holes.jsonl", [{"text": GOOD, "label": 0}, {"text": None, "label": 1}])
    with pytest.raises(ValueError, match=r"holes.jsonl, line 2: no value in column 'text'"):
        load_files(path, path, ["text"])


def test_labels_absent_from_training_raise(tmp_path):
    train = write(tmp_path, "train.jsonl", [{"text": GOOD, "label": 0}, {"text": BAD, "label": 1}])
    held_out = write(tmp_path, "eval.jsonl", [{"text": GOOD, "label": 2}])
    with pytest.raises(ValueError, match=r"eval.jsonl, line 1: label 2 does not occur in .*train.jsonl"):
        load_files(train, held_out, ["text"], "label", "accuracy")
    one = write(tmp_path, "one.jsonl", [{"text": GOOD, "label": 0}])
    with pytest.raises(ValueError, match="every row has the same label, 0"):
        load_files(one, one, ["text"], "label", "accuracy")


def test_unknown_glue_task_raises(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["measure", "--model", "x", "--task", "glue/none", "--out", str(tmp_path)])
    assert "task='glue/none' is unknown. Known are glue/cola" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["measure", "--model", "x", "--task", "glue/sst2", "--task-type", "CAUSAL_LM", "--out", str(tmp_path)])
    assert "task_type='CAUSAL_LM': GLUE tasks are SEQ_CLS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"words": ["a", "film"], "tags": ["O"]},
            "line 2: 'words' and 'tags' are not lists of equal length, for TOKEN_CLS",
        ),
        ({"words": [], "tags": ["O"]}, "line 2: 'words' and 'tags' are not lists"),
    ],
)
def test_words_and_tags_of_unequal_length_raise(row, message, tmp_path):
    path = write(tmp_path, "tags.jsonl", [{"words": ["a", "film"], "tags": ["O", "B"]}, row])
    with pytest.raises(ValueError, match=message):
        load_files(path, path, ["words"], "tags", task_type="TOKEN_CLS")


@pytest.mark.slow
def test_run_resumes_with_copied_files_and_rejects_changed_ones(data, tmp_path, capsys):
    """Files count by name and contents, not by path."""
    base, out = tiny("bert", tmp_path / "base"), tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 60\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--config", str(tmp_path / "more.yaml"), "--trials", "4"]
    main(command(data, base, out, *options))
    moved = tmp_path / "moved"
    moved.mkdir()
    moved_data = {name: str(shutil.copy(path, moved)) for name, path in data.items()}
    before = (out / "trials.jsonl").read_text()
    main(command(moved_data, base, out, *options))
    assert (out / "trials.jsonl").read_text() == before
    with open(moved_data["train"], "a") as file:
        file.write('\n{"text": "a film", "label": "yes"}')
    with pytest.raises(SystemExit):
        main(command(moved_data, base, out, *options))
    assert "train: 'train.jsonl, sha256 " in capsys.readouterr().err


def test_tsv_has_no_quotes_and_may_have_further_columns(tmp_path):
    """As in GLUE. The two files need not have the same further columns."""
    train, held_out = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    train.write_text('text\tlabel\tidx\n"a good film\t1\t0\na bad film\t0\t1\n"very bad\t0\t2\n')
    held_out.write_text("text\tlabel\na film\t1\nbad\t0\n")
    task = load_files(str(train), str(held_out), ["text"])
    assert list(task.data["train"]["text"]) == ['"a good film', "a bad film", '"very bad']
    assert task.data["train"].column_names == task.data["eval"].column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl: it has no labeled rows"),
        (
            "ragged.csv",
            'text,label\n"a,1\nb',
            "ragged.csv, line 2: 1 cell separated by ',', but the header has 2; the row ends on line 3",
        ),
        ("broken.jsonl", '{"text": ', "broken.jsonl, line 1: not valid JSON"),
        ("numbers.csv", "text,label\n1,0\n2,1\n", "column 'text' is numeric, not text"),
    ],
)
def test_files_without_usable_rows_raise(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_files(str(tmp_path / name), str(tmp_path / name), ["text"])


def test_settings_describe_a_model_by_its_contents(tmp_path):
    base = Path(tiny("bert", tmp_path / "base"))
    options = TextOptions(str(base), task="glue/mrpc")
    before = options.to_settings()["model"]
    assert before.startswith("base, sha256 ")
    assert replace(options, model="bert-base-uncased").to_settings()["model"] == "bert-base-uncased"
    with open(base / "tokenizer.json", "a") as file:
        file.write(" ")
    assert options.to_settings()["model"] != before


def test_texts_of_the_evaluation_data_that_are_trained_on_are_counted(tmp_path):
    names = [tmp_path / "train.csv", tmp_path / "eval.csv"]
    names[0].write_text("a,b,label\nx,y,0\nx,z,1\n")
    names[1].write_text("a,b,label\nx,z,0\nu,y,1\nx,y,1\n")
    with pytest.warns(UserWarning, match=r"2 of the 3 texts of .*eval\.csv are in .*train\.csv too"):
        load_files(*map(str, names), ["a", "b"])
