"""Fill a store with adapters of a base model: python examples/vllm_server/make_store.py --model FOLDER

The θ of each adapter is random: what a team stores is packed from training instead, by `peft-intrinsic pack`.
"""

from __future__ import annotations

import argparse
import sqlite3

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress

TABLE = "CREATE TABLE IF NOT EXISTS adapters (name VARCHAR(128) PRIMARY KEY, data BLOB NOT NULL)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of the base model")
    parser.add_argument("--store", default="adapters.db", help="file of an SQLite database (default: adapters.db)")
    parser.add_argument("--count", type=int, default=1000, help="number of adapters (default: 1000)")
    parser.add_argument("--d", type=int, default=200, help="parameters of each (default: 200)")
    args = parser.parse_args()

    config = IntrinsicConfig(d=args.d, serving="lora", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), config)
    theta = next(p for p in model.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    with sqlite3.connect(args.store) as connection:
        connection.execute(TABLE)
        for i in range(args.count):
            theta.data.copy_(torch.randn(args.d, generator=generator) / 50)
            data = compress(model)
            connection.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", (f"user{i}", data))
            sizes.append(len(data))
    print(f"{args.count} adapters in {args.store}, {sum(sizes) / len(sizes):.0f} bytes each")


if __name__ == "__main__":
    main()
