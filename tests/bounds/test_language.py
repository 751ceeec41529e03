"""Certificates of language models: the formula, the loss of documents, and the commands certify and verify."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.films import certify, read_json
from helpers.texts import write
from peft import get_peft_model
from test_documents import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.bounds import LANGUAGE_CONDITIONS, LanguageCertificate
from peft_intrinsic.bounds import sweep as sweeping
from peft_intrinsic.bounds.certify import build_certificate, count_message_bits
from peft_intrinsic.bounds.language import ALPHAS
from peft_intrinsic.codec import load_packed
from peft_intrinsic.text.documents import Documents
from peft_intrinsic_cli import main

LENGTH, V = 6, 97
EXACT = {"rel": 1e-12}
CLOSE = {"abs": 1e-4}  # sums in float32
FAILURES = 0.05  # fraction of simulated trials in which a bound may fail: its delta
WHOLE = LanguageCertificate(
    m=1000,
    n=200,
    risk=4.0,
    alpha=0.1,
    vocabulary=V,
    bits=64,
    untrained_risk=5.0,
    untrained_alpha=0.5,
    alphas=(0.1, 0.5),
    num_tried=8,
    delta=0.1,
    test_risk=4.5,
    test_n=50,
)


def bound(c: dict) -> float:
    """The bound of Lotfi et al. (2023): bits of the message, r = n/(n + m), span; and in both terms the choices."""
    choices = c["num_tried"] * len(c["alphas"])
    length = c["bits"] + 2 * math.log2(c["bits"]) + math.log2(choices)
    span = math.log2(1 + (1 - c["alpha"]) * c["vocabulary"] / c["alpha"])
    nats, m, n, delta = length * math.log(2), c["m"], c["n"], c["delta"]
    if n == m:
        return c["risk"] + span * math.sqrt((nats + math.log(1 / delta)) / (2 * m))
    r = n / (n + m)
    messages = math.sqrt((nats + math.log(1 / (r * delta))) / (2 * m))
    return c["risk"] + span * (messages + math.sqrt(math.log(choices / ((1 - r) * delta)) / (2 * n)))


def untrained_bound(c: dict) -> float:
    """Hoeffding's inequality for one model and each of the smoothing weights."""
    span = math.log2(1 + (1 - c["untrained_alpha"]) * c["vocabulary"] / c["untrained_alpha"])
    return c["untrained_risk"] + span * math.sqrt(math.log(len(c["alphas"]) / c["delta"]) / (2 * c["n"]))


@pytest.mark.parametrize("change", [{}, {"n": 1000}, {"bits": 4096.0}, {"vocabulary": 50_257}, {"alpha": 0.5}])
def test_bounds_equal_their_formulas(change):
    made = replace(WHOLE, **change)
    assert made.bound == pytest.approx(bound(made.to_dict()), **EXACT)
    assert made.untrained_bound == pytest.approx(untrained_bound(made.to_dict()), **EXACT)
    held_out = math.sqrt(math.log(10) / (2 * made.n))
    assert made.held_out == pytest.approx(4.0 + made.span * held_out, **EXACT)
    assert made.test_bound == pytest.approx(4.5 + made.span * math.sqrt(math.log(10) / 100), **EXACT)


def test_a_bound_from_sampled_documents_holds_for_the_best_of_many_models():
    """All models have the same error of one half, and the sample of 1,000 documents chooses the one with the lowest."""
    trials, models, m = 400, 120, 10**6
    inputs = {"m": m, "n": 1000, "vocabulary": 2, "bits": 80, "num_tried": models, "delta": FAILURES}
    smoothing = {"alpha": 0.5, "untrained_alpha": 0.5, "untrained_risk": 1.0, "alphas": (0.5,)}
    certificate = LanguageCertificate(**inputs, **smoothing, risk=1.0)
    low = -math.log2(1 - 0.5 + 0.5 / 2)  # the loss of a certain and correct prediction
    rng, failures = np.random.default_rng(0), 0
    for _ in range(trials):
        errors = rng.binomial(m, 0.5, models)
        error = rng.hypergeometric(errors, m - errors, certificate.n).min() / certificate.n
        found = replace(certificate, risk=low + certificate.span * float(error))
        failures += found.bound < low + certificate.span / 2
    assert failures <= FAILURES * trials


