"""What the actions of the command trajectory do."""

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

PLACES = "model", "train", "eval", "adapter", "recordings"
"""Options that name files and folders, or the model on the Hub."""

CAVEAT = (
    "The unified subspace contains the last snapshot of the task itself, which one coordinate reproduces: that it "
    "comes close to full fine-tuning is built in. Zero-shot leaves that snapshot out."
)


def _texts(args: argparse.Namespace) -> LabeledTexts:
    return LabeledTexts(args.model, args.train, getattr(args, "eval", None), args.text, args.label, args.batch)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """All options but where the results go, with files and folders by name and content instead of by place."""

    def content(place: Any) -> Any:
        if isinstance(place, list):
            return [content(one) for one in place]
        return name_with_digest(Path(place)) if place and Path(place).exists() else place

    found = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    return as_stored(found | {name: content(found[name]) for name in PLACES if name in found})


def record(args: argparse.Namespace) -> None:
    """Fine-tune in full, and keep snapshots."""
    callback = TrajectoryCallback(args.out, args.every, args.parameters)
    folder, done = Path(args.out, "checkpoints"), {"run": "record"}
    if snapshots(args.out) and not Path(args.out, SETTINGS).exists():
        raise ValueError(f"--out {args.out} holds a recording that this command did not make. Name another folder.")
    with Store(args.out, _settings(args)) as store:
        if store.key(done) not in store.rows:
            for path in folder.glob("checkpoint-*"):
                if not (path / TRAINER_STATE_NAME).exists():  # the Trainer writes it last: killed before
                    shutil.rmtree(path)
            begun = any(folder.glob("checkpoint-*"))
            if not begun:  # stopped before the first checkpoint: begin again
                for path in snapshots(args.out):
                    path.unlink()
            texts = _texts(args)
            when = {"save_strategy": "steps" if args.every else "epoch", "save_steps": 8 * (args.every or 1)}
            trainer = texts.build_trainer(
                texts.copy_base(), str(folder), args.steps, args.lr, args.seed, save_total_limit=1, **when
            )
            trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=begun)
            store.add(done, {})
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.out}: {len(snapshots(args.out))} snapshots")


def fit(args: argparse.Namespace) -> None:
    """The subspace of snapshots."""
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    subspace = fit_subspace(args.snapshots, args.dim, args.per, args.center, args.out, dtype=dtype)
    print("| group | directions | explained | the first |\n|---|---|---|---|")
    for group in subspace.groups:
        print(f"| {group.name} | {len(group.explained)} | {sum(group.explained):.4f} | {group.explained[0]:.4f} |")
    print(f"{args.out}: up to d = {subspace.dim}")


def _config(subspace: Subspace, full: list[str] | None, d: int | None = None, **more: Any) -> IntrinsicConfig:
    """An adapter in a subspace; by default with all of its directions."""
    return IntrinsicConfig(
        d=subspace.dim if d is None else d,
        projection="trajectory",
        subspace=str(subspace.path),
        task_type="SEQ_CLS",
        modules_to_save=full,
        **more,
    )


def tune(args: argparse.Namespace) -> None:
    """An adapter in a subspace."""
    subspace = Subspace(args.subspace)
    texts = _texts(args)
    torch.manual_seed(args.seed)  # of random starts
    more = {"embed_subspace": args.embed, "ensemble": args.ensemble, "seed": args.seed}
    model: Any = get_peft_model(texts.base, _config(subspace, args.modules_to_save, args.d, **more))
    before = texts.accuracy(model) if args.eval else None
    texts.train(model, args.steps, args.lr, args.seed)
    model.save_pretrained(args.out)
    print(f"{args.out}: d = {model.peft_config['default'].d}")
    if before is not None:
        print(f"accuracy {before:.4f} before, {texts.accuracy(model):.4f} tuned")


def _scores(args: argparse.Namespace, texts: LabeledTexts, runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Accuracy of each run, by name: trained unless its row is there. A run returns its model, trained."""
    with Store(args.out, _settings(args)) as store:
        for name, run in runs.items():
            if store.key({"run": name}) not in store.rows:
                store.add({"run": name}, {"accuracy": texts.accuracy(run())})
        return {name: store.rows[store.key({"run": name})]["accuracy"] for name in runs}


def _table(scores: dict[str, float]) -> str:
    lines = ["| run | accuracy |", "|---|---|", *(f"| {name} | {score:.4f} |" for name, score in scores.items())]
    return "\n".join(lines)


def outliers(args: argparse.Namespace) -> None:
    """Outlier dimensions of an adapter, and the paper's ablation where there are data to score on."""
    texts = _texts(args)
    # On a copy: modules that were saved in full stay in a model that an adapter leaves.
    found = find_outliers(PeftModel.from_pretrained(copy.deepcopy(texts.base), args.adapter), args.k)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    found.plot(Path(args.out, "outliers.png"))
    report = found.report()
    if args.eval:

        def without(some: Any) -> Any:
            base = texts.copy_base()
            if some is not None:
                disable_outliers(base, some)
            texts.train(base, args.steps, args.lr, args.seed)
            return base

        drawn = found.random(args.seed)
        which = {"full": None, f"without {len(found)} outliers": found, f"without {len(found)} at random": drawn}
        report += "\n" + _table(_scores(args, texts, {name: partial(without, some) for name, some in which.items()}))
    write_whole(Path(args.out, "outliers.md"), report + "\n")
    print(report + f"\noutliers.md and outliers.png in {args.out}")


def transfer(args: argparse.Namespace) -> None:
    """One task in the subspaces of several, in that of all, and in that of all others."""
    if args.source_task is not None and args.source_task not in args.recordings:
        raise ValueError(
            f"--source-task {args.source_task} is none of the recordings ({', '.join(args.recordings)}). Name one of "
            "them."
        )
    found = {name: snapshots(name) for name in args.recordings}
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(f"{', '.join(empty)}: no snapshots there. Record first.")
    texts = _texts(args)
    sources = {f"subspace of {name}": files for name, files in found.items()}
    if len(found) > 1:
        last = {name: files[-1] for name, files in found.items()}
        sources["unified"] = list(last.values())
        if args.source_task:
            sources["zero-shot"] = [path for name, path in last.items() if name != args.source_task]
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def tuned(name: str, files: list[Path]) -> Any:
        path = Path(args.out, name.replace("/", "_") + ".safetensors")
        subspace = fit_subspace(files, min(args.dim, len(files)), out=path)
        model = get_peft_model(texts.copy_base(), _config(subspace, args.modules_to_save))
        texts.train(model, args.steps, args.lr, args.seed)
        path.unlink()
        return model

    runs = {name: partial(tuned, name, files) for name, files in sources.items()}
    report = _table(_scores(args, texts, runs)) + (f"\n\n{CAVEAT}" if args.source_task else "")
    write_whole(Path(args.out, "transfer.md"), report + "\n")
    print(report)
