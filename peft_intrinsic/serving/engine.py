"""A queue of requests, which one thread answers in batches: each sample has the adapter of its user."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .mixture import Adapter, Mixture
from .store import Stored

logger = logging.getLogger(__name__)

WINDOW = 0.005
"""Seconds in which further requests join the first one of a batch."""

SLICE = 32
"""Number of tokens after which a batch makes way for waiting requests. Its unfinished requests rejoin the queue."""

CONTEXT = 32768
"""Length limit of tokens, for models and tokenizers that state none."""

OVERLAP = 5
"""Number of tokens of the prompt that are decoded with an answer, which may begin with a space."""

Deliver = Callable[[Any, str | None], None]
"""Takes parts of an answer (text, probabilities or an exception), and with the last part the reason of its end."""


class Job:
    """One sample: a text to continue or to classify.

    Args:
        tokens: the prompt.
        adapter: the adapter of the user; None is the base model.
        max_tokens: number of new tokens.
        temperature: divides the logits; at 0 the most probable token is taken.
        top_p: tokens are sampled from the fewest whose probabilities have this sum.
        seed: seed of the samples; None is another one each time.
        stop: texts before which the answer ends.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        adapter: Adapter | None,
        max_tokens: int = 0,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.tokens, self.prompt = list(tokens), len(tokens)
        self.adapter, self.max_tokens = adapter, max_tokens
        self.temperature, self.top_p, self.stop = temperature, top_p, stop
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.deliver: Deliver = lambda part, reason: None
        self.done = False
        self._sent = 0  # characters

    @property
    def count(self) -> int:
        """Number of new tokens."""
        return len(self.tokens) - self.prompt

    def finish(self, part: Any, reason: str) -> None:
        """Deliver the last part of the answer."""
        if not self.done:
            self.done = True
            self.deliver(part, reason)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Change logits, `[vocabulary]`, so that their maximum is a sample of the distribution (Gumbel-max)."""
        if self.temperature == 0:
            return scores
        scores = (scores - scores.max()) / self.temperature
        if self.top_p < 1:
            probabilities, order = scores.softmax(-1).sort(descending=True)
            beyond = probabilities.cumsum(-1) - probabilities >= self.top_p
            scores = scores.index_fill(0, order[beyond], -torch.inf)
        noise = torch.empty(len(scores)).exponential_(generator=self.generator).clamp(min=1e-30)
        return scores - noise.log().to(scores.device)

    def push(self, token: int, tokenizer: Any, ends: set[int]) -> bool:
        """Add a token, and deliver the text that no later one can change.

        Args:
            token: the new token.
            tokenizer: decodes it.
            ends: tokens that end an answer.

        Returns:
            Whether the answer is complete.
        """
        if self.done:
            return True
        self.tokens.append(token)
        start = max(self.prompt - OVERLAP, 0)
        before = len(decode(tokenizer, self.tokens[start : self.prompt]))
        text = decode(tokenizer, self.tokens[start : len(self.tokens) - (token in ends)])[before:]
        stops = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if stops or token in ends:
            self.finish(text[self._sent : min(stops, default=len(text))], "stop")
        elif self.count == self.max_tokens:
            self.finish(text[self._sent :], "length")
        else:
            safe = len(text.rstrip("\ufffd")) - max(map(len, self.stop), default=1) + 1
            if safe > self._sent:
                self.deliver(text[self._sent : safe], None)
                self._sent = safe
        return self.done


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Decode tokens without special ones, so that the text of more tokens begins with it."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Engine:
    """Answers requests with one model. Stored adapters are attached when they are first needed.

    Args:
        model: base model, a decoder or a classifier. It gets the layers of the tuner.
        tokenizer: its tokenizer.
        max_batch: number of samples that are computed together.

    Raises:
        ValueError: the model neither continues texts nor classifies them.

    Example:
        >>> engine = Engine(model, tokenizer)
        >>> job = Job(tokenizer("Once upon")["input_ids"], engine.read(Path("ann.pia").read_bytes()), max_tokens=9)
        >>> job.deliver = print
        >>> engine.submit([job])
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch: int = 16) -> None:
        self.generates = model.can_generate()
        name, labels = type(model).__name__, getattr(model.config, "num_labels", 0)
        if model.config.is_encoder_decoder and self.generates:
            raise ValueError(f"{name} has an encoder and a decoder. Serve a decoder or a classifier.")
        if not self.generates and not (name.endswith("ForSequenceClassification") and labels > 1):
            raise ValueError(f"{name} with {labels} labels is no classifier. Serve a model with two labels or more.")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1.")
        self.tokenizer, self.max_batch = tokenizer, max_batch
        tokenizer("")  # resets stored truncation and padding, which no thread may do while others encode
        self.labels: dict[int, str] = model.config.id2label
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
        self.context: int = min(tokenizer.model_max_length, positions)
        self._model, self._mixture = model, Mixture(model)
        ends = getattr(model.generation_config, "eos_token_id", None) if self.generates else None
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._padding = next((t for t in (tokenizer.pad_token_id, *self._ends) if t is not None), 0)
        if not self.generates and model.config.pad_token_id is None:
            model.config.pad_token_id = self._padding
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def read(self, stored: Stored) -> Adapter:
        """Read a stored adapter.

        Raises:
            ValueError: it is damaged, of another method or task, or trains more than θ and λ.
        """
        return self._mixture.read(stored)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put samples into the queue. Their parts are delivered in another thread."""
        for job in jobs:
            self._queue.put(job)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop the thread. Unfinished requests get an error."""
        self._closing = True
        self._queue.put(Job([], None))
        self._thread.join()

    @torch.no_grad()
    def _work(self) -> None:
        while not self._closing:
            if not self._waiting:
                self._waiting.append(self._queue.get())
                time.sleep(WINDOW)
            while not self._queue.empty():
                self._waiting.append(self._queue.get())
            batch: list[Job] = []
            try:
                kind, batch = self._next_batch()
                if batch and not self._closing:
                    with self._mixture.select(kind, [job.adapter for job in batch]):
                        (self._generate if self.generates else self._classify)(batch)
            except Exception as error:  # the requests after these are answered
                logger.exception("A batch of %d requests failed.", len(batch))
                for job in batch:
                    job.finish(RuntimeError(f"The batch failed: {error}"), "error")
            self._waiting += [job for job in batch if not job.done]
        while not self._queue.empty():
            self._waiting.append(self._queue.get())
        for job in self._waiting:
            job.finish(RuntimeError("The server is shutting down."), "error")

    def _next_batch(self) -> tuple[str | None, list[Job]]:
        """Remove requests of one projection from the queue, and those of the base model."""
        kind = None
        self._waiting = [job for job in self._waiting if not job.done]
        while (first := next((job for job in self._waiting if job.adapter), None)) and first.adapter:
            try:
                kind = self._mixture.attach(first.adapter)
                break
            except Exception as error:  # whatever a file causes
                first.finish(ValueError(str(error)), "error")
                self._waiting.remove(first)
        joins = [job for job in self._waiting if not job.adapter or (kind and self._mixture.has(kind, job.adapter))]
        batch = joins[: self.max_batch]
        self._waiting = [job for job in self._waiting if job not in batch]
        return kind, batch

    def _pad(self, jobs: Sequence[Job], left: bool) -> dict[str, torch.Tensor]:
        length = max(len(job.tokens) for job in jobs)
        ids, mask = [], []
        for job in jobs:
            padding = length - len(job.tokens)
            before, after = (padding, 0) if left else (0, padding)
            ids.append([self._padding] * before + job.tokens + [self._padding] * after)
            mask.append([0] * before + [1] * len(job.tokens) + [0] * after)
        device = self._model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _classify(self, jobs: Sequence[Job]) -> None:
        logits = self._model(**self._pad(jobs, left=False)).logits.float()
        multiple = self._model.config.problem_type == "multi_label_classification"
        for job, row in zip(jobs, logits.sigmoid() if multiple else logits.softmax(-1), strict=True):
            job.finish(row.tolist(), "stop")

    def _generate(self, jobs: Sequence[Job]) -> None:
        batch = self._pad(jobs, left=True)
        steps = min(max(job.max_tokens - job.count for job in jobs), self.context - batch["input_ids"].shape[1])
        self._model.generate(
            **batch,
            do_sample=False,  # `Job.choose` samples
            num_beams=1,
            max_new_tokens=steps,
            pad_token_id=self._padding,
            logits_processor=LogitsProcessorList([_Choice(jobs)]),
            stopping_criteria=StoppingCriteriaList([_Delivery(jobs, self)]),
        )

    def _yields(self, steps: int) -> bool:
        """Whether the running batch ends after so many tokens."""
        return self._closing or (steps >= SLICE and bool(self._waiting or not self._queue.empty()))


class _Choice(LogitsProcessor):
    """Samples the next token of each request by its own options."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.stack([job.choose(row) for job, row in zip(self.jobs, scores, strict=True)])


class _Delivery(StoppingCriteria):
    """Delivers each new token, and ends each row by its own options."""

    def __init__(self, jobs: Sequence[Job], engine: Engine) -> None:
        self.jobs, self.engine, self.steps = jobs, engine, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        engine, new = self.engine, input_ids[:, -1].tolist()
        done = [job.push(token, engine.tokenizer, engine._ends) for job, token in zip(self.jobs, new, strict=True)]
        return torch.tensor(done, device=input_ids.device) | engine._yields(self.steps)
