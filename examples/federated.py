"""Train one text classifier over ten clients with Flower: a round sends d parameters each way.

    python examples/federated.py --model PATH --train train.csv --eval dev.csv
    python examples/federated.py --model PATH --train train.csv --eval dev.csv --epsilon 8

`pip install '.[federated,demo]'` in the clone. Clients have rows of their own, with skewed labels. P is linear and its
seed is shared, so the mean of the clients' θ, which FedAvg computes, is exactly the mean of their models. With
--epsilon, what a client sends is (ε, δ)-differentially private with respect to each of its rows, over all rounds.

The clients run one after the other in this process: Flower's client and strategy without its simulation engine. In a
deployment, `ClientApp(client_fn)` runs the same client where its data are.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.client import NumPyClient
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from private import accuracy, compute_losses, measure_norms, random_texts, train_privately
from text_classification import add_data_options, from_files, save
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.privacy import find_noise


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The trainable parameters: θ, and λ with `said=True`."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class FlowerClient(NumPyClient):
    """Flower's client: it gets the server's parameters, trains, and sends its own."""

    def __init__(self, model: Any, train: Callable[[], None], size: int) -> None:
        self.model, self.train, self.size = model, train, size

    @torch.no_grad()
    def set_arrays(self, arrays: list[np.ndarray]) -> None:
        """Set the trainable parameters."""
        for parameter, array in zip(trainable(self.model), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        self.set_arrays(parameters)
        self.train()
        return [parameter.detach().cpu().numpy().copy() for parameter in trainable(self.model)], self.size, {}


def federate(clients: list[FlowerClient], rounds: int, report: Callable[[int], None] = lambda done: None) -> None:
    """Train by FedAvg, weighted by the clients' numbers of rows.

    Args:
        clients: all of them train in every round. Here they share one model, which is the server's too.
        rounds: number of rounds.
        report: called with the number of rounds, from 0, when the model has the parameters of the server.
    """
    strategy = FedAvg(fraction_evaluate=0.0)
    arrays = [parameter.detach().cpu().numpy().copy() for parameter in trainable(clients[0].model)]
    report(0)
    for done in range(1, rounds + 1):
        instruction = FitIns(ndarrays_to_parameters(arrays), {})
        results: Any = [(client, client.to_client().fit(instruction)) for client in clients]
        average, _ = strategy.aggregate_fit(done, results, [])
        arrays = parameters_to_ndarrays(average)
        clients[0].set_arrays(arrays)
        report(done)


def split_by_label(labels: np.ndarray, clients: int, concentration: float = 0.5) -> list[np.ndarray]:
    """Give each client rows with a distribution of labels of its own, sampled from a Dirichlet distribution."""
    generator = np.random.default_rng(0)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        edges = np.cumsum(generator.dirichlet([concentration] * clients))[:-1] * len(rows)
        for part, own in zip(parts, np.split(rows, edges.astype(int)), strict=True):
            part.extend(own)
    return [np.array(part) for part in parts if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    add_data_options(parser)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps of each client in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--epsilon", type=float, help="of each client, over all rounds")
    parser.add_argument("--out", default="runs/federated")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Secure RNG turned off|.*different dataset")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, head = from_files(args, tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, **head)
    lora = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS"))
    lora_size = sum(parameter.numel() for parameter in trainable(lora))
    model = get_peft_model(lora.unload(), IntrinsicConfig(d=args.d, task_type="SEQ_CLS"))
    collate = DataCollatorWithPadding(tokenizer)
    held_out = DataLoader(data["eval"], batch_size=64, collate_fn=collate)
    parts = [data["train"].select(rows) for rows in split_by_label(np.array(data["train"]["labels"]), args.clients)]
    if args.epsilon and min(map(len, parts)) < 2:
        parser.error(f"--clients {args.clients}: one of them has a single row, which no ε protects. Take fewer.")
    loaders = [DataLoader(part, batch_size=args.batch, shuffle=True, collate_fn=collate) for part in parts]
    print(f"rows of the clients: {', '.join(str(len(part)) for part in parts)}")
    for name, size in (("θ", args.d), ("LoRA r=8", lora_size)):
        print(f"{name}: a round sends {4 * size:,} bytes to and from each client, {8 * size * len(parts):,} in all")

    engines = [PrivacyEngine() for _ in parts]
    clip = measure_norms(model, random_texts(tokenizer, base.config.num_labels)).median().item()

    def train(client: int) -> None:
        loader = loaders[client]
        optimizer = torch.optim.Adam(trainable(model), lr=args.lr)
        if args.epsilon:
            delta, steps = 1 / len(parts[client]), args.rounds * args.steps
            noise = find_noise(args.epsilon, delta, 1 / len(loader), steps)
            train_privately(model, engines[client], loader, optimizer, noise, clip, args.steps)
            return
        model.train()
        batches = iter(loader)
        for _ in range(args.steps):
            if (batch := next(batches, None)) is None:
                batches = iter(loader)
                batch = next(batches)
            compute_losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def report(done: int) -> None:
        print(f"round {done}: accuracy {accuracy(model, held_out):.4f}", flush=True)

    clients = [FlowerClient(model, partial(train, i), len(part)) for i, part in enumerate(parts)]
    federate(clients, args.rounds, report)
    if args.epsilon:
        spent = [engine.get_epsilon(1 / len(part)) for engine, part in zip(engines, parts, strict=True)]
        print(f"ε of the clients, at δ = 1 / rows: {', '.join(f'{epsilon:.2f}' for epsilon in spent)}")
    save(model, args.out)


if __name__ == "__main__":
    main()
