"""Built-in metrics and those of `evaluate`, compared with scikit-learn."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import evaluate
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from helpers.texts import BAD, GOOD, QUICK, command, write
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, mean_squared_error, recall_score
from test_documents import tiny

from peft_intrinsic.measure.analysis import Point
from peft_intrinsic.measure.study import _compute_gap
from peft_intrinsic.text.metrics import METRICS, load_metric
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.text.tasks import IGNORED, Task, load_files
from peft_intrinsic.text.training import TextFit
from peft_intrinsic.version import pip_install
from peft_intrinsic_cli import main

MODULE = """
import datasets
import evaluate
import numpy
import sklearn.metrics

class Own(evaluate.Metric):
    def _info(self):
        one = datasets.Value("{kind}")
        features = {{"predictions": {form}, "references": {form}}}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references{options}):
        return {result}
"""
RECALL = (
    ', labels=None, pos_label=1, average="binary", zero_division="warn"',
    '{"recall": sklearn.metrics.recall_score(references, predictions, labels=labels, pos_label=pos_label, '
    "average=average, zero_division=zero_division)}",
)
ERROR = '{"mse": sklearn.metrics.mean_squared_error(references, predictions)}'
RIGHT = "sum(a == b for a, b in zip(predictions, references)) / len(references)"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """`evaluate` copies scripts into a cache, which must not be the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "DOWNLOADED_EVALUATE_PATH", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, str(tmp_path_factory.mktemp("cache")))
        patch.setattr(evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


def script(folder: Path, name: str, result: str, kind: str = "int32", form: str = "one", options: str = "") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(MODULE.format(kind=kind, form=form, options=options, result=result))
    return str(path)


def task(folder: Path, labels: list, metric: str) -> Task:
    rows = [{"text": GOOD, "label": label} for label in labels]
    return load_files(*[write(folder, "rows.jsonl", rows)] * 2, ["text"], metric=metric)


def test_built_in_metrics_equal_hand_computed_values():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    names = ("accuracy", "f1", "matthews")
    found = {name: METRICS[name].compute(labels, predictions, ["no", "yes"], 1) for name in names}
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews": 2 / np.sqrt(12)})
    assert METRICS["spearman"].compute(np.array([1, 2, 3]), np.array([10, 20, 15]), [], 0) == pytest.approx(0.5)
    assert METRICS["spearman"].compute(np.array([1, 2, 3]), np.array([7, 7, 7]), [], 0) == 0


@pytest.mark.parametrize("labels", [["no", "yes"], [3, 11]])
def test_score_of_one_of_two_classes_is_of_the_last_in_every_order(labels, tmp_path):
    recall = script(tmp_path / "recall", "recall", RECALL[1], options=RECALL[0])
    right, given = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 1, 1, 1])
    for metric in ("f1", recall):
        found = task(tmp_path, labels, metric)
        turned = replace(found, order=tuple(map(str, reversed(labels))))
        assert turned.classes == labels[::-1]
        assert turned.score(1 - right, 1 - given) == found.score(right, given) != found.score(1 - right, 1 - given)


def test_f1_of_three_classes_averages_over_all_classes(tmp_path):
    found = task(tmp_path, [0, 1, 2], "f1")
    labels = np.array([0, 1, 1])
    assert found.score(labels, np.array([0, 1, 0])) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found.score(labels, np.array([0, 1, 2])) == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("classes", [["no", "yes"], ["a", "b", "c", "d"]])
def test_metric_of_evaluate_equals_scikit_learn(classes, tmp_path):
    """The second of two classes is positive. Of more, the score is the mean, absent classes included."""
    found = task(tmp_path, classes * 3, script(tmp_path / "recall", "recall", RECALL[1], options=RECALL[0]))
    labels, predictions = np.random.default_rng(0).integers(0, len(classes) - (len(classes) > 2), (2, 50))
    expected = {"labels": range(len(classes)), "average": "macro", "zero_division": 0} if len(classes) > 2 else {}
    assert found.score(labels, predictions) == pytest.approx(recall_score(labels, predictions, **expected))
    assert (found.sign, found.best) == (1, 1)
    assert found.score_majority() == pytest.approx(1 / len(classes) if len(classes) > 2 else 0)


@pytest.mark.slow
def test_error_metric_makes_a_regression_whose_score_is_minus_the_error(tmp_path):
    rows = [{"text": GOOD if i % 2 else BAD, "label": 0.5 * (i % 2) + i / 100} for i in range(24)]
    path = write(tmp_path, "rows.jsonl", rows)
    mse = script(tmp_path, "mse", ERROR, kind="float32")
    arguments = {**QUICK, "max_steps": 60}
    fit = TextFit(TextOptions(tiny("bert", tmp_path / "base"), train=path, eval=path, metric=mse, arguments=arguments))
    found = fit.task
    values = np.array([row["label"] for row in rows])
    assert found.regression
    assert found.best == 0
    assert found.score_majority() == pytest.approx(-values.var(), rel=1e-5)
    predictions = np.sin(values)
    assert found.score(values, predictions) == pytest.approx(-mean_squared_error(values, predictions), rel=1e-5)
    assert found.score_majority() < fit(None, 0, 1e-2)["score"] < 0


