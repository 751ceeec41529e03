"""Parser of serve."""

from __future__ import annotations

from typing import Any

from .parsing import MODEL, add_command, parse_model


def add_parsers(commands: Any) -> None:
    """Add the subcommand to the parser of the command."""
    add = add_command(
        commands,
        "serve.serve",
        "Serve a base model and many adapters over HTTP, as OpenAI's interface",
        "serve --model HuggingFaceTB/SmolLM2-135M-Instruct --store sqlite:///adapters.db",
        "Requests of several users are computed together, each with the adapter that `model` names.\n"
        "It is for laptops, tests and classifiers. For load, use vLLM.",
    ).add_argument
    add("--model", required=True, type=parse_model, help=MODEL)
    store = "adapters: a folder, the URL of a database (sqlite:///adapters.db), or hub:ORGANIZATION"
    add("--store", required=True, help=store)
    task = "what the model does (default: as the first adapter of the store, or else as the checkpoint)"
    add("--task", choices=["generation", "classification"], help=task)
    add("--max-batch", type=int, default=16, metavar="N", help="number of requests that are computed together")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is reachable from other machines")
    add("--port", type=int, default=8000, help="port to listen at")
