"""Hours that the runs behind the pages on the papers took: the sum of `seconds` of their rows.

    python benchmarks/hours.py

Rows that two measurements share count once. Most runs had one thread of a CPU. The README beside the rows says which
ones had a GPU. Rows of certificates have no times, and pretraining has no rows.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FOLDERS = ("d90", "digits", "pretraining", "trajectory", "closeness", "supermask", "advise")


def main() -> None:
    print("| rows | runs | hours |\n|---|---|---|")
    total = 0.0
    for folder in FOLDERS:
        rows = [json.loads(line) for path in (RESULTS / folder).rglob("trials.jsonl") for line in path.open()]
        rows = [row for row in rows if row.get("seconds")]
        runs = {tuple(row.get(name) for name in ("seconds", "seed", "score", "accuracy")) for row in rows}
        hours = sum(seconds for seconds, *_ in runs) / 3600
        total += hours
        print(f"| {folder} | {len(runs)} | {hours:.1f} |")
    print(f"| all |  | {total:.1f} |")


if __name__ == "__main__":
    main()