def test_metric_without_a_score_for_constants_has_no_majority_score(tmp_path):
    r = "float('nan') if len(set(predictions)) == 1 else 1e-9 + numpy.corrcoef(predictions, references)[0, 1]"
    found = task(tmp_path, [0.1, 0.2, 0.4], script(tmp_path, "r", f'{{"r": {r}}}', kind="float32"))
    assert found.score_majority() is None
    assert found.best == 1  # without its last digits, which are not the same everywhere
    values, predictions = np.random.default_rng(0).random((2, 9))
    assert found.score(values, predictions) == pytest.approx(pearsonr(values, predictions).statistic, rel=1e-5)


def test_metric_of_strings_receives_class_names(tmp_path):
    """An option that the metric has without an average keeps its own default."""
    nos = '{"nos": sum(a == b == "no" for a, b in zip(predictions, references)) / references.count("no")}'
    options = ', zero_division="own"'
    path = script(tmp_path, "nos", f"{nos} if zero_division == 'own' else None", kind="string", options=options)
    found = task(tmp_path, ["maybe", "no", "yes"] * 3, path)
    assert found.score(np.array([1, 1, 1, 2]), np.array([2, 1, 2, 1])) == pytest.approx(1 / 3)


def test_metric_of_lists_receives_the_words_of_each_row(tmp_path):
    """By name and without padding, so that a metric can score whole entities."""
    rows = [{"words": ["a", word, "film"][:n], "tags": ["O", "B", "O"][:n]} for word in ("good", "bad") for n in (2, 3)]
    path = write(tmp_path, "tags.jsonl", rows)
    whole = script(tmp_path, "whole", f'{{"whole": {RIGHT}}}', "string", "datasets.Sequence(one)")
    found = load_files(path, path, ["words"], "tags", whole, "TOKEN_CLS")
    assert found.score_majority() == 0

    class prediction:
        label_ids = np.array([[1, 0, IGNORED], [1, 0, 1], [1, 0, 1]])
        predictions = np.eye(2)[np.array([[1, 0, 0], [1, 0, 1], [1, 1, 1]])]

    fit = TextFit(TextOptions(tiny("bert", tmp_path / "base"), train=path, eval=path), found)
    assert fit.training.compute_metrics(prediction)["score"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"whole.py' is for lists of words \(TOKEN_CLS\)"):
        task(tmp_path, [0, 1], whole)


def test_metric_of_lists_receives_the_names_of_stored_classes(tmp_path):
    features = Features(words=List(Value("string")), tags=List(ClassLabel(names=["O", "B-PER"])))
    rows = {"words": [["a", "good", "film"]] * 2, "tags": [[0, 1, 0], [1, 0, 0]]}
    path = str(tmp_path / "tags.parquet")
    Dataset.from_dict(rows, features=features).to_parquet(path)
    named = '{"named": sum(a == b == "B-PER" for r, s in zip(predictions, references) for a, b in zip(r, s))}'
    metric = script(tmp_path, "named", named, "string", "datasets.Sequence(one)")
    assert load_files(path, path, ["words"], "tags", metric, "TOKEN_CLS").best == 2


def test_key_selects_one_of_several_scores(tmp_path):
    path = script(tmp_path, "both", f'{{"right": {RIGHT}, "wrong": 1 - {RIGHT}, "all": [0, 1]}}')
    with pytest.raises(ValueError, match=r"returns right, wrong. Choose one, such as '.*both.py:right'"):
        task(tmp_path, [0, 1], path).score_majority()
    right, wrong = (task(tmp_path, [0, 1], f"{path}:{key}") for key in ("right", "wrong"))
    labels, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, 1, 1])
    assert right.score(labels, predictions) == accuracy_score(labels, predictions)
    assert wrong.score(labels, predictions) == accuracy_score(labels, predictions) - 1
    for key in ("all", "none"):
        with pytest.raises(ValueError, match=f"returns no number '{key}'"):
            task(tmp_path, [0, 1], f"{path}:{key}").score_majority()


