"""Distances of parameters against numpy in float64, and known values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import build, trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from peft_intrinsic.analysis import distance, parameter_distance
from peft_intrinsic.analysis.distance import write_report
from peft_intrinsic_cli import main

THRESHOLD = 1e-3
SHAPES = {"h.0.weight": (7, 9), "h.0.bias": (7,), "h.1.weight": (5, 4, 3), "h.1.scale": (), "embed.weight": (11, 6)}


def pair(size: float = 1e-3, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return base, {n: (w + size * torch.randn(w.shape, generator=generator)).to(dtype) for n, w in base.items()}


def oracle(base: dict, tuned: dict, names) -> dict[str, float]:
    """The measures from their definitions, in the longest float of numpy."""
    u, v = (
        np.concatenate([side[name].double().numpy().ravel() for name in names]).astype(np.longdouble)
        for side in (base, tuned)
    )
    units = sum(base[name].shape[0] if base[name].dim() > 1 else base[name].numel() for name in names)
    cosine = (u @ v) / np.sqrt((u @ u) * (v @ v))
    return {
        "l1": np.abs(v - u).sum(),
        "l1_per_unit": np.abs(v - u).sum() / units,
        "l2_relative": np.sqrt(((v - u) ** 2).sum() / (u**2).sum()),
        "angular": np.arccos(min(cosine, 1)) / np.pi,
        "changed_share": (np.abs(v - u) > THRESHOLD).mean(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_sums_of_tensors_and_groups_equal_the_definitions_in_numpy(monkeypatch, dtype, size):
    monkeypatch.setattr(distance, "CHUNK", 10)
    base, tuned = pair(size, dtype)
    found = parameter_distance(base, tuned, THRESHOLD)
    groups = {
        **{name: (found.tensors[name], [name]) for name in SHAPES},
        **{
            layer: (found.by("layer")[layer][0], [n for n in SHAPES if n.startswith(layer)]) for layer in ("h.0", "h.1")
        },
        "weight": (found.by("kind")["weight"][0], ["h.0.weight", "h.1.weight"]),
        "total": (found.total, list(SHAPES)),
    }
    for sums, names in groups.values():
        for measure, value in oracle(base, tuned, names).items():
            assert getattr(sums, measure) == pytest.approx(float(value), rel=1e-9, abs=1e-9), (names, measure)


def test_small_angles_have_full_precision():
    u = torch.zeros(1000).double()
    u[0] = 1.0
    v = u.clone()
    v[1] = 1e-9  # arccos of a float64 cosine is 0 here
    found = parameter_distance({"w": u}, {"w": v}).total
    assert found.angular == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_equal_opposite_and_random_tensors_have_known_distances():
    base, _ = pair()
    same = parameter_distance(base, base, 0.0).total
    assert [getattr(same, measure) for measure in distance.MEASURES] == [0, 0, 0, 0, 0]
    flipped = parameter_distance(base, {name: -w for name, w in base.items()}).total
    assert flipped.angular == 1.0
    assert flipped.l2_relative == pytest.approx(2.0)
    generator = torch.Generator().manual_seed(0)
    one, two = ({"w": torch.randn(2000, 1000, generator=generator)} for _ in range(2))
    found = parameter_distance(one, two)
    assert found.total.angular == pytest.approx(0.5, abs=1e-3)
    # Of two samples of N(0, 0.02²), |Δ| has the mean 2 · 0.02 / √π.
    assert found.random["w"].l1_per_unit == pytest.approx(1000 * 2 * 0.02 / math.sqrt(math.pi), rel=1e-2)
    assert found.random["w"].angular == pytest.approx(0.5, abs=1e-3)


def test_distances_from_zero_tensors_are_nan_none_in_json_and_a_dash_in_tables():
    found = parameter_distance({"b": torch.zeros(3)}, {"b": torch.ones(3)}).total
    assert math.isnan(found.angular)
    assert math.isnan(found.l2_relative)
    assert parameter_distance({"b": torch.zeros(3)}, {"b": torch.zeros(3)}).total.angular == 0
    row = parameter_distance({"b": torch.zeros(3)}, {"b": torch.ones(3)}).to_dict()
    assert row["total"]["angular"] is None
    json.dumps(row, allow_nan=False)
    assert "nan" not in (report := parameter_distance({"b": torch.zeros(3)}, {"b": torch.ones(3)}).report())
    assert "| all | 3 | 3 | 1 | - | - | 1 |" in report


def test_files_folders_and_models_have_the_same_distances(tmp_path):
    one, two = build("bert"), build("bert")
    with torch.no_grad():
        for p in two.parameters():
            p.add_(1e-2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    wanted = parameter_distance(one, two).to_dict()
    assert parameter_distance(tmp_path / "one", tmp_path / "two").to_dict()["total"] == pytest.approx(wanted["total"])
    assert parameter_distance(tmp_path / "one" / "model.safetensors", two).to_dict()["tensor"].keys() == {
        *wanted["tensor"]
    }


def test_buffers_of_integers_in_state_dicts_are_no_parameters():
    """BatchNorm counts its batches."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    models[1][1].num_batches_tracked += 1000
    states = [model.state_dict() for model in models]
    assert "1.num_batches_tracked" in states[0]
    assert parameter_distance(*states).total.l1 == pytest.approx(parameter_distance(*models).total.l1, rel=1e-6)


