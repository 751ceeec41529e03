"""Where trials run: here, one after another, or side by side through Ray."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..version import pip_install
from .versions import versions

Trial = tuple[int | None, int, float | None]
"""(d, seed, learning rate); d is None for full fine-tuning, the rate is None where the fit chooses it."""

Facts = dict[str, Any]
"""Of a trial: seconds, the process that ran it (host and number), versions."""


class Engine(Protocol):
    """Runs trials that are independent of each other."""

    slots: int
    """How many at a time."""

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        """(place among the trials, what the fit returned, facts of the run), in the order in which they end."""

    def close(self) -> None:
        """Give back what the trials held; `run` may be called again."""


def _timed(fit: Callable[..., Any], trial: Trial) -> tuple[Any, Facts]:
    d, seed, rate = trial
    start = time.perf_counter()
    found = fit(d, seed) if rate is None else fit(d, seed, rate)
    seconds = round(time.perf_counter() - start, 3)
    return found, {"seconds": seconds, "process": f"{platform.node()} {os.getpid()}", "versions": versions()}


class InProcess:
    """In the calling process."""

    slots = 1

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        """See `Engine`."""
        for place, trial in enumerate(trials):
            yield place, *_timed(fit, trial)

    def close(self) -> None:
        """See `Engine`."""


class RayEngine:
    """As many trials at a time as the cluster has room for; a worker loads the fit once.

    Args:
        address: of a running cluster (`"auto"`, `"ray://host:10001"`); None starts one on this machine. A session that
            is initialised already is used as it is.
        cpus, gpus: of each trial; shares of a GPU are allowed.

    Raises:
        ImportError: Ray is missing, which the extra `ray` installs.
        ValueError: the cluster has no room for a single trial.
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"{error}. {pip_install('[ray]')}") from None

        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        room, shares = ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}
        if not (cpus >= 0 and gpus >= 0 and cpus + gpus):
            raise ValueError(f"cpus={cpus:g} and gpus={gpus:g} of a trial (--cpus, --gpus): one must be above 0.")
        self.slots = min(int(room.get(name, 0.0) / share) for name, share in shares.items() if share)
        if not self.slots:
            had = {name: room.get(name, 0.0) for name in shares}
            raise ValueError(
                f"cpus={cpus:g} and gpus={gpus:g} for each trial (--cpus, --gpus), but Ray has {had}. Ask for less."
            )
        # A worker that dies is started again and repeats its trial.
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        self.worker = ray.remote(**options)(_Worker)
        self.workers: list[Any] = []
        self.fit: Any = None

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        """See `Engine`."""
        import ray

        if fit is not self.fit:
            self.fit, self.sent = fit, ray.put(fit)
        waiting, idle, pending = list(enumerate(trials)), list(self.workers), {}  # type: ignore[var-annotated]
        try:
            while waiting or pending:
                while waiting and len(pending) < self.slots:
                    place, trial = waiting.pop(0)
                    if not idle:
                        self.workers.append(self.worker.remote())
                        idle = self.workers[-1:]
                    worker = idle.pop()
                    # In a list Ray hands over the reference, not the fit: the worker fetches it once.
                    pending[worker.run.remote([self.sent], trial)] = place, worker
                for done in ray.wait(list(pending))[0]:
                    place, worker = pending.pop(done)
                    idle.append(worker)
                    try:
                        found = ray.get(done)
                    except ray.exceptions.RayActorError as error:
                        raise RuntimeError(
                            f"The worker of trial {trials[place]} (d, seed, learning rate) died again and again. Does "
                            f"it need more memory, or a larger share of a GPU (--cpus, --gpus)? {error}"
                        ) from None
                    yield place, *found
        finally:
            if pending:  # after a failure
                self.close()

    def close(self) -> None:
        """See `Engine`."""
        import ray

        while self.workers:
            ray.kill(self.workers.pop())
        self.fit = None


class _Worker:
    sent: Any = None

    def run(self, sent: list[Any], trial: Trial) -> tuple[Any, Facts]:
        import ray

        if self.sent != sent[0]:
            self.fit, self.sent = ray.get(sent[0]), sent[0]
        return _timed(self.fit, trial)
