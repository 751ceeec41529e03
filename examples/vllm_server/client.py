"""Send a prompt as several users at once.

python examples/vllm_server/client.py "How was the film?" user0 user1 __base__
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("users", nargs="+", help="names of adapters in the store; __base__ is the base model")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(default: http://127.0.0.1:8000/v1)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key="none")

    def ask(user: str) -> str:
        return client.completions.create(model=user, prompt=args.prompt, max_tokens=32, temperature=0).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        for user, text in zip(args.users, pool.map(ask, args.users), strict=True):
            print(f"{user}\t{text!r}")


if __name__ == "__main__":
    main()
