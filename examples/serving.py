"""Serve many users with one model: each request of a batch uses its own adapter.

python examples/serving.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters runs/ann runs/bob \\
    --ask "0:How was the film?" "1:How was the film?" "base:How was the film?"

A request is the index of an adapter (from 0) or `base`, a colon, and a prompt. The adapters must have the same
configuration (d, seed, targets …).
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_intrinsic import AdapterBank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of the base model")
    parser.add_argument("--adapters", nargs="+", required=True, help="folders or names of saved adapters")
    parser.add_argument("--ask", nargs="+", required=True, metavar="WHO:PROMPT")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens for each")
    args = parser.parse_args()
    requests = [request.partition(":")[::2] for request in args.ask]

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model)
    model = PeftModel.from_pretrained(base, args.adapters[0]).eval()  # its projection is used for all
    bank = AdapterBank.from_pretrained(model, args.adapters)

    batch = tokenizer([prompt for _, prompt in requests], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad(), bank.select([-1 if index == "base" else int(index) for index, _ in requests]):
        output = model.generate(
            **batch, max_new_tokens=args.tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    for (index, _), row in zip(requests, output, strict=True):
        print(f"{index}\t{tokenizer.decode(row[batch['input_ids'].shape[1] :], skip_special_tokens=True)}")
    print(f"{len(bank.vectors)} adapters, {bank.vectors.shape[1]} parameters each", flush=True)


if __name__ == "__main__":
    main()