def test_vacuous_means_not_below_the_uniform_distribution():
    many = replace(WHOLE, m=10**7, n=10**6)
    assert not many.vacuous
    assert many.uniform == math.log2(V)
    assert replace(many, risk=6.6).vacuous
    assert replace(WHOLE, alpha=0.5, risk=math.log2(V)).vacuous


def test_json_gives_the_certificate_back():
    content = json.loads(json.dumps(WHOLE.to_dict(), allow_nan=False))
    assert LanguageCertificate.from_dict(content) == WHOLE
    assert LanguageCertificate.from_dict({**content, "bound": 0.0}).bound == WHOLE.bound
    for name in ("span", "nats", "bound", "uniform", "untrained_bound", "held_out", "test_bound", "vacuous"):
        assert content[name] == getattr(WHOLE, name)


def test_report_states_the_bounds_rounded_up_and_the_conditions():
    shown = WHOLE.report()
    assert WHOLE.claim() in shown
    bits = f"{math.ceil(WHOLE.bound * 1e4) / 1e4:.4f} bits per token of new documents"
    assert f"{bits}, cut off like these, with confidence 90 %" in shown
    assert f"at most {math.ceil(WHOLE.untrained_bound * 1e4) / 1e4:.4f} bits; the certified bound is not below" in shown
    assert "200 of 1000, sampled" in shown
    assert all(f"- {condition}\n" in shown for condition in LANGUAGE_CONDITIONS)
    assert "1000 of 1000, all" in replace(WHOLE, n=1000).report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be a whole number, 1 or more"),
        ({"vocabulary": 97.0}, "vocabulary must be a whole number"),
        ({"alpha": 0.0}, "alpha must be more than 0 and at most 1"),
        ({"alphas": (0.1, 0.5, 1.5)}, "alpha must be more than 0 and at most 1"),
        ({"alpha": 0.2}, r"alpha=0.2 is not among alphas=\(0.1, 0.5\). Add it to them"),
        ({"untrained_alpha": 0.2}, "untrained_alpha=0.2 is not among alphas"),
        ({"n": 1001}, "n must be at most m=1000, the number of training documents; got n=1001"),
        ({"n": 0}, "n must be a whole number, 1 or more"),
        ({"risk": math.nan}, "risk in bits must be a finite mean loss"),
        ({"risk": 20.0}, "risk=20.0 is no mean loss for alpha=0.1 and V=97"),
        ({"untrained_risk": 0.1}, "untrained_risk=0.1 is no mean loss for alpha=0.5"),
        ({"test_risk": 20.0}, "test_risk=20.0 is no mean loss"),
        ({"test_n": None}, "Give test_risk and test_n together; got 4.5 and None"),
        ({"test_n": 0}, "test_n must be a whole number"),
        ({"bits": math.inf}, "bits must be"),
        ({"delta": 1.0}, "delta must be"),
        ({"num_tried": 0}, "num_tried must be"),
    ],
)
def test_values_out_of_range_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(WHOLE, **change)


