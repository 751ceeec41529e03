"""A bank of thousands of adapters, from which every sample of a batch selects its own."""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, load_peft_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.utils import PushToHubMixin

from ..card import BANK_FILE
from .adapter_names import BASE, check_mixable, make_route
from .attach import LIMITS as VALUE_LIMITS
from .bank_files import describe_rows, find_broken, read_bank, save_adapter, write_bank
from .batch_first import count_samples
from .batches import Route
from .config import IntrinsicConfig
from .files import checksum, read_vectors
from .label_head import LIMITS as LABEL_LIMITS
from .layer import find_adapter
from .sketch import check_sketch


def _check_full(config: IntrinsicConfig, what: str) -> None:
    if config.trained_beside:
        raise ValueError(
            f"{config.trained_beside} of {what}: a bank stores d parameters per adapter and one base model for all. "
            "Train without this option, or attach the adapters and pass adapter_names."
        )


def _check_same(own: IntrinsicConfig, other: IntrinsicConfig, path: str) -> None:
    if unlike := own.differences(other):
        raise ValueError(f"{path} cannot join the bank: it differs from the attached adapter in {unlike}.")
    checks = (
        ("value_sketch", VALUE_LIMITS, "directions of value biases"),
        ("label_sketch", LABEL_LIMITS, "rows of the head from the labels' texts"),
    )
    for name, limits, what in checks:
        if here := getattr(own, name):
            check_sketch(other, name, here, limits, f"{path}: the {what}")


@cache
def _with_signature(bank: Any, base: Any) -> Any:
    """A subclass whose `forward` has the signature of a base model's, in which Trainer looks for columns and labels."""
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    last = parameters.pop() if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None
    parameters.append(inspect.Parameter("adapter_index", inspect.Parameter.KEYWORD_ONLY))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return bank.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=parameters + ([last] if last else []))  # type: ignore[attr-defined]
    name = base.__name__  # by which Trainer chooses the loss with smoothed labels
    members = {"forward": forward, "_get_name": lambda self: name, "__module__": bank.__module__}
    return type(f"{bank.__name__}Of{base.__name__}", (bank,), members)


def _list(names: Iterable[str] | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"names={names!r} must be a list of names, such as [{names!r}].")
    return [] if names is None else list(names)


def _place(names: list[str], rows: int) -> dict[str, int]:
    """The rows by their names.

    Raises:
        ValueError: the names are not one string for each row.
    """
    if unnamed := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"names={unnamed[:10]} must be strings, unlike indexes.")
    if names and len(names) != rows:
        raise ValueError(f"names has {len(names)} names for {rows} rows. Name each row, or none.")
    if wrong := sorted(str(name) for name, count in Counter(names).items() if count > 1 or name == BASE):
        raise ValueError(f"names={wrong[:10]} occur twice, or name the base model. Give each row a name of its own.")
    return {BASE: -1, **{name: row for row, name in enumerate(names)}}


def _unpickle(model: Any) -> AdapterBank:
    base: Any = type(model.get_base_model())
    kind = _with_signature(AdapterBank, base)
    return kind.__new__(kind)


@cache
def _support_sparse_norms() -> torch.library.Library:
    """Teach torch the norm of a sparse gradient, which Trainer computes in every step and torch lacks."""
    library = torch.library.Library("aten", "IMPL")

    def norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.linalg.vector_norm(x.coalesce().values(), *args, **kwargs)

    for backend in ("SparseCPU", "SparseCUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linalg_vector_norm", backend):
            library.impl("linalg_vector_norm", norm, backend)
    return library  # which unregisters when it is deleted


