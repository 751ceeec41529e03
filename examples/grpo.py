"""Train d parameters of a chat model with TRL's GRPOTrainer, so that its answers to sums end with the total.

    python examples/grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Much of the gain of such training is the form of the answer, which a prompt can request as well. So the untrained model
is scored twice: on the bare question, and on the question of training, which requests the form. The second score is the
baseline.
"""

from __future__ import annotations

import argparse
import re
from random import Random
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from peft_intrinsic import IntrinsicConfig

FORM = " Answer with the sum alone and stop."


def questions(count: int, seed: int, form: str = "") -> Dataset:
    """Make chats about sums of two numbers up to 20: columns `prompt` and `total`."""
    random = Random(seed)
    pairs = [(random.randint(1, 20), random.randint(1, 20)) for _ in range(count)]
    chats = [[{"role": "user", "content": f"What is {a} + {b}?{form}"}] for a, b in pairs]
    return Dataset.from_dict({"prompt": chats, "total": [a + b for a, b in pairs]})


def ends_with_the_total(completions: list[Any], total: list[int], **rest: Any) -> list[float]:
    """Reward 1 if the answer ends with the total, with or without a period, else 0."""
    answers = [chat[0]["content"].strip() for chat in completions]
    return [float(re.search(rf"\b{n}\.?$", answer) is not None) for answer, n in zip(answers, total, strict=True)]


@torch.no_grad()
def score(model: Any, tokenizer: Any, data: Dataset, length: int) -> float:
    """Compute the mean reward of greedy answers."""
    inputs = tokenizer.apply_chat_template(
        data["prompt"][:], add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(model.device)
    model.eval()
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [[{"content": text}] for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    rewards = ends_with_the_total(answers, data["total"][:])
    return sum(rewards) / len(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub name or folder")
    parser.add_argument("--d", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=32, help="answers in a step, 8 to each question")
    parser.add_argument("--eval", type=int, default=100, help="questions for the score")
    parser.add_argument("--length", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--out", default="runs/grpo")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    model = get_peft_model(model, IntrinsicConfig(d=args.d, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    bare, prompted = (score(model, tokenizer, questions(args.eval, 1, form), args.length) for form in ("", FORM))

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=ends_with_the_total,
        args=GRPOConfig(
            output_dir=args.out,
            learning_rate=args.lr,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            num_generations=8,
            max_completion_length=args.length,
            logging_steps=10,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=questions(4 * args.steps * args.batch // 8, 0, FORM),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(args.out)
    after = score(model, tokenizer, questions(args.eval, 1, FORM), args.length)
    print(f"reward: {bare:.2f} untrained, {prompted:.2f} prompted for the form, {after:.2f} trained with d={args.d}")


if __name__ == "__main__":
    main()
