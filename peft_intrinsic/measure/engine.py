"""Where trials run: here, one after another, or side by side through Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

Trial = tuple[int | None, int, float | None]
"""(d, seed, learning rate); d is None for full fine-tuning, the rate is None where the fit chooses it."""


class Engine(Protocol):
    """Runs trials that are independent of each other."""

    slots: int
    """How many at a time."""

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, float]]:
        """(place among the trials, what the fit returned, seconds), in the order in which they end."""


def _timed(fit: Callable[..., Any], trial: Trial) -> tuple[Any, float]:
    d, seed, rate = trial
    start = time.perf_counter()
    found = fit(d, seed) if rate is None else fit(d, seed, rate)
    return found, time.perf_counter() - start


class InProcess:
    """In the calling process."""

    slots = 1

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, float]]:
        """See `Engine`."""
        for place, trial in enumerate(trials):
            yield place, *_timed(fit, trial)


class RayEngine:
    """As many trials at a time as the cluster has room for; a worker loads the fit once.

    Args:
        address: of a running cluster (`"auto"`, `"ray://host:10001"`); None starts one on this machine. A session that
            is initialised already is used as it is.
        cpus, gpus: of each trial; shares of a GPU are allowed.

    Raises:
        ImportError: Ray is missing; `pip install peft_intrinsic[ray]`.
        ValueError: the cluster has no room for a single trial.
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        room, shares = ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}
        self.slots = min(int(room.get(name, 0.0) / share) for name, share in shares.items() if share)
        if not self.slots:
            raise ValueError(f"A trial asks for {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {room}.")
        self.task = ray.remote(_on_worker).options(num_cpus=cpus, num_gpus=gpus, max_retries=3)
        self.sent: dict[int, tuple[Any, Any]] = {}

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, float]]:
        """See `Engine`. A worker that dies (a node that goes away) has its trial repeated elsewhere."""
        import ray

        _, reference = self.sent.setdefault(id(fit), (fit, ray.put(fit)))
        # In a list Ray hands over the reference, not the fit: the worker fetches it once.
        pending = {self.task.remote([reference], trial): place for place, trial in enumerate(trials)}
        try:
            while pending:
                for done in ray.wait(list(pending))[0]:
                    found, seconds = ray.get(done)
                    yield pending.pop(done), found, seconds
        finally:
            for left in pending:
                ray.cancel(left)


@lru_cache(maxsize=1)
def _fetched(reference: Any) -> Callable[..., Any]:
    import ray

    return ray.get(reference)


def _on_worker(reference: list[Any], trial: Trial) -> tuple[Any, float]:
    return _timed(_fetched(reference[0]), trial)
