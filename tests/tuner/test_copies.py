"""Copies of a model, and threads that use the same model."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from conftest import batch, build, evaluate, output, same, trained

from peft_intrinsic import AdapterBank


def test_a_deep_copy_has_its_own_parameters(family):
    model = trained(family)
    expected = evaluate(model, family)
    copied = copy.deepcopy(model)
    copied.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.zero_()
    assert same(evaluate(model, family), expected, family)
    assert same(evaluate(copied, family), evaluate(build(family), family), family)


def test_pickle_and_torch_save_preserve_the_whole_model(family):
    model = trained(family, said=True)
    expected = evaluate(model, family)
    assert same(evaluate(pickle.loads(pickle.dumps(model)), family), expected, family)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert same(evaluate(torch.load(buffer, weights_only=False), family), expected, family)


def test_a_saved_model_loads_on_another_device():
    buffer = io.BytesIO()
    torch.save(trained("bert"), buffer)
    buffer.seek(0)
    model = torch.load(buffer, map_location="meta", weights_only=False)
    inputs = {name: values.to("meta") for name, values in batch("bert").items()}
    assert output(model, inputs).is_meta


def run_at_once(work, count: int = 4) -> list[BaseException]:
    """Runs `work(i)` in threads that switch all the time; returns what they raised."""
    raised: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return raised


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom", "vit", "llama"])
def test_threads_share_a_model(name):
    """Convolutions, norms and hooks replace parameters temporarily, in their own thread only."""
    model = trained(name)
    expected = evaluate(model, name)

    def work(i: int) -> None:
        for _ in range(60):
            assert torch.equal(evaluate(model, name), expected)

    assert run_at_once(work) == []
    assert torch.equal(evaluate(model, name), expected)


def with_bank() -> tuple[torch.nn.Module, AdapterBank, list[torch.Tensor]]:
    """A model, four adapters for it, and the output with each of them."""
    model = trained("bert")
    bank = AdapterBank(model, torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) / 500)
    expected = []
    for i in range(4):
        with bank.select([i] * 4):
            expected.append(evaluate(model, "bert"))
    return model, bank, expected


def test_coroutines_choose_their_own_adapters():
    """They take turns inside their contexts, in one thread; one of them has no choice."""
    model, bank, expected = with_bank()
    plain = evaluate(model, "bert")

    async def user(i: int) -> None:
        with bank.select([i] * 4):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(evaluate(model, "bert"), expected[i])

    async def without_choice() -> None:
        for _ in range(4):
            await asyncio.sleep(0)
            assert torch.equal(evaluate(model, "bert"), plain)

    async def all_at_once() -> None:
        await asyncio.gather(*map(user, range(4)), without_choice())

    asyncio.run(all_at_once())
    assert torch.equal(evaluate(model, "bert"), plain)


def test_a_thread_started_inside_a_choice_does_not_inherit_it():
    """It gets an error; in a copy of the context it has the choice."""
    model, bank, expected = with_bank()
    with bank.select([1] * 4):
        (error,) = run_at_once(lambda i: evaluate(model, "bert"), 1)
        assert "not in this thread" in str(error)
        context = contextvars.copy_context()
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=context.run, args=(lambda: found.append(evaluate(model, "bert")),))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected[1])
    assert run_at_once(lambda i: evaluate(model, "bert"), 1) == []


def test_a_copy_has_no_choice():
    model, bank, _ = with_bank()
    plain = evaluate(model, "bert")
    with bank.select([1] * 4):
        copied = copy.deepcopy(model)
    assert torch.equal(evaluate(copied, "bert"), plain)


def test_threads_choose_their_own_adapters():
    model, bank, expected = with_bank()

    def work(i: int) -> None:
        for _ in range(40):
            with bank.select([i] * 4):
                assert torch.equal(evaluate(model, "bert"), expected[i])

    assert run_at_once(work) == []


def test_models_do_not_block_each_other():
    """Two models are inside the same kind of layer at the same time, each in a thread of its own."""
    barrier = threading.Barrier(2, timeout=60)
    models = [trained("custom"), trained("custom")]
    expected = evaluate(models[0], "custom")

    def meet(*arguments) -> None:
        barrier.wait()

    for model in models:
        model.get_base_model().conv.register_forward_pre_hook(meet)
        model.get_base_model().conv.register_forward_hook(meet)

    def work(i: int) -> None:
        assert torch.equal(evaluate(models[i], "custom"), expected)

    assert run_at_once(work, 2) == []
