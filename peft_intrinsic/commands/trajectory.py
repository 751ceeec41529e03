"""The command trajectory and its actions."""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers.trainer import TRAINER_STATE_NAME

from ..aliases import as_stored
from ..analysis.outliers import disable_outliers, find_outliers
from ..projection.subspace import Subspace
from ..text.labeled import LabeledTexts
from ..text.options import name_with_digest
from ..trajectory.fit import fit_subspace
from ..trajectory.record import TrajectoryCallback, snapshots
from ..trials.store import SETTINGS, Store, write_whole
from ..tuner import IntrinsicConfig
from .inputs import load_texts, prepare_adapter_folder, replace_adapter

FILE_OPTIONS = "model", "train", "eval", "adapter", "recordings"
"""Options that name files and folders, or the model on the Hub."""

CAVEAT = (
    "The unified subspace contains the last snapshot of the task itself, which one coordinate reproduces: that it "
    "comes close to full fine-tuning is built in. Zero-shot leaves that snapshot out."
)


def _build_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Collect all options but the output folder, with files by name and digest instead of by path."""

    def name_files(value: Any) -> Any:
        if isinstance(value, list):
            return [name_files(one) for one in value]
        return name_with_digest(Path(value)) if value and Path(value).exists() else value

    options = vars(args) | {"debug": False}  # stored once, and without effect on a run
    settings = {name: value for name, value in options.items() if name not in ("run", "out")}
    if settings.get("max_length") is None:  # as in runs before the option
        settings.pop("max_length", None)
    return as_stored(settings | {name: name_files(settings[name]) for name in FILE_OPTIONS if name in settings})


def record(args: argparse.Namespace) -> None:
    """Fine-tune all weights, and store snapshots of them."""
    callback = TrajectoryCallback(args.out, args.every, args.parameters)
    folder, done = Path(args.out, "checkpoints"), {"run": "record"}
    if snapshots(args.out) and not Path(args.out, SETTINGS).exists():
        raise ValueError(f"--out {args.out} holds a recording that this command did not make. Name another folder.")
    with Store(args.out, _build_settings(args)) as store:
        if store.key(done) not in store.rows:
            for path in folder.glob("checkpoint-*"):
                if not (path / TRAINER_STATE_NAME).exists():  # the Trainer writes it last, so it was killed before
                    shutil.rmtree(path)
            resumes = any(folder.glob("checkpoint-*"))
            if not resumes:  # the snapshots are of a run that stopped before its first checkpoint
                for path in snapshots(args.out):
                    path.unlink()
            texts = load_texts(args)
            saving = {"save_strategy": "steps" if args.every else "epoch", "save_steps": 8 * (args.every or 1)}
            trainer = texts.build_trainer(
                texts.copy_base(), str(folder), args.steps, args.lr, args.seed, save_total_limit=1, **saving
            )
            trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=resumes)
            store.add(done, {})
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.out}: {len(snapshots(args.out))} snapshots")


def fit(args: argparse.Namespace) -> None:
    """Fit the subspace that snapshots span."""
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    subspace = fit_subspace(args.snapshots, args.dim, args.per, args.center, args.out, dtype=dtype)
    print("| group | directions | explained | the first |\n|---|---|---|---|")
    for group in subspace.groups:
        print(f"| {group.name} | {len(group.explained)} | {sum(group.explained):.4f} | {group.explained[0]:.4f} |")
    print(f"{args.out}: up to d = {subspace.dim}")


def _build_config(args: argparse.Namespace, subspace: Subspace, d: int, **more: Any) -> IntrinsicConfig:
    """Build the configuration of an adapter in a subspace."""
    more |= {"subspace": str(subspace.path), "task_type": "SEQ_CLS", "modules_to_save": args.modules_to_save}
    return IntrinsicConfig(d=d, projection="trajectory", **more)


def tune(args: argparse.Namespace) -> None:
    """Train an adapter in a subspace."""
    subspace = Subspace(args.subspace)
    prepare_adapter_folder(Path(args.out), args.overwrite)
    texts = load_texts(args)
    torch.manual_seed(args.seed)  # of a random θ
    more = {"embed_subspace": args.embed, "ensemble": args.ensemble, "seed": args.seed}
    config = _build_config(args, subspace, subspace.dim if args.d is None else args.d, **more)
    model: Any = get_peft_model(texts.base, config)
    before = texts.accuracy(model) if args.eval else None
    texts.train(model, args.steps, args.lr, args.seed)
    replace_adapter(Path(args.out), model.save_pretrained)
    print(f"{args.out}: d = {model.peft_config['default'].d}")
    if before is not None:
        print(f"accuracy {before:.4f} before, {texts.accuracy(model):.4f} tuned")


def _score(args: argparse.Namespace, texts: LabeledTexts, runs: Mapping[str, Callable[[], Any]]) -> str:
    """Score runs, and format a table. A run returns its trained model; one whose row is stored is not called."""
    lines = ["| run | accuracy |", "|---|---|"]
    with Store(args.out, _build_settings(args)) as store:
        for name, run in runs.items():
            if store.key({"run": name}) not in store.rows:
                store.add({"run": name}, {"accuracy": texts.accuracy(run())})
            lines.append(f"| {name} | {store.rows[store.key({'run': name})]['accuracy']:.4f} |")
    return "\n".join(lines)


def outliers(args: argparse.Namespace) -> None:
    """Find the outlier dimensions of an adapter; with held-out data, repeat the paper's ablation."""
    texts = load_texts(args)
    # On a copy: modules_to_save stay in a model after unload.
    dimensions = find_outliers(PeftModel.from_pretrained(copy.deepcopy(texts.base), args.adapter), args.k)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    dimensions.plot(Path(args.out, "outliers.png"))
    report = dimensions.report()
    if args.eval:

        def train_without(disabled: Any) -> Any:
            base = texts.copy_base()
            if disabled is not None:
                disable_outliers(base, disabled)
            texts.train(base, args.steps, args.lr, args.seed)
            return base

        count, random = len(dimensions), dimensions.random(args.seed)
        ablations = {"full": None, f"without {count} outliers": dimensions, f"without {count} at random": random}
        runs = {name: partial(train_without, disabled) for name, disabled in ablations.items()}
        report += "\n" + _score(args, texts, runs)
    write_whole(Path(args.out, "outliers.md"), report + "\n")
    print(report + f"\noutliers.md and outliers.png in {args.out}")


