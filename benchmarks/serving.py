"""Time of mixed batches relative to one adapter, and of compiled steps relative to uncompiled ones.

    python benchmarks/serving.py [--threads N] [--repeats N] [--batch N] [--tokens N] [--new N]

Models have random weights: a 22 M BERT (6 × 384) and a 31 M Llama (8 × 384). d = 200.
First the encoder with the default targets, 32 tokens, 1 to 256 samples: one adapter as a multiple of the base model,
and a bank of 100,000 with a different adapter for every sample as a multiple of one. Then all parameters are adapted.
Each row is the median over rounds of the ratio to the row "one adapter" in the same round:
    base model        no adapter
    one adapter       for the whole batch
    bank              a different adapter for every sample, `AdapterBank.select`
    adapter_names     PEFT's call, a different attached adapter for every sample
    one by one        every sample alone with its adapter, all of them
Then, for the encoder, a training step under `torch.compile(fullgraph=True)` as a multiple of the same step uncompiled,
for LoRA r=8 on linear layers, this tuner on the same, and this tuner on every parameter.

Nothing is timed unless each sample of the mixed batch gives the output that it gives alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from peft_intrinsic import AdapterBank, IntrinsicConfig

D = 200
SIZE: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 2048}
ENCODER = BertConfig(num_hidden_layers=6, num_attention_heads=6, **SIZE)
DECODER = LlamaConfig(num_hidden_layers=8, num_attention_heads=6, vocab_size=32000, tie_word_embeddings=True, **SIZE)


def compare_times(calls: dict[str, Callable[[], Any]], repeats: int, against: str) -> dict[str, float]:
    """Compute the median ratio of each call's time to that of `against`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {n: statistics.median(t / o for t, o in zip(times[n], times[against], strict=True)) for n in calls}


def check_equal(mixed: torch.Tensor, alone: torch.Tensor) -> None:
    """Raise SystemExit if a mixed batch differs from its samples run alone."""
    if not torch.allclose(mixed.float(), alone.float(), rtol=1e-3, atol=1e-4):
        raise SystemExit("A mixed batch differs from its samples run alone. Nothing is timed.")


@torch.no_grad()
def compare_mixed(
    model: Any, run: Callable[[Any, torch.Tensor], torch.Tensor], ids: torch.Tensor, repeats: int
) -> None:
    """Print the ratios for one model. `run(model, ids)` returns the output to compare."""
    names = [f"user{i}" for i in range(len(ids))]
    peft = get_peft_model(model, IntrinsicConfig(d=D, target_modules="all"), adapter_name=names[0]).eval()
    for name in names[1:]:
        peft.add_adapter(name, IntrinsicConfig(d=D, target_modules="all"))
    peft.eval()
    vector = peft.get_base_model().intrinsic
    for name in names:
        vector.intrinsic_theta[name].weight.normal_(std=1e-3)
    bank = AdapterBank(peft, torch.stack([vector.concatenate(name) for name in names]), names[0])

    def base() -> torch.Tensor:
        with peft.disable_adapter():
            return run(peft, ids)

    def banked() -> torch.Tensor:
        with bank.select(range(len(ids))):
            return run(peft, ids)

    def named() -> torch.Tensor:
        with peft.base_model._enable_peft_forward_hooks(adapter_names=names):
            return run(peft, ids)

    def one_by_one() -> torch.Tensor:
        results = []
        for i, name in enumerate(names):
            peft.set_adapter(name)
            results.append(run(peft, ids[i : i + 1]))
        peft.set_adapter(names[0])
        return torch.cat(results)

    expected = one_by_one()
    for call in (banked, named):
        check_equal(call(), expected)
    calls = {
        "base model": base,
        "one adapter": lambda: run(peft, ids),
        "bank": banked,
        "adapter_names": named,
        "one by one": one_by_one,
    }
    for name, ratio in compare_times(calls, repeats, "one adapter").items():
        print(f"  {name:<16}{ratio:6.2f}", flush=True)


@torch.inference_mode()
def compare_bank(repeats: int) -> None:
    """Print the ratios for a bank of 100,000 adapters."""
    model = get_peft_model(encoder(), IntrinsicConfig(d=D, task_type="SEQ_CLS")).eval()
    bank = AdapterBank(model, torch.randn(100_000, D) / 1000)
    print(f"encoder, default targets, {len(bank.vectors):,} adapters of {bank.vectors[0].nbytes} bytes")
    for size in (1, 8, 64, 256):
        ids, chosen = torch.randint(5, 30000, (size, 32)), torch.randint(len(bank.vectors), (size,)).tolist()

        def base(ids: torch.Tensor = ids) -> None:
            with model.disable_adapter():
                model(input_ids=ids)

        def banked(ids: torch.Tensor = ids, chosen: list[int] = chosen) -> None:
            with bank.select(chosen):
                model(input_ids=ids)

        with bank.select(chosen):
            outputs = model(input_ids=ids[:1].expand_as(ids)).logits
        for i, logits in list(zip(chosen, outputs, strict=True))[:4]:
            model.base_model.vector.intrinsic_theta["default"].weight.copy_(bank.vectors[i])
            check_equal(logits, model(input_ids=ids[:1]).logits[0])
        calls = {"base": base, "one": lambda ids=ids: model(input_ids=ids), "bank": banked}
        ratios = compare_times(calls, max(repeats, 320 // size), "one")
        print(f"  {size:>3} samples: one adapter {1 / ratios['base']:.2f}, bank {ratios['bank']:.2f}", flush=True)


def make_step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Make a function that runs a training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = ids[:, 0] % 2

    def run() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def encoder() -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(ENCODER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"threads": 1, "repeats": 7, "batch": 16, "tokens": 64, "new": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(5, 30000, (args.batch, args.tokens))

    compare_bank(args.repeats)
    print(f"encoder, forward pass of {args.batch} × {args.tokens} tokens")
    compare_mixed(encoder(), lambda model, x: model(input_ids=x).logits, ids, args.repeats)

    print(f"decoder, forward pass of {args.batch} × {args.tokens} tokens")
    torch.manual_seed(0)
    compare_mixed(
        AutoModelForCausalLM.from_config(DECODER), lambda model, x: model(input_ids=x).logits, ids, args.repeats
    )

    print(f"decoder, {args.new} new tokens for each of {args.batch} prompts of {args.tokens} tokens")
    torch.manual_seed(0)
    fixed = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    compare_mixed(
        AutoModelForCausalLM.from_config(DECODER),
        lambda model, x: model.generate(input_ids=x, attention_mask=torch.ones_like(x), **fixed),
        ids,
        args.repeats,
    )

    print("encoder, compiled training step as a multiple of the uncompiled one")
    kinds = {
        "LoRA r=8": LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
        "linear layers": IntrinsicConfig(d=D, target_modules="all-linear", task_type="SEQ_CLS"),
        "every parameter": IntrinsicConfig(d=D, target_modules="all", task_type="SEQ_CLS"),
    }
    for name, config in kinds.items():
        model = get_peft_model(encoder(), config)
        calls = {"eager": make_step(model, ids), "compiled": make_step(torch.compile(model, fullgraph=True), ids)}
        print(f"  {name:<16}{compare_times(calls, args.repeats, 'eager')['compiled']:6.2f}", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
