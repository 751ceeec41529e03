"""Train one text classifier over ten clients with Flower: a round sends d parameters each way.

    python examples/federated.py --model PATH --train train.csv --eval dev.csv
    python examples/federated.py --model PATH --train train.csv --eval dev.csv --epsilon 8

`pip install '.[federated,demo]'` in the clone. Clients have rows of their own, with skewed labels. P is linear and its
seed is shared, so the mean of the clients' θ, which FedAvg computes, is exactly the mean of their models. With
--epsilon, what a client sends is (ε, δ)-differentially private with respect to each of its rows, over all rounds.

Flower's simulation runs the clients in processes of Ray. A deployment runs the same two apps: `ServerApp` on the server
and `ClientApp` where the data are.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant
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


def read_arrays(model: Any) -> ArrayRecord:
    """Return the trainable parameters for a message."""
    return ArrayRecord([parameter.detach().cpu().numpy().copy() for parameter in trainable(model)])


@torch.no_grad()
def set_arrays(model: Any, arrays: ArrayRecord) -> None:
    """Set the trainable parameters to those of a message."""
    for parameter, array in zip(trainable(model), arrays.to_numpy_ndarrays(), strict=True):
        parameter.copy_(torch.from_numpy(array))


def build_client(model: Any, train: Callable[[int], int]) -> ClientApp:
    """Build the app of a client: it gets the server's parameters, trains, and sends its own.

    Args:
        train: called with the client's index in every round. Trains `model` and returns the client's number of rows.
    """
    app = ClientApp()

    @app.train()
    def run(message: Message, context: Context) -> Message:
        set_arrays(model, message.content["arrays"])
        rows = train(int(context.node_config["partition-id"]))
        content = {"arrays": read_arrays(model), "metrics": MetricRecord({"num-examples": rows})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


def build_server(model: Any, clients: int, rounds: int, report: Callable[[int], None]) -> ServerApp:
    """Build the app of the server: FedAvg of all clients, weighted by their numbers of rows.

    Args:
        report: called with the number of rounds, from 0, when `model` has the parameters of the server.
    """
    app = ServerApp()

    def set_and_report(done: int, arrays: ArrayRecord) -> None:
        set_arrays(model, arrays)
        report(done)

    def count(replies: list[RecordDict], weight: str) -> MetricRecord:
        return MetricRecord({"clients": len(replies)})

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients, train_metrics_aggr_fn=count)
        result = strategy.start(grid, read_arrays(model), num_rounds=rounds, evaluate_fn=set_and_report)
        counts = [result.train_metrics_clientapp.get(done, {"clients": 0})["clients"] for done in range(1, rounds + 1)]
        if min(counts) < clients:
            raise RuntimeError(f"Of {clients} clients, {counts} finished in the rounds. Flower's log says why.")

    return app


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

    clip = measure_norms(model, random_texts(tokenizer, base.config.num_labels)).median().item()
    plans = []  # of the private clients: noise multiplier, probability of a row and number of steps
    for part, loader in zip(parts, loaders, strict=True):
        if args.epsilon:
            plan = 1 / len(loader), args.rounds * args.steps
            plans.append((find_noise(args.epsilon, 1 / len(part), *plan), *plan))

    def train(client: int) -> int:
        """Train a client for one round, in its process."""
        rows, loader = len(parts[client]), loaders[client]
        optimizer = torch.optim.Adam(trainable(model), lr=args.lr)
        if args.epsilon:
            train_privately(model, PrivacyEngine(), loader, optimizer, plans[client][0], clip, args.steps)
            return rows
        model.train()
        batches = iter(loader)
        for _ in range(args.steps):
            if (batch := next(batches, None)) is None:
                batches = iter(loader)
                batch = next(batches)
            compute_losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return rows

    def report(done: int) -> None:
        print(f"round {done}: accuracy {accuracy(model, held_out):.4f}", flush=True)

    server = build_server(model, len(parts), args.rounds, report)
    logging.getLogger("flwr").propagate = False  # or each line is printed twice
    resources = {"client_resources": {"num_cpus": 1}}
    run_simulation(server, build_client(model, train), num_supernodes=len(parts), backend_config=resources)
    if args.epsilon:
        accountants = [PRVAccountant() for _ in parts]
        for accountant, plan in zip(accountants, plans, strict=True):
            accountant.history = [plan]
        spent = [one.get_epsilon(1 / len(part)) for one, part in zip(accountants, parts, strict=True)]
        print(f"ε of the clients, at δ = 1 / rows: {', '.join(f'{epsilon:.2f}' for epsilon in spent)}")
    save(model, args.out)


if __name__ == "__main__":
    main()
