"""Every Python block of README and docs runs, and the examples do what they say, on tiny models and data."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import carriers
import pytest
import torch
import yaml
from conftest import SIZES, build, trained
from mktestdocs import check_md_file
from peft import get_peft_model
from test_docstrings import public_names
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from peft_intrinsic import AdapterBank, IntrinsicConfig
from peft_intrinsic.codec import adapter_from_string
from peft_intrinsic.version import REPOSITORY

ROOT = Path(__file__).parents[1]
OURS = rf"{REPOSITORY}/blob/main/|{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/main/"
LINK = re.compile(r"\]\(([^)]+)\)")
HUB = {
    "bert-base-uncased": "bert",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "wide llama",
    "google/vit-base-patch16-224-in21k": "vit",
    "openai/whisper-tiny": "whisper",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
}
"""The checkpoints that pages name, and the family of the tiny model in place of each."""
REQUIRED = {
    "docs/language_models.md": "trl",
    "docs/quantized_and_distributed.md": "bitsandbytes",
    "docs/sentence_transformers.md": "sentence_transformers",
}
"""Libraries of pages that not every environment of the tests has."""
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
PROTOCOLS = sorted((ROOT / "benchmarks/results").rglob("README.md"))


def name_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")  # by Trainer
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")  # by opacus
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # TRL's own call
@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """With a tiny model wherever a page names a checkpoint of the Hub."""
    if name_page(page) in REQUIRED:
        pytest.importorskip(REQUIRED[name_page(page)])
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for name in [name for name in HUB if name in text]:
        tiny(HUB[name], tmp_path / name)  # a folder in the working directory has precedence
    check_md_file(fpath=page, memory=True)


@pytest.mark.parametrize("page", [*PAGES, *PROTOCOLS], ids=name_page)
def test_links_into_the_repository_name_files_and_headings(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, heading = re.sub(OURS, f"{ROOT.as_posix()}/", target).partition("#")
        if not path.startswith("http"):
            linked = page.parent / path if path else page
            assert linked.exists(), target
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, target


def test_every_folder_of_stored_rows_has_a_protocol_in_the_index():
    index = ROOT / "benchmarks/results/README.md"
    linked = {index.parent / target for target in LINK.findall(index.read_text(encoding="utf-8"))}
    folders = [path for path in sorted(index.parent.iterdir()) if path.is_dir()]
    assert folders
    assert [folder for folder in folders if folder / "README.md" not in linked] == []


def test_readme_has_absolute_links_for_package_indexes():
    targets = LINK.findall(PAGES[0].read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


def pages(entry: Any) -> Iterator[str]:
    """The pages of a part of the navigation, in its order."""
    if isinstance(entry, str):
        yield entry
    else:
        for value in entry if isinstance(entry, list) else entry.values():
            yield from pages(value)


def navigation() -> list[str]:
    return [*pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])]


def included_pages() -> dict[str, str]:
    """The pages from outside of docs/, by their files."""
    tree = ast.parse((ROOT / "docs/hooks.py").read_text(encoding="utf-8"))  # MkDocs is not installed here
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(values["INCLUDED"])


def test_every_page_is_in_the_navigation_once():
    included = included_pages()
    assert all((ROOT / source).is_file() for source in included)
    expected = [page.relative_to(ROOT / "docs").as_posix() for page in DOCS] + list(included.values())
    assert sorted(navigation()) == sorted(expected)


def test_the_list_of_pages_has_every_page_of_the_navigation_in_its_order():
    rows = re.findall(r"^\| \[.+\]\((.+)\) \| (.+) \|$", (ROOT / "docs/contents.md").read_text(encoding="utf-8"), re.M)
    included = {f"../{source}": page for source, page in included_pages().items()}
    assert [included.get(target, target) for target, _ in rows] == navigation()
    assert all(purpose.endswith(".") for _, purpose in rows)


def test_the_reference_lists_every_public_name():
    listed = {
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    inside = (
        "projection",
        "supermask",
        "text",
        "trials",
        "tuner",
    )  # exported by the package itself
    assert {name for name in public_names() if name.split(".")[1] not in inside} <= listed


def test_messages_on_the_troubleshooting_page_are_those_of_the_package():
    """Values are "…" there. A message may be built from several strings, so its parts are looked up."""
    strings = {
        "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in (ROOT / "peft_intrinsic").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    }
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^ *```text\n *(.+)\n *```$", text, re.MULTILINE)
    assert len(messages) > 10
    for part in {part.strip() for message in messages for part in re.split("…\\.?", message)} - {""}:
        assert any(part in string for string in strings), part


def test_the_table_of_choosing_d_is_that_of_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("choosing_d").table()
    assert table.count("\n") > 5
    assert table in (ROOT / "docs/choosing_d.md").read_text(encoding="utf-8")


def tiny(family: str, folder: Path) -> str:
    """A saved tiny model with a tokenizer of its own. Its matrices are as large as trained ones, so that it learns."""
    if family == "wide llama":  # 256 values in its attention layers
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 128}))
    else:
        model = build(family).bert if family == "bert" else build(family)
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film", "a", "very"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", **({"eos_token": "[UNK]"} if "llama" in family else {})}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run an example in this process, which has imported torch already, and return what it prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return out.getvalue()


def labelled(folder: Path, *names: object, rows: int = 40) -> list[str]:
    """Options that name films, which are good or bad, by these labels."""
    pair = [{"text": f"a very {word} film", "label": name} for word, name in zip(["good", "bad"], names, strict=True)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in pair * (rows // 2)))
    return ["--train", "data.jsonl", "--eval", "data.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [(1, 0), ("like it", "dislike it"), (7, -1)])
def test_text_classification_takes_labels_of_any_kind_and_predicts_them_by_name(names, tmp_path):
    data = labelled(tmp_path, *names)
    base = tiny("bert", tmp_path / "base")
    out = run("text_classification.py", "--model", base, *data, "--epochs", "30", "--lr", "1e-3", cwd=tmp_path)
    found = re.search(r"accuracy [\d.]+ -> (1.0000) with d=200; (\d+) bytes in runs/classifier", out)
    assert found, out
    assert int(found[2]) < 5000
    assert "collapsed" not in out
    again = run("text_classification.py", "--evaluate", "runs/classifier", *data[2:], cwd=tmp_path)
    assert f"accuracy {found[1]}" in again
    adapter = tmp_path / "runs/classifier"
    labels = json.loads((adapter / "labels.json").read_text())
    classify = pipeline("text-classification", str(adapter), tokenizer=base)
    found_labels = [row["label"] for row in classify(["a very good film", "a very bad film"])]
    assert [labels[int(label.removeprefix("LABEL_"))] for label in found_labels] == [str(name) for name in names]
    (adapter / "labels.json").unlink()  # as of an adapter that another program saved
    assert f"accuracy {found[1]}" in run(
        "text_classification.py", "--evaluate", "runs/classifier", *data[2:], cwd=tmp_path
    )


@pytest.mark.slow
def test_text_classification_reports_a_collapse_and_what_to_try(tmp_path):
    """A learning rate of 1000 leaves one class for every example, of which half are right."""
    data = labelled(tmp_path, "good", "bad")
    base = tiny("bert", tmp_path / "base")
    out = run("text_classification.py", "--model", base, *data, "--epochs", "30", "--lr", "1000", cwd=tmp_path)
    assert "-> 0.5000" in out
    assert "Training collapsed: the model predicts one class for every example. Its accuracy is 0.5000, that of" in out
    assert "Try a lower learning rate (250 instead of 1000), or a longer warm-up." in out


@pytest.mark.parametrize(
    ("predicted", "told"),
    [([0, 1, 1, 1], ""), ([0, 0, 1, 0], "learned nothing"), ([2, 2, 2, 2], "predicts one class for every example")],
)
def test_collapse_is_an_accuracy_at_the_majority_class_or_a_single_class(predicted, told, monkeypatch, capsys):
    """The labels are 0, 1, 1, 2; always answering 1 has .5."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    importlib.import_module("collapse").report_collapse(predicted, [0, 1, 1, 2], 1e-3)
    assert told in (out := capsys.readouterr().out)
    importlib.import_module("collapse").report_collapse(predicted, [0, 1, 1, 2], 2e-4)
    assert ("Train for more steps first" in capsys.readouterr().out) == bool(told)
    assert bool(out) == bool(told)


