"""Fine-tune a text classifier with differential privacy: opacus clips and adds noise, d parameters are trained.

    python examples/private.py --model PATH --train train.csv --eval dev.csv --epsilon 3

`pip install '.[privacy,demo]'` in the clone. The adapter in `--out` and everything that is computed from it is
(ε, δ)-differentially private with respect to one row of `--train`. The printed accuracy is that of `--eval`, which must
not be private. A learning rate that you choose by trying several costs privacy that ε does not include.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peft import get_peft_model
from text_classification import add_data_options, from_files, save
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.privacy import check_clipping, compute_sample_gradients, find_noise, pop_norms


def random_texts(tokenizer: Any, labels: int, size: int = 64, words: int = 12) -> dict[str, torch.Tensor]:
    """Make a public batch: random words with labels in turn, which contain no private data."""
    ids = torch.randint(len(tokenizer), (size, words), generator=torch.Generator().manual_seed(0))
    inputs = tokenizer(tokenizer.batch_decode(ids), padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {**inputs, "labels": torch.arange(size) % labels}


def compute_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of every sample, `[batch]`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def measure_norms(model: Any, public: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the norms of the gradients of a public batch."""
    compute_sample_gradients(model, lambda batch: compute_losses(model, batch), public)
    return pop_norms(model)


def train_privately(
    model: Any,
    engine: PrivacyEngine,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    noise: float,
    clip: float,
    steps: int,
    report: Callable[[int], None] = lambda step: None,
    part: int = 64,
) -> None:
    """Train for `steps` Poisson batches, in parts of at most `part` samples. Call `report` with each step from 1."""
    model.train()
    _, private, poisson = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=clip,
        grad_sample_mode="no_op",
    )
    done = 0
    while done < steps:
        with BatchMemoryManager(data_loader=poisson, max_physical_batch_size=part, optimizer=private) as parts:
            for batch in parts:
                compute_sample_gradients(model, lambda batch: compute_losses(model, batch), batch)
                private.step()
                private.zero_grad()
                if private._is_last_step_skipped:  # the batch has further parts
                    continue
                done += 1
                report(done)
                if done == steps:
                    break


@torch.inference_mode()
def accuracy(model: Any, loader: DataLoader) -> float:
    """Compute the fraction of correct predictions."""
    model.eval()
    hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in loader]
    return torch.cat(hits).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    add_data_options(parser)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, help="default: 1 / number of training rows")
    parser.add_argument(
        "--label-texts",
        type=lambda text: text.split(","),
        help="a text for each label, with commas between them, in the labels' sorted order: the head starts from them",
    )
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--batch", type=int, default=512, help="expected number of rows in a batch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--out", default="runs/private")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Secure RNG turned off")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, head = from_files(args, tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, **head)
    start = {"head": "labels", "label_texts": args.label_texts} if args.label_texts else {}
    model = get_peft_model(base, IntrinsicConfig(d=args.d, task_type="SEQ_CLS", **start))
    collate = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(data["train"], batch_size=args.batch, collate_fn=collate)
    held_out = DataLoader(data["eval"], batch_size=64, collate_fn=collate)
    delta = args.delta or 1 / len(data["train"])
    if delta > 1 / len(data["train"]):
        parser.error(f"--delta {delta}: with {len(data['train'])} rows it must be at most {1 / len(data['train']):.2g}")
    noise = find_noise(args.epsilon, delta, 1 / len(loader), args.steps)
    public = random_texts(tokenizer, base.config.num_labels)
    clip = measure_norms(model, public).median().item()
    print(f"noise multiplier {noise:.3g}, clip {clip:.3g}: the median norm of the gradients of random texts")

    engine = PrivacyEngine()
    before = accuracy(model, held_out)
    with tqdm(total=args.steps) as bar:

        def report(step: int) -> None:
            bar.update()
            if step % 10 == 0 or step == args.steps:
                bar.set_postfix_str(f"ε so far {engine.get_epsilon(delta):.2f}")
                check_clipping(measure_norms(model, public), clip)

        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
        train_privately(model, engine, loader, optimizer, noise, clip, args.steps, report)
    after = accuracy(model, held_out)
    save(model, args.out)
    print(f"accuracy {before:.4f} -> {after:.4f} with d={args.d}, ε={engine.get_epsilon(delta):.2f}, δ={delta:.2g}")


if __name__ == "__main__":
    main()