def transfer(args: argparse.Namespace) -> None:
    """Train a task in the subspaces of several tasks, in that of all of them, and in that of all others."""
    if args.source_task is not None and args.source_task not in args.recordings:
        names = ", ".join(args.recordings)
        raise ValueError(f"--source-task {args.source_task} is none of the recordings ({names}). Name one of them.")
    recorded = {name: snapshots(name) for name in args.recordings}
    if empty := [name for name, files in recorded.items() if not files]:
        raise ValueError(f"{', '.join(empty)}: no snapshots there. Record first.")
    texts = load_texts(args)
    sources = {f"subspace of {name}": files for name, files in recorded.items()}
    if len(recorded) > 1:
        last = {name: files[-1] for name, files in recorded.items()}
        sources["unified"] = list(last.values())
        if args.source_task:
            sources["zero-shot"] = [path for name, path in last.items() if name != args.source_task]
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def train_in_subspace(name: str, files: list[Path]) -> Any:
        path = Path(args.out, name.replace("/", "_") + ".safetensors")
        subspace = fit_subspace(files, min(args.dim, len(files)), out=path)
        model = get_peft_model(texts.copy_base(), _build_config(args, subspace, subspace.dim))
        texts.train(model, args.steps, args.lr, args.seed)
        path.unlink()
        return model

    runs = {name: partial(train_in_subspace, name, files) for name, files in sources.items()}
    report = _score(args, texts, runs) + (f"\n\n{CAVEAT}" if args.source_task else "")
    write_whole(Path(args.out, "transfer.md"), report + "\n")
    print(report)