@pytest.mark.parametrize("script", ["text_classification.py", "supermask.py", "trajectory.py", "measure_trainer.py"])
def test_examples_name_all_errors_of_their_data(script, tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na film,good\nfilm\na film,Good\n")
    data = ["--train", "data.csv", "--eval", "data.csv", "--model", tiny("bert", tmp_path / "base")]
    with pytest.raises(SystemExit) as raised:
        run(script, *data, cwd=tmp_path)
    message = str(raised.value)
    assert "data.csv, line 3: 1 cell separated by ','" in message
    assert "labels 'Good' (data.csv, line 4) and 'good' (data.csv, line 2) differ in case only" in message


@pytest.mark.slow
def test_trajectory(tmp_path):
    rows = [{"text": f"a very {word} film", "label": int(word == "good")} for word in ["good", "bad"] * 40]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    base = tiny("bert", tmp_path / "base")
    data = ["--model", base, "--train", "data.jsonl", "--eval", "data.jsonl"]
    small = ["--steps", "60", "--snapshots", "4", "--dim", "2", "--full-lr", "1e-3", "--lr", "3e-3"]
    out = run("trajectory.py", *data, *small, cwd=tmp_path)
    assert re.search(r"bert\.encoder\.layer\.1: 2 directions explain (100\.0|9\d\.\d)% of the change", out), out
    found = re.search(r"accuracy ([\d.]+) fully fine-tuned, ([\d.]+) with d=4 and the head; (\d+) bytes", out)
    assert found, out
    assert float(found[1]) == float(found[2]) == 1.0
    assert int(found[3]) < 5000
    assert "changed beyond 3 σ" in out


@pytest.mark.slow
def test_supermask(tmp_path):
    rows = [{"text": f"a very {word} film", "label": int(word == "good")} for word in ["good", "bad"] * 40]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = ["--model", tiny("bert", tmp_path / "base"), "--train", "data.jsonl", "--eval", "data.jsonl"]
    out = run("supermask.py", *data, "--steps", "60", "--lr", "5e-4", "--sparsity", "0.1", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+) with (\d+\.\d)% zeros; (\d+) bytes", out)
    assert found, out
    assert float(found[1]) == 1.0
    assert 5 < float(found[2]) < 30
    assert float(re.search(r"angular distance from the base (0\.\d+)", out)[1]) > 0
    assert "can be restored for at most 1% of the score" in out


@pytest.mark.slow
@pytest.mark.parametrize("texts", [None, ["bad", "good"]])
def test_private(tmp_path, texts):
    pytest.importorskip("opacus", reason="opacus is not installed")
    data = labelled(tmp_path, "good", "bad", rows=400)
    small = ["--d", "50", "--steps", "40", "--batch", "200", "--lr", "3e-4", "--epsilon", "8"]
    torch.manual_seed(0)
    small += ["--label-texts", ",".join(texts)] if texts else []
    out = run("private.py", "--model", tiny("bert", tmp_path / "base"), *data, *small, cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+) -> ([\d.]+) with d=50, ε=([\d.]+), δ=0.0025", out)
    assert found, out
    assert float(found[2]) > float(found[1])
    assert 7.9 < float(found[3]) <= 8.0
    config = json.loads((tmp_path / "runs/private/adapter_config.json").read_text())
    assert (config["d"], config["label_texts"]) == (50, texts)


@pytest.mark.slow
def test_federated(tmp_path):
    pytest.importorskip("flwr.simulation", reason="flwr is not installed")
    pytest.importorskip("opacus", reason="opacus is not installed")
    base, data = tiny("bert", tmp_path / "base"), labelled(tmp_path, "good", "bad", rows=80)
    small = ["--d", "50", "--clients", "3", "--rounds", "2", "--steps", "2"]
    plain = run("federated.py", "--model", base, *data, *small, cwd=tmp_path)
    assert "θ: a round sends 200 bytes to and from each client, 1,200 in all" in plain
    assert re.findall(r"round (\d): accuracy [\d.]+", plain) == ["0", "1", "2"]
    private = run("federated.py", "--model", base, *data, *small, "--epsilon", "8", cwd=tmp_path)
    spent = re.search(r"ε of the clients, at δ = 1 / rows: (.+)", private)[1].split(", ")
    assert len(spent) == 3
    assert all(7.9 < float(epsilon) <= 8.0 for epsilon in spent)
    assert json.loads((tmp_path / "runs/federated/adapter_config.json").read_text())["d"] == 50


@pytest.mark.slow
def test_causal_lm(tmp_path):
    (tmp_path / "corpus.txt").write_text("a very good film\na very bad film\n" * 200)
    base = tiny("llama", tmp_path / "base")
    out = run(
        *("causal_lm.py", "--model", base, "--train", "corpus.txt", "--length", "8", "--steps", "40"), cwd=tmp_path
    )
    found = re.search(r"held-out loss ([\d.]+) -> ([\d.]+) with d=1000", out)
    assert found, out
    assert float(found[2]) < 0.7 * float(found[1])


@pytest.mark.slow
def test_grpo(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    base = tiny("llama", tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(base)
    small = ["--d", "20", "--steps", "2", "--batch", "8", "--eval", "4", "--length", "4"]
    out = run("grpo.py", "--model", base, *small, cwd=tmp_path)
    assert re.search(r"reward: 0\.\d\d untrained, 0\.\d\d prompted for the form, 0\.\d\d trained with d=20", out), out
    assert json.loads((tmp_path / "runs/grpo/adapter_config.json").read_text())["d"] == 20

    monkeypatch.syspath_prepend(ROOT / "examples")
    grpo = importlib.import_module("grpo")
    answers = ["3 + 4 = 7", "7.", "17", "7 apples", "", "seven"]
    rewards = grpo.ends_with_the_total([[{"content": answer}] for answer in answers], [7] * len(answers))
    assert rewards == [1, 1, 0, 0, 0, 0]
    for row in grpo.questions(5, 0, grpo.FORM):
        asked = row["prompt"][0]["content"]
        assert sum(map(int, re.findall(r"\d+", asked))) == row["total"]
        assert asked.endswith("stop.")


def test_custom_module(tmp_path):
    out = run("custom_module.py", "--steps", "100", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+) -> ([\d.]+) with d=300, reloaded ([\d.]+)", out)
    assert found, out
    assert float(found[2]) > 0.8 > float(found[1])
    assert found[2] == found[3]


@pytest.mark.slow
def test_demo(tmp_path):
    """A few steps; the demo itself checks that the reloaded adapter agrees.

    Only progress bars go to stderr, and a local server in place of the Hub receives no request.
    """
    try:
        carriers.questions(train=1)
    except SystemExit as missing:
        pytest.skip(str(missing))
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    options = ["--model", tiny("bert", tmp_path / "base"), "--steps", "3", "--train", "500", "--eval", "64"]
    try:
        command = [sys.executable, str(ROOT / "examples/demo.py"), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=online)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert "trainable parameters  d = 2000" in done.stdout
    assert (tmp_path / "runs/demo/demo.png").stat().st_size > 10_000
    assert [line for line in done.stderr.splitlines() if line.strip() and not re.search(r"\d%\|", line)] == []
    assert asked == []


def test_tiny_adapter(tmp_path):
    base = tiny("bert", tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    config = IntrinsicConfig(d=50, task_type="SEQ_CLS", init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    asked = ["a very good film", "a bad film"]
    options = ["--adapter", "adapter", "--levels", "50", "--qr", "adapter.svg"]
    out = run("tiny_adapter.py", *options, "--ask", *asked, cwd=tmp_path).splitlines()
    size, line = re.fullmatch(r"(\d+) bytes: (\S+)", out[0]).groups()
    assert len(adapter_from_string(line)) == int(size)
    assert [re.sub(r"class (\d) before, \1 packed: ", "", answer) for answer in out[1:]] == asked
    assert (tmp_path / "adapter.svg").exists()


def test_serving(tmp_path):
    base = tiny("llama", tmp_path / "base")
    for i in range(2):
        model = trained("llama")
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.mul_(i + 1)
        model.save_pretrained(tmp_path / f"user{i}")
    asked = ["0:a very good film", "1:a very good film", "base:good"]
    out = run("serving.py", "--model", base, "--adapters", "user0", "user1", "--ask", *asked, cwd=tmp_path)
    assert [line.split("\t")[0] for line in out.splitlines()[:3]] == ["0", "1", "base"]
    assert "2 adapters, 200 parameters each" in out


@pytest.mark.slow
def test_bank_training(tmp_path):
    """Two users label the same films in opposite ways, which one adapter cannot learn."""
    words = {"ann": ("good", "bad"), "bob": ("bad", "good")}
    rows = [f"{user},a very {word} film,{label}" for user, both in words.items() for label, word in enumerate(both)]
    (tmp_path / "data.csv").write_text("\n".join(["user,text,label", *rows * 20]))
    base = tiny("bert", tmp_path / "base")
    options = ["--train", "data.csv", "--eval", "data.csv", "--model", base, "--epochs", "60", "--batch", "8"]
    out = run("bank_training.py", *options, "--export", "bob", cwd=tmp_path)
    assert "2 users, 200 parameters each" in out
    found = re.search(r"accuracy 0.5000 -> (\S+); bank in runs/bank", out)
    assert found, out
    assert float(found[1]) > 0.7
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    assert AdapterBank.from_pretrained(model, tmp_path / "runs/bank").names == ["ann", "bob"]
    assert (tmp_path / "runs/bank/export/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_measure(tmp_path):
    out = run("measure.py", "--out", "digits", cwd=tmp_path)
    found = re.search(r"d90 = (\d+), 90 % interval \((\d+), (\d+)\); report and plot in digits", out)
    assert found, out
    low, high = int(found[2]), int(found[3])
    assert 100 <= low <= int(found[1]) <= high <= 600  # Li et al.: hundreds for networks on small images
    assert (tmp_path / "digits" / "curve.png").exists()


@pytest.mark.slow
def test_measure_trainer(tmp_path):
    rows = [f"a very {word} film,{int(word == 'good')}" for word in ["good", "bad", "good"] * 16]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    files = ["--train", "data.csv", "--eval", "data.csv", "--model", tiny("bert", tmp_path / "base")]
    options = ["--epochs", "30", "--dims", "64", "512", "2", "--trials", "16"]
    out = run("measure_trainer.py", *files, *options, cwd=tmp_path)
    assert re.search(r"d90 = \S+, 90 % interval .*; report and plot in runs/measure", out), out
    report = json.loads((tmp_path / "runs/measure/report.json").read_text())
    assert report["majority"] == pytest.approx(2 / 3)
    assert len(report["trials"]) <= 16


def test_every_row_of_the_compatibility_table_names_a_test():
    rows = re.findall(r"^\| .+ \| (.+) \|$", (ROOT / "docs/compatibility.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 40
    for row in rows[1:]:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for path, name in tests:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name
