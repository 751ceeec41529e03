"""Where trials run: in this process one after another, or in parallel through Ray."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..version import __version__, pip_install

Trial = tuple[int | None, int, float | None]
"""(d, seed, learning rate). d is None for full fine-tuning; the learning rate is None if the fit has its own."""

Facts = dict[str, Any]
"""Facts of a trial: seconds, the process that ran it (host and number), versions."""


class Engine(Protocol):
    """Runs trials that are independent of each other, `slots` of them in parallel."""

    slots: int

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        """Run trials. Yields (index of the trial, what the fit returned, facts) in the order in which they end."""

    def close(self) -> None:
        """Release what the trials held. `run` may be called again."""
        return None


@cache
def get_versions() -> dict[str, str]:
    """Get the versions of this package (`git describe` in a checkout), Python, torch, PEFT and transformers."""
    names = {"peft_intrinsic": __version__, "python": platform.python_version()}
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        names["git"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {**names, **{name: version(name) for name in ("torch", "peft", "transformers")}}


def _time_fit(fit: Callable[..., Any], trial: Trial) -> tuple[Any, Facts]:
    d, seed, learning_rate = trial
    start = time.perf_counter()
    result = fit(d, seed) if learning_rate is None else fit(d, seed, learning_rate)
    seconds = round(time.perf_counter() - start, 3)
    return result, {"seconds": seconds, "process": f"{platform.node()} {os.getpid()}", "versions": get_versions()}


class InProcess(Engine):
    """Engine that runs trials in the calling process, one after another."""

    slots = 1

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        for i, trial in enumerate(trials):
            yield i, *_time_fit(fit, trial)


class RayEngine(Engine):
    """Engine that runs as many trials in parallel as a Ray cluster has room for. A worker loads the fit once.

    Args:
        address: Address of a running cluster (`"auto"`, `"ray://host:10001"`); None starts one on this machine. An
            initialized Ray session is used as it is.
        cpus, gpus: CPUs and GPUs of each trial; fractions of a GPU are allowed.

    Raises:
        ImportError: Ray is not installed. The extra `ray` installs it.
        ValueError: The cluster has no room for a trial.

    Example:
        ```python
        measure_intrinsic_dimension(fit, engine=RayEngine(cpus=2, gpus=0.25), out="runs/mine")
        ```
    """

    def __init__(self, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"{error}. {pip_install('[ray]')}") from None

        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
        room, needs = ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}
        if not (cpus >= 0 and gpus >= 0 and cpus + gpus):
            raise ValueError(f"cpus={cpus:g} and gpus={gpus:g} of a trial (--cpus, --gpus): one must be above 0.")
        self.slots = min(int(room.get(name, 0.0) / need) for name, need in needs.items() if need)
        if not self.slots:
            available = {name: room.get(name, 0.0) for name in needs}
            raise ValueError(
                f"cpus={cpus:g} and gpus={gpus:g} for each trial (--cpus, --gpus) exceed {available} of Ray. Use less."
            )
        # Ray restarts a worker that dies, and repeats its trial.
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        self.worker = ray.remote(**options)(_Worker)
        self.workers: list[Any] = []
        self.fit: Any = None

    def run(self, fit: Callable[..., Any], trials: Sequence[Trial]) -> Iterator[tuple[int, Any, Facts]]:
        import ray

        if fit is not self.fit:
            self.fit, self.sent = fit, ray.put(fit)
        waiting, idle, pending = list(enumerate(trials)), list(self.workers), {}  # type: ignore[var-annotated]
        try:
            while waiting or pending:
                while waiting and len(pending) < self.slots:
                    i, trial = waiting.pop(0)
                    if not idle:
                        self.workers.append(self.worker.remote())
                        idle = self.workers[-1:]
                    worker = idle.pop()
                    # Ray passes the reference in a list, not the fit: the worker fetches it once.
                    pending[worker.run.remote([self.sent], trial)] = i, worker
                for done in ray.wait(list(pending))[0]:
                    i, worker = pending.pop(done)
                    idle.append(worker)
                    try:
                        result = ray.get(done)
                    except ray.exceptions.RayActorError as error:
                        raise RuntimeError(
                            f"The worker of trial {trials[i]} (d, seed, learning rate) died repeatedly. Try more "
                            f"memory, or a larger fraction of a GPU (--cpus, --gpus). {error}"
                        ) from None
                    yield i, *result
        finally:
            if pending:  # after a failure
                self.close()

    def close(self) -> None:
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
        return _time_fit(self.fit, trial)