def test_other_files_in_a_folder_are_ignored_and_old_names_are_read(tmp_path):
    build("bert").save_pretrained(tmp_path)
    save_file({"bert.pooler.dense.bias": torch.ones(24), "other": torch.ones(2)}, tmp_path / "z.safetensors")
    assert parameter_distance(tmp_path, build("bert")).total.l1 == 0
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in build("bert").state_dict().items()}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    assert parameter_distance(tmp_path / "old", build("bert")).total.l1 == 0


def test_the_report_is_written_as_json_markdown_and_an_image(tmp_path):
    found = parameter_distance(*pair())
    write_report(found, tmp_path)
    assert json.loads((tmp_path / "distance.json").read_text())["layer"]["h.0"]["entries"] == 70
    report = (tmp_path / "distance.md").read_text()
    assert "| h.0 | 70 | " in report
    assert "| all | 197 | " in report
    assert (tmp_path / "distance.png").stat().st_size > 5000


def test_unlike_models_invalid_thresholds_and_broken_files_raise_errors(tmp_path):
    base, tuned = pair()
    with pytest.raises(ValueError, match=r"differ in 1 parameters: h\.0\.bias is \(7,\) in the one and absent"):
        parameter_distance(base, {name: w for name, w in tuned.items() if name != "h.0.bias"})
    with pytest.raises(ValueError, match=r"h\.0\.bias is \(7,\) in the one and \(8,\)"):
        parameter_distance(base, {**tuned, "h.0.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match="threshold=-1 is negative"):
        parameter_distance(base, tuned, -1)
    with pytest.raises(ValueError, match=r"h\.0\.bias holds NaN"):
        parameter_distance(base, {**tuned, "h.0.bias": torch.full((7,), math.nan)})
    with pytest.raises(ValueError, match="holds no weights in safetensors"):
        parameter_distance(tmp_path, tuned)
    (tmp_path / "x.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
        parameter_distance(tmp_path, tuned)
    save_file(base, tmp_path / "x.safetensors")
    assert parameter_distance(tmp_path, base).total.l1 == 0


def test_ignored_missing_parameters_and_prefixes_give_the_distance_of_the_encoder(tmp_path):
    """An encoder without the prefix of the model with a head, in either order."""
    tuned = build("bert")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1e-2)
    build("bert").bert.save_pretrained(tmp_path / "base")
    found = parameter_distance(tmp_path / "base", tuned, ignore_missing=True)
    wanted = parameter_distance(build("bert").bert, tuned.bert)
    assert found.total.entries == wanted.total.entries
    assert found.total.l1 == pytest.approx(wanted.total.l1)
    assert found.ignored == ["classifier.bias", "classifier.weight"]
    assert "Left out, because only one side has them: classifier.bias, classifier.weight." in found.report()
    turned = parameter_distance(tuned, tmp_path / "base", ignore_missing=True)
    assert turned.total.l1 == pytest.approx(wanted.total.l1)
    assert parameter_distance(tmp_path / "base", tuned.bert).total.l1 == pytest.approx(wanted.total.l1)
    head = r"differ in 2 parameters: classifier\.bias is absent in the one and .*\. Leave them out with"
    for one, two in ((tmp_path / "base", tuned), (build("bert").bert, tuned)):
        with pytest.raises(ValueError, match=head):
            parameter_distance(one, two)
    with pytest.raises(ValueError, match="differ in"):
        parameter_distance({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, ignore_missing=True)


def test_the_command_measures_adapters_and_merged_models_and_reports_a_negative_threshold(tmp_path, capsys):
    build("bert").save_pretrained(tmp_path / "base")
    model = trained("bert", task_type="SEQ_CLS", head="keep")
    model.save_pretrained(tmp_path / "adapter")
    wanted = parameter_distance(build("bert"), model).total
    main(["distance", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out/distance.json").read_text())["total"]
    assert row["l1"] == pytest.approx(wanted.l1, rel=1e-6)
    assert (tmp_path / "out/distance.md").read_text() in capsys.readouterr().out
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    main(["distance", str(tmp_path / "base"), str(tmp_path / "merged"), "--threshold", "0.5"])
    assert "changed > 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["distance", str(tmp_path / "base"), str(tmp_path / "merged"), "--threshold", "-1"])
    assert "threshold=-1.0 is negative" in capsys.readouterr().err


def test_the_command_measures_adapters_that_change_their_base(tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all", modules_to_save=[])
    model = get_peft_model(build("bert"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    main(["distance", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out/distance.json").read_text())["total"]
    wanted = parameter_distance(build("bert"), model.merge_and_unload()).total
    assert row["l1"] == pytest.approx(wanted.l1, rel=1e-5)


def test_the_command_measures_fully_trained_heads_and_names_the_option_for_other_sizes(tmp_path, capsys):
    build("bert").save_pretrained(tmp_path / "base")
    model = get_peft_model(build("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape) * p.requires_grad)
    model.save_pretrained(tmp_path / "lora")
    words = ["distance", str(tmp_path / "base"), str(tmp_path / "lora")]
    main([*words, "-o", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out/distance.json").read_text())["tensor"]["classifier.weight"]
    assert row["l1"] == pytest.approx(parameter_distance(build("bert"), model).tensors["classifier.weight"].l1)
    encoder = build("bert").bert
    encoder.config.num_labels = 2
    encoder.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "If its head has another number of labels, pass --num-labels." in capsys.readouterr().err
    main([*words, "--num-labels", "3"])
    assert "| all | " in capsys.readouterr().out


def test_the_command_reports_a_path_that_does_not_exist(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["distance", str(tmp_path), str(tmp_path / "a/b/c")])
    assert "a/b/c' is neither a file or folder nor a name that the Hub gives" in capsys.readouterr().err