def rows(count: int, shift: int = 0) -> list[dict]:
    """Films, most of them good; some texts are longer than what is read."""
    return [
        {"text": f"a {'very ' * ((i + shift) % 7)}{'bad' if i % 5 == shift else 'good'} film"} for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base model, an adapter and documents."""
    folder = tmp_path_factory.mktemp("documents")
    base = tiny("llama", folder / "base")
    write(folder, "train.jsonl", rows(60))
    write(folder, "test.jsonl", rows(20, 2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, IntrinsicConfig(d=10, task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    for name in ("base", "train.jsonl", "test.jsonl", "adapter"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compute_bits(model, name: str, alpha: float, length: int = LENGTH) -> np.ndarray:
    """Bits per token of each document, one at a time, in float64: from its first token, after one that ends texts."""
    model, tokenizer, losses = model.double(), AutoTokenizer.from_pretrained("base"), []
    for row in map(json.loads, Path(name).read_text().splitlines()):
        end = tokenizer.eos_token_id
        ids = [end, *tokenizer(row["text"])["input_ids"], end][:length]
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0].softmax(-1)
        bits = [-math.log2((1 - alpha) * float(p[i - 1, ids[i]]) + alpha / V) for i in range(1, len(ids))]
        losses.append(sum(bits) / len(bits))
    return np.array(losses)


LANGUAGE = ("--max-length", str(LENGTH), "-o", "x.pia")


def test_loss_and_bits_of_the_packed_adapter_are_certified(folder, capsys):
    options = ("--eval", "test.jsonl", "--levels", "4", "--num-tried", "8", "--delta", "0.1", "--batch-size", "7")
    certify("--task-type", "CAUSAL_LM", "--adapter", "adapter", *options, *LANGUAGE)
    found, data = (
        LanguageCertificate.from_dict(read_json("x.certificate.json")["certificate"]),
        Path("x.pia").read_bytes(),
    )
    assert (found.m, found.n, found.test_n, found.vocabulary, found.num_tried) == (60, 60, 20, V, 8)
    assert found.bits == count_message_bits(data)
    base, packed = (AutoModelForCausalLM.from_pretrained("base") for _ in range(2))
    packed = load_packed(packed, data)
    assert found.risk == pytest.approx(compute_bits(packed, "train.jsonl", found.alpha).mean(), **CLOSE)
    assert found.test_risk == pytest.approx(compute_bits(packed, "test.jsonl", found.alpha).mean(), **CLOSE)
    untrained = compute_bits(base, "train.jsonl", found.untrained_alpha).mean()
    assert found.untrained_risk == pytest.approx(untrained, **CLOSE)
    assert found.risk != pytest.approx(untrained, **CLOSE)
    bounds, untrained_bounds = [], []
    for alpha in ALPHAS:  # the chosen ones have the lowest bounds
        own = {**found.to_dict(), "alpha": alpha, "untrained_alpha": alpha}
        bounds.append(bound({**own, "risk": compute_bits(packed, "train.jsonl", alpha).mean()}))
        loss = compute_bits(base, "train.jsonl", alpha).mean()
        untrained_bounds.append(untrained_bound({**own, "untrained_risk": loss}))
    assert found.bound == pytest.approx(min(bounds), **CLOSE)
    assert found.untrained_bound == pytest.approx(min(untrained_bounds), **CLOSE)
    assert found.report() in capsys.readouterr().out


def test_a_sample_of_the_documents_is_the_same_for_every_adapter(folder):
    certify("--adapter", "adapter", "--sample", "20", "--alpha", "0.05,0.5", *LANGUAGE)
    found = LanguageCertificate.from_dict(read_json("x.certificate.json")["certificate"])
    assert (found.m, found.n, found.alphas) == (60, 20, (0.05, 0.5))
    assert found.bound == pytest.approx(bound(found.to_dict()), **EXACT)
    documents = Documents("base", "train.jsonl", None, "text", (0.5,), sample=20)
    sample = documents.choose_sample()
    assert sample.tolist() == np.sort(np.random.Philox(key=0).random_raw(60).argsort(kind="stable")[:20]).tolist()
    losses = compute_bits(
        load_packed(AutoModelForCausalLM.from_pretrained("base"), "x.pia"), "train.jsonl", found.alpha
    )
    assert found.risk == pytest.approx(losses[sample].mean(), **CLOSE)
    main(["verify", "x.pia", "--train", "train.jsonl"])


def test_smoothing_is_chosen_by_the_bound(folder):
    """Neither the lowest loss nor the first or last weight has the lowest bound."""
    documents = Documents("base", "train.jsonl", None, "text", (0.01, 0.9, 0.3))
    losses, untrained = [5.9, 6.4, 6.0], [5.9, 6.5, 5.9]
    documents.__dict__["untrained"] = untrained  # in place of the base model's
    found = build_certificate(documents, {"risks": losses}, 64, 1, 0.05)
    own = {"bits": 64, "num_tried": 1, "delta": 0.05, "m": 60, "n": 60, "vocabulary": V, "alphas": documents.alphas}
    bounds = {
        alpha: bound({**own, "alpha": alpha, "risk": risk}) for alpha, risk in zip(own["alphas"], losses, strict=True)
    }
    assert found.alpha == min(bounds, key=bounds.__getitem__) == 0.9
    bounds = {
        alpha: untrained_bound({**own, "untrained_alpha": alpha, "untrained_risk": risk})
        for alpha, risk in zip(own["alphas"], untrained, strict=True)
    }
    assert found.untrained_alpha == min(bounds, key=bounds.__getitem__) == 0.9


def test_documents_have_their_own_losses_in_their_order(folder):
    documents = Documents("base", "train.jsonl", None, "text", (0.5, 0.1), batch=7, max_length=LENGTH)
    losses = documents.compute_bits(documents.base, "train")
    base = AutoModelForCausalLM.from_pretrained("base")
    for column, alpha in enumerate(documents.alphas):
        np.testing.assert_allclose(losses[:, column], compute_bits(base, "train.jsonl", alpha), atol=CLOSE["abs"])


def test_without_special_tokens_the_first_token_is_not_predicted(folder, tmp_path):
    plain = tiny("llama", tmp_path / "plain")
    PreTrainedTokenizerFast.from_pretrained(plain, eos_token=None).save_pretrained(plain)
    ids = Documents(plain, "train.jsonl", None, "text", (0.5,), max_length=4).data["train"][1]["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(plain)("a very good film")["input_ids"]
    assert Documents("base", "train.jsonl", None, "text", (0.5,)).data["train"][1]["input_ids"] == [1, *ids, 1]


def test_verify_agrees_with_a_sound_certificate_and_info_prints_it(folder, capsys):
    certify("--adapter", "adapter", "--eval", "test.jsonl", *LANGUAGE)
    main(["verify", "x.pia", "--train", "train.jsonl"])
    out = capsys.readouterr().out
    assert "Agrees" in out
    assert "of test_n=20 were not counted again" in out
    main(["info", "x.pia"])
    claim = LanguageCertificate.from_dict(read_json("x.certificate.json")["certificate"]).claim()
    assert claim in capsys.readouterr().out


def claim(found: dict, **inputs: float) -> None:
    """Claim other inputs, and what follows from them."""
    found["certificate"] = LanguageCertificate.from_dict({**found["certificate"], **inputs}).to_dict()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("bound", lambda found: found["certificate"].update(bound=found["certificate"]["bound"] - 0.01)),
        ("bound: ", lambda found: claim(found, risk=3.0)),
        ("training loss: 3 stored", lambda found: claim(found, risk=3.0)),
        ("untrained_bound", lambda found: claim(found, untrained_risk=6.5)),
        ("vocabulary: 90 stored, 97 computed", lambda found: found["certificate"].update(vocabulary=90)),
        ("m: 61 stored, 60 computed", lambda found: found["certificate"].update(m=61)),
        ("bits", lambda found: found["certificate"].update(bits=8)),
        ("SHA-256 of training_data:", lambda found: found["training_data"].update(sha256="")),
        ("is no certificate", lambda found: found["certificate"].update(alphas=0.5)),
        ("is no certificate", lambda found: found.update(max_length="6")),
        ("is no certificate", lambda found: found.pop("max_length")),
    ],
)
def test_verify_names_each_false_claim(folder, capsys, what, change):
    certify("--adapter", "adapter", *LANGUAGE)
    found = read_json("x.certificate.json")
    change(found)
    Path("x.certificate.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    assert what in capsys.readouterr().err


def test_verify_rejects_a_sample_whose_bound_does_not_count_the_choices(folder, capsys):
    certify("--adapter", "adapter", "--sample", "20", *LANGUAGE)
    content = read_json("x.certificate.json")
    found = LanguageCertificate.from_dict(content["certificate"])
    r = found.n / (found.n + found.m)
    messages = math.sqrt((found.nats - math.log(r * found.delta)) / (2 * found.m))
    former = found.risk + found.span * (messages + math.sqrt(-math.log((1 - r) * found.delta) / (2 * found.n)))
    content["certificate"]["bound"] = former
    Path("x.certificate.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    error = capsys.readouterr().err
    assert f"bound: {former} stored, {found.bound} from the stored inputs" in error
    assert "earlier versions did not count the choices made with the sampled documents (n < m): run certify" in error


def test_verify_raises_for_other_documents(folder, capsys):
    certify("--adapter", "adapter", *LANGUAGE)
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "test.jsonl"])
    assert "SHA-256 of training_data:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "0"), "alpha must be more than 0 and at most 1"),
        (("--alpha", "0.1,2"), "alpha must be more than 0 and at most 1"),
        (("--alpha", "0.1,x"), "'0.1,x' is not decimal numbers with commas between them"),
        (("--sample", "61"), "sample (--sample) = 61: train.jsonl has 60 documents. Use 1 to 60."),
        (("--sample", "0"), "sample (--sample) = 0: train.jsonl has 60 documents"),
        (("--max-length", "100000"), "max_length (--max-length) = 100000: base has"),
        (("--max-length", "1"), "row"),
        (("--train", "empty.jsonl"), "empty.jsonl, row 2: no token of the document can be predicted"),
        (("--eval", "empty.jsonl"), "empty.jsonl, row 2: no token of the document can be predicted"),
        (("--text", "text,other"), "--text text,other: a language model reads one column. Name one."),
        (("--task-type", "SEQ_CLS"), "--task-type SEQ_CLS: the adapter is for CAUSAL_LM. Leave the option out."),
        (("--delta", "2"), "delta must be"),
        (("--eval", "train.jsonl"), "--eval train.jsonl is the training data. Pass other data, or leave it out."),
    ],
)
def test_bad_options_raise_before_the_model_runs(folder, capsys, monkeypatch, more, message):
    write(folder, "empty.jsonl", [{"text": "a film"}, {"text": ""}, {"text": "a good film"}])
    monkeypatch.setattr(Documents, "compute_bits", None)
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "adapter", *more)
    assert message in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_raises(folder, tmp_path):
    base = tiny("llama", tmp_path / "larger")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(base)
    write(folder, "words.jsonl", [{"text": "a word99"}])
    with pytest.raises(
        ValueError, match=r"words\.jsonl: the tokenizer has a token 106, and the vocabulary of the model 97"
    ):
        Documents(base, "words.jsonl", None, "text", (0.5,))


def test_adapters_for_other_tasks_raise(folder, capsys):
    shutil.copytree("adapter", "words")
    config = json.loads(Path("words/adapter_config.json").read_text())
    Path("words/adapter_config.json").write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "words")
    assert "The adapter is for TOKEN_CLS. Certificates exist for SEQ_CLS and CAUSAL_LM." in capsys.readouterr().err


def test_options_of_language_models_raise_for_classifiers(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        certify("--dims", "2", "--model", "base", "-o", "out", "--alpha", "0.1", "--sample", "3")
    assert "--alpha, --sample: only for language models, --task-type CAUSAL_LM" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_trains_on_documents_resumes_and_certifies_the_lowest_bound(folder, capsys, monkeypatch):
    training = ("--dims", "4,8", "--levels", "3", "--model", "base", "--steps", "20", "--learning-rate", "1e-2")
    sweep = ("--task-type", "CAUSAL_LM", *training, "--sample", "30", "--max-length", "6", "-o", "out")
    certify(*sweep)
    found = read_json("out/sweep.json")
    assert [row["d"] for row in found["rows"]] == [4, 8]
    certificates = [row["certificate"] for row in found["rows"]]
    assert all(one["bound"] == pytest.approx(bound(one), **EXACT) for one in certificates)
    assert all(one["risk"] < one["untrained_risk"] for one in certificates if one["alpha"] == one["untrained_alpha"])
    assert read_json("out/best.certificate.json")["certificate"] == min(certificates, key=lambda one: one["bound"])
    assert {(one["num_tried"], one["m"], one["n"]) for one in certificates} == {(2, 60, 30)}
    main(["verify", "out/best.pia", "--train", "train.jsonl", "--model", "base"])
    monkeypatch.setattr(sweeping, "train_and_pack", None)
    certify(*sweep, "--eval", "test.jsonl")
    assert read_json("out/sweep.json")["rows"][0]["certificate"]["test_n"] == 20
    assert "training loss | test loss | bound" in capsys.readouterr().out
    assert Path("out/certificates.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="2"):
        certify(*sweep, "--sample", "20")
    assert "sample: 30 there, 20 now" in capsys.readouterr().err


def test_finetune_trains_the_rounded_theta_of_a_language_model(folder):
    risks = []
    for steps in ("0", "20"):
        certify("--adapter", "adapter", "--levels", "3", "--finetune", steps, "--learning-rate", "0.1", *LANGUAGE)
        risks.append(read_json("x.certificate.json")["certificate"]["risk"])
    assert risks[1] < risks[0]