class AdapterBank(PushToHubMixin, nn.Module):
    """K adapters of one projection as one matrix, selected by index or name for each sample of a batch, and trained.

    G and H of the projection do not depend on θ, so a batch with as many adapters as samples costs about as much as
    one adapter. The model has a single attached adapter, whose projection all of them use. It is not trained.

    A bank is the model with one more argument, `adapter_index`, so that Trainer trains it unchanged. Its parameters are
    the rows. Their gradients are sparse: a row without a sample in the batch costs nothing in a step. All attributes
    that it lacks are those of the model.

    Args:
        model: a `PeftModel` with an intrinsic adapter.
        vectors: θ and then λ of each adapter, `[K, d]`, which are copied. The copy is trained if they require
            gradients, and alone gets gradients. Or the number K of new adapters, which are trained and start as the
            attached one: at the base model, if that one is new.
        adapter: name of the attached adapter with the projection; by default the active one.
        names: a name for each row, such as a user's. They can be used instead of indexes.

    Raises:
        ValueError: the model has no intrinsic adapter, or not this one; the vectors do not have d columns, or their
            number is negative; an adapted module cannot be mixed; the adapter has fully trained modules; or the names
            are not one string for each row.

    Example:
        >>> bank = AdapterBank(get_peft_model(base_model, IntrinsicConfig(d=200)), 2, names=["ann", "bob"])
        >>> optimizer = RowAdam(bank.parameters(), lr=2e-4)
        >>> bank(adapter_index=["bob", "ann", "bob"], **inputs).loss.backward()  # 3 samples
        >>> with bank.select(["ann", "__base__"]):  # or [0, -1]
        ...     model.generate(**prompts)  # 2 prompts
    """

    _hf_peft_config_loaded = True  # Trainer then accepts a quantized base model
    model: Any

    def __init__(
        self,
        model: Any,
        vectors: torch.Tensor | int,
        adapter: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # not a sub-module: the rows are the only parameters
        if getattr(getattr(model, "base_model", None), "vector", None) is None:
            raise ValueError(
                f"model is a {type(model).__name__} without an intrinsic adapter. Pass get_peft_model(base_model, "
                "IntrinsicConfig(d=200)) or the like."
            )
        self.adapter = find_adapter(model, adapter)
        self._config, self._layers = model.peft_config[self.adapter], model.base_model.tuner_layers()
        _check_full(self._config, f"adapter {self.adapter!r}")
        check_mixable(model.get_base_model(), self._layers, {self.adapter})
        rows = self._read(vectors)
        self._places = _place(_list(names), len(rows))
        self.rows = nn.Embedding.from_pretrained(rows, sparse=True)
        self.rows.requires_grad_(not isinstance(vectors, torch.Tensor) or vectors.requires_grad)
        self.training = model.training
        base: Any = type(model.get_base_model())
        self.__class__ = _with_signature(AdapterBank, base)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        paths: str | os.PathLike | Sequence[str],
        adapter: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> AdapterBank:
        """Load a saved bank, or saved adapters into a bank. `bank.requires_grad_()` makes it trainable.

        Args:
            model: a `PeftModel` with an intrinsic adapter. For a saved bank, the base model is enough.
            paths: the folder of a saved bank, or its name on the Hub. Or a list of adapters, folders or names on the
                Hub; row k of the bank is then `paths[k]`.
            adapter: name of the attached adapter with the projection; by default the active one.
            revision: branch, tag or commit on the Hub.
            token: access token of the Hub; by default the one that you logged in with.
            cache_dir: the folder for downloads.

        Raises:
            ValueError: an adapter has another projection than the attached one, which the error lists, or another base
                model by its sketch; the file of a bank is damaged; or there is neither such a folder nor such a name on
                the Hub.
        """
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        if isinstance(paths, str | os.PathLike):
            if os.path.isdir(paths) and not Path(paths, CONFIG_NAME).exists():
                raise ValueError(
                    f"{paths} contains no {CONFIG_NAME}, so it is no saved bank. For a checkpoint of Trainer, make the "
                    "bank as for training and call bank.load_state_dict(load_file('…/model.safetensors'))."
                )
            config = IntrinsicConfig.from_pretrained(os.fspath(paths), **options)
            vectors, names = read_bank(config, os.fspath(paths), options)
            model = model if isinstance(model, PeftModel) else get_peft_model(model, config)
            _check_same(model.peft_config[find_adapter(model, adapter)], config, str(paths))
            return cls(model, vectors, adapter, names)
        own = model.peft_config[find_adapter(model, adapter)] if isinstance(model, PeftModel) else None
        if not isinstance(own, IntrinsicConfig) or not paths:
            raise ValueError(
                f"A list of adapters must name one at least, got {list(paths)}, and needs a PeftModel with their "
                f"projection, got a {type(model).__name__}. Load the first adapter with PeftModel.from_pretrained."
            )
        rows = []
        for path in paths:
            if Path(path, BANK_FILE).exists() and not Path(path, SAFETENSORS_WEIGHTS_NAME).exists():
                raise ValueError(f"{path} is a saved bank, not an adapter. Pass it alone, not in a list.")
            config = IntrinsicConfig.from_pretrained(path, **options)
            _check_full(config, path)
            _check_same(own, config, path)
            weights = load_peft_weights(path, device="cpu", **options)
            rows.append(torch.cat(read_vectors(config, weights)).float())
        return cls(model, torch.stack(rows), adapter)

    @property
    def vectors(self) -> torch.Tensor:
        """θ and then λ of each adapter, `[K, d]`."""
        return self.rows.weight

    @property
    def names(self) -> list[str]:
        """The name of each row; empty without names."""
        return list(self._places)[1:]

    @property
    def _vector(self) -> Any:
        return self.model.base_model.vector

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def __reduce__(self) -> Any:  # its class has no name to be imported by
        return _unpickle, (self.model,), self.__dict__

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Set the model and the bank to training or evaluation mode."""
        self.model.train(mode)
        return super().train(mode)

    @torch.compiler.disable(recursive=False)  # the model is compiled, the selection is not
    def forward(self, *args: Any, adapter_index: Any = None, **kwargs: Any) -> Any:
        """Run the model, where sample i of the batch uses the adapter `adapter_index[i]`.

        Args:
            args: arguments of the model.
            adapter_index: rows of the bank or their names, as in `select`.
            kwargs: arguments of the model, by name.

        Raises:
            ValueError: `adapter_index` is missing, or not one for each sample.
        """
        if adapter_index is None:
            raise ValueError(
                "adapter_index is missing. Pass the row of the bank for each sample. In a dataset it must be a column "
                "of integers, such as bank.find(names), as data collators drop strings."
            )
        with self.select(adapter_index):  # which checks it
            root, count = self.model.get_base_model(), len(adapter_index)
            rows = count_samples(root, {**{str(i): value for i, value in enumerate(args)}, **kwargs})
            if rows not in (None, count):  # a compiled model does not know them
                raise ValueError(
                    f"Adapters were chosen for {count} samples in a batch of {rows}: adapter_index={adapter_index}. "
                    "Pass one row of the bank for each sample."
                )
            if not hasattr(self.model, "_is_fsdp_managed_module"):  # whose parameters are whole in its own call only
                self._vector.choices.prove(root, args, kwargs)  # as a compiled model cannot
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_index: Any = None, **kwargs: Any) -> Any:
        """Generate text, where prompt i uses the adapter `adapter_index[i]`. Inside `select`, it may be left out.

        Args:
            args: arguments of the model's `generate`.
            adapter_index: rows of the bank or their names, as in `select`.
            kwargs: arguments of the model's `generate`, by name.

        Raises:
            ValueError: `adapter_index` is missing.
        """
        if adapter_index is not None:
            with self.select(adapter_index):
                return self.model.generate(*args, **kwargs)
        if self._vector.choices.routes() is None:
            raise ValueError("adapter_index is missing. Pass the row of the bank for each prompt, or call select().")
        return self.model.generate(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trained parameters, those of the rows, and of all."""
        rows = self.vectors.numel()
        return rows * self.vectors.requires_grad, self.model.get_nb_trainable_parameters()[1] + rows

    print_trainable_parameters = PeftModel.print_trainable_parameters

    @contextmanager
    def select(self, index: Sequence[int] | Sequence[str] | torch.Tensor) -> Iterator[None]:
        """Within this context, sample i of a batch uses the adapter `index[i]`.

        In training, gradients reach the rows that the batch uses, if the bank requires gradients. Each coroutine and
        each thread has its own choice. Beam search and several returned sequences repeat samples automatically.

        Args:
            index: rows of the bank, `int[batch]`, or their names; −1 or `"__base__"` is the base model.

        Raises:
            IndexError: an index is not in the bank.
            ValueError: a name is not in the bank; a row has NaN or infinite values; an adapter is merged, the active
                one has fully trained modules, or the one with the projection is no longer attached.
            RuntimeError: the rows are trained, and FSDP splits them.
        """
        with self._vector.choices.use([self._choose(index)]):
            yield

    @torch.compiler.disable
    def _choose(self, index: Sequence[int] | Sequence[str] | torch.Tensor) -> Route:
        if self.model.peft_config.get(self.adapter) is not self._config:
            raise ValueError(
                f"Adapter {self.adapter!r} with the projection of the bank is no longer attached. Make a new bank."
            )
        for name in self.model.active_adapters:
            _check_full(self.model.peft_config[name], f"the active adapter {name!r}")
        check_mixable(self.model.get_base_model(), self._layers, set())
        several = isinstance(index, Iterable) and not isinstance(index, str | torch.Tensor)
        if several and any(isinstance(each, str) for each in index):
            index = self.find(index)  # type: ignore[arg-type]  # an index among names is none of them
        try:
            chosen = torch.as_tensor(index, device=self.vectors.device)
        except (TypeError, ValueError, RuntimeError):  # a string, None among them
            chosen = torch.zeros(())
        if (
            chosen.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
            or chosen.dim() != 1
            or (chosen < -1).any()
            or (chosen >= len(self.vectors)).any()
        ):
            raise IndexError(
                f"index must be a list of −1 to {len(self.vectors) - 1}, one for each sample, got {index}."
            )
        if self.vectors.requires_grad:
            if hasattr(self.rows, "_is_fsdp_managed_module"):
                raise RuntimeError(
                    "FSDP splits the rows of this bank, but cannot add up their sparse gradients. Call "
                    "fully_shard(bank.model) instead, then wrap the bank in DistributedDataParallel."
                )
            _support_sparse_norms()
        (own,) = torch.where(chosen >= 0)
        rows = self.rows(chosen[own])
        if len(broken := find_broken(rows)):
            raise ValueError(
                f"Rows {describe_rows(chosen[own][broken].unique(), self.names)} contain NaN or infinite values. The "
                "others do not. Replace these rows in bank.vectors, for instance by those of an earlier save."
            )
        vectors = rows.new_zeros(len(chosen), rows.shape[1]).index_copy(0, own, rows)
        return make_route(self._vector, self.adapter, vectors)

    def find(self, names: Iterable[str]) -> list[int]:
        """The rows with these names; −1 for `"__base__"`.

        Args:
            names: names of rows.

        Raises:
            ValueError: a name is not in the bank, or a single string was passed.
        """
        names = _list(names)
        if unknown := sorted({name for name in names if name not in self._places}, key=str):
            raise ValueError(f"names={unknown[:10]} are not in the bank. Add them with append, or see bank.names.")
        return [self._places[name] for name in names]

    def append(self, vectors: torch.Tensor | int, names: Sequence[str] | None = None) -> None:
        """Add adapters as rows at the end. `RowAdam` continues with them, other optimizers must be made again.

        Args:
            vectors: θ and then λ of each, `[n, d]`, or the number n of new adapters, as for a new bank.
            names: a name for each row, if the bank has names.

        Raises:
            ValueError: the vectors do not have d columns, or the names are not one for each row.
        """
        rows = torch.cat([self.vectors.detach(), self._read(vectors)])
        self._places = _place([*self.names, *_list(names)], len(rows))
        self.vectors.grad = None
        self.vectors.data, self.rows.num_embeddings = rows, len(rows)  # the parameter that optimizers know

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: the model can hold only one of the adapters."""
        raise ValueError("A bank has many adapters. Save one with save_adapter, load it with PEFT, and merge that one.")

    def _read(self, vectors: torch.Tensor | int) -> torch.Tensor:
        start = self._vector.concatenate(self.adapter).detach()
        if isinstance(vectors, Integral) and vectors >= 0:
            return start.repeat(int(vectors), 1)
        if not isinstance(vectors, torch.Tensor):
            raise ValueError(f"vectors={vectors!r} must be a tensor [K, {len(start)}] or a number of new adapters.")
        if vectors.dim() != 2 or vectors.shape[1] != len(start):
            raise ValueError(
                f"vectors must have the shape [K, {len(start)}] for adapter {self.adapter!r}, got "
                f"{tuple(vectors.shape)}."
            )
        return vectors.detach().to(start, copy=True)

    def save_pretrained(self, save_directory: str | os.PathLike, max_shard_size: Any = None) -> None:
        """Save the bank: the rows with their names in one file, and the configuration of the adapters.

        `push_to_hub` uploads the same files with a model card, as that of a `PeftModel`.

        Args:
            save_directory: the folder. After an error, its files are the old ones.
            max_shard_size: an argument of `push_to_hub`. It has no effect: the rows are in one file.

        Raises:
            ValueError: a row has NaN or infinite values.
        """
        write_bank(self._config, self.vectors, self.names, Path(save_directory))

    def save_adapter(self, row: int | str, save_directory: str | os.PathLike) -> None:
        """Save one row as an adapter, which PEFT loads as any other.

        Args:
            row: number or name of the row.
            save_directory: the folder of the adapter.

        Raises:
            IndexError: the bank has no such row.
            ValueError: it has none of this name, or the row has NaN or infinite values.
        """
        number = self.find([row])[0] if isinstance(row, str) else row
        if not 0 <= number < len(self.vectors):
            raise IndexError(f"row={row!r} must be one of 0 to {len(self.vectors) - 1}.")
        save_adapter(self.model, self.adapter, self.vectors[number], Path(save_directory))

    def get_extra_state(self) -> torch.Tensor:
        """The names and a checksum of the projection, for checkpoints."""
        state = [self.names, checksum(self._config, {})]
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Compare the names and the projection in a checkpoint.

        Raises:
            ValueError: they are not those of this bank.
        """
        names, projection = json.loads(bytes(state.tolist()))
        if names != self.names:
            raise ValueError(
                "The rows in the checkpoint have other names, or another order. Make the bank with its names."
            )
        if projection != checksum(self._config, {}):
            raise ValueError(
                "The rows in the checkpoint have another projection. Make the bank with the options that it had, such "
                f"as seed={self._config.seed}."
            )