@pytest.mark.parametrize(
    ("result", "form", "message"),
    [
        ("{'same': 1.0}", "one", "scores correct predictions 1 and incorrect ones 1. It must distinguish them"),
        ("{'none': float('nan')}", "one", "scores correct predictions nan and incorrect ones nan"),
        ("1 / 0", "one", r"cannot score these data: ZeroDivisionError"),
        ("0.5", "one", "returns no number '', but 0.5"),
        ("None", "one", "returns no number '', but None"),
        ("{'x': 1.0}", "{'a': one}", "compares .*, not floats, classes, or lists of classes"),
        ("{'x': 1.0}", "datasets.Sequence(datasets.Value('float32'))", "compares .*, not floats, classes, or lists"),
        ("{'x': 1.0}", "no_form", "cannot be loaded: NameError"),
    ],
)
def test_unusable_metrics_raise(result, form, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task(tmp_path, [0, 1], script(tmp_path, "own", result, form=form)).score_majority()


def test_error_of_an_unknown_metric_says_whether_the_hub_was_reached(data, tmp_path, capsys, monkeypatch):
    for name, cause in (("no_metric", "and the Hub could not be reached"), ("absent/own.py", "Couldn't find a metric")):
        with pytest.raises(SystemExit) as ended:
            main(command(data, "no-model", tmp_path / "run", "--metric", name))
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert f"metric={name!r} (--metric) is unknown. Built in are accuracy, f1, matthews, spearman" in error
        assert cause in error
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(SystemExit):
        main(command(data, "no-model", tmp_path / "run", "--metric", "neither"))
    assert f"None in sys.modules: {pip_install('[measure]')}" in capsys.readouterr().err


def test_metric_is_loaded_from_the_hub(tmp_path, monkeypatch):
    """A mock Hub on this machine, which predictions 401 for absent repositories as the Hub does."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/evaluate-metric/own_recall/main/own_recall.py"
            body = Path(script(tmp_path, "recall", RECALL[1], options=RECALL[0])).read_bytes() if known else b""
            self.send_response(200 if known else 404 if "own_recall" in self.path else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr(evaluate.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", address + "/{path}/{revision}/{name}")
    try:
        found = task(tmp_path, [0, 1], "own_recall")
        labels, predictions = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])
        assert found.score(labels, predictions) == pytest.approx(recall_score(labels, predictions))
        with pytest.raises(ValueError, match="'no_recall' doesn't exist on the Hugging Face Hub"):
            load_metric("no_recall")
    finally:
        server.shutdown()
        server.server_close()


def test_settings_describe_a_metric_script_by_its_contents(tmp_path, monkeypatch):
    """The path of the script does not matter to the settings. In a task it is absolute, for other processes."""
    monkeypatch.chdir(tmp_path)
    script(tmp_path / "own", "own", f'{{"right": {RIGHT}}}')
    found = task(tmp_path, [0, 1], "own:right")
    assert found.metric == f"{tmp_path}/own/own.py:right"
    options = TextOptions("none", task="glue/mrpc")
    before = replace(options, metric="own:right").to_settings()["metric"]
    assert before.startswith("own.py, sha256 ")
    assert before.endswith(":right")
    assert replace(options, metric=found.metric).to_settings()["metric"] == before
    script(tmp_path / "own", "own", f'{{"right": 2 * {RIGHT}}}')
    assert replace(options, metric=found.metric).to_settings()["metric"] != before
    script(tmp_path / "f1", "f1", "1 / 0")
    assert replace(options, metric="f1").to_settings()["metric"] == task(tmp_path, [0, 1], "f1").metric == "f1"


@pytest.mark.slow
def test_launched_trial_gets_the_absolute_path_of_a_metric_script(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = []

    def launched(options, *_):
        metrics.append(options.metric)
        return lambda d, seed, rate: 1.0

    monkeypatch.setattr("peft_intrinsic.measure.measure_text.LaunchedFit", launched)
    script(tmp_path, "own", f'{{"right": {RIGHT}}}')
    options = ["--metric", "own.py", "--launch", "python"]
    main(command(data, tiny("bert", tmp_path / "base"), tmp_path / "run", *options))
    assert metrics == [f"{tmp_path}/own.py"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["settings"]["metric"].startswith("own.py, sha256 ")


@pytest.mark.slow
def test_command_measures_gain_for_an_error_metric(data, tmp_path, capsys):
    """The target is a fraction of the gain over the majority-class baseline."""
    base = tiny("bert", tmp_path / "base")
    (tmp_path / "more.yaml").write_text("max_steps: 60\nuse_cpu: true\ndataloader_pin_memory: false\n")
    wrong = script(tmp_path, "wrong", f'{{"wrong": 100 - 100 * {RIGHT}}}')
    options = ["--config", str(tmp_path / "more.yaml"), "--trials", "4", "--metric", wrong]
    main(command(data, base, tmp_path / "run", *options))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["majority"] == pytest.approx(-100 / 3)
    assert report["relative_to"] == "gain"
    gain = report["baseline"]["level"] + 100 / 3
    assert report["answers"]["gain"]["target"] == pytest.approx(-100 / 3 + 0.9 * gain)
    assert report["settings"]["best"] == 0
    with pytest.raises(SystemExit):
        main(command(data, base, tmp_path / "other", *options, "--relative-to", "score"))
    assert "relative_to='score' does not work for a loss or an error" in capsys.readouterr().err


def test_generalization_gap_is_relative_to_the_best_score():
    class result:
        d, floor = 8, -2.0
        settings, points = {"metric": "mse", "best": 0.0}, [Point(8, -0.4, [-0.4], 1, 0, 0.1)]
        trials = [{"d": 8, "seed": 0, "learning_rate": 0.1, "score": -0.4, "train_score": -0.1}]  # noqa: RUF012

    assert _compute_gap(result)["gap"] == pytest.approx(0.3 / 0.4)
