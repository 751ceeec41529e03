"""The command serve."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ..codec import read_packed
from ..serving import AdapterStore, open_store
from ..serving.saved import is_packed, read_saved
from ..tuner.label_head import load_tokenizer
from ..version import pip_install


def serve(args: argparse.Namespace) -> None:
    """Serve a base model and the adapters of a store over HTTP, until the process is interrupted."""
    try:
        import uvicorn

        from ..serving.app import create_app
        from ..serving.engine import Engine
    except ImportError as error:
        raise ImportError(f"serve needs FastAPI and uvicorn ({error}). {pip_install('[serve]')}") from error
    store = open_store(args.store)
    model = _load(args.model, args.task, *_read_first(store))
    tokenizer = load_tokenizer(args.model)
    engine = Engine(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, args.max_batch)
    app = create_app(engine, store, args.model)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=5)


def _read_first(store: AdapterStore) -> tuple[str | None, int | None]:
    """Read the `TaskType` and the number of labels of the store's first adapter, if it has one that can be read."""
    name = next(iter(store.names()), None)
    try:
        stored = None if name is None else store.get(name)
        if stored is None:
            return None, None
        if is_packed(stored):
            packed = read_packed(stored)
            return packed.options["task_type"], packed.classes or None
        config, _ = read_saved(stored)
        return config.task_type, config.num_labels
    except (OSError, TypeError, ValueError):  # requests for it will get the error
        return None, None


def _load(name: str, task: str | None, kind: str | None, labels: int | None) -> Any:
    """Load the base model for a task: that of the option, of an adapter, or of the checkpoint."""
    classes = (AutoConfig.from_pretrained(name).architectures or [""])[0].endswith("ForSequenceClassification")
    if task == "classification" or (task is None and (kind == "SEQ_CLS" or (kind is None and classes))):
        head = {} if labels is None else {"num_labels": labels}
        return AutoModelForSequenceClassification.from_pretrained(name, dtype="auto", **head)
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
