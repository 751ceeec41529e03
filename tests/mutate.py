"""Mutation check: small faults are put into the package one at a time, and the tests must notice each.

The list of faults is the same in every run. A fault that no test notices is printed as `survived`: either it changes
nothing, or an assertion is missing. Processes are forked, which works on Linux and macOS.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peft_intrinsic"

TESTS = {
    "projection/base.py": "projection/test_contract",
    "projection/allocation.py": "projection/test_fastfood projection/test_contract",
    "projection/dense.py": "projection/test_dense projection/test_contract",
    "projection/fastfood.py": "projection/test_fastfood projection/test_contract",
    "projection/hadamard.py": "projection/test_hadamard projection/test_contract",
    "projection/randomness.py": "projection/test_randomness",
    "projection/subspace.py": "trajectory/test_fit_subspace",
    "projection/trajectory.py": "projection/test_contract trajectory/test_tuning",
    "trajectory/fit.py": "trajectory/test_fit_subspace",
    "analysis/outliers.py": "analysis/test_outliers",
    "trajectory/record.py": "trajectory/test_recording",
    "analysis/critical.py": "analysis/test_critical",
    "analysis/distance.py": "analysis/test_distance",
    "analysis/reading.py": "analysis/test_distance analysis/test_distance_of_adapters",
    "supermask/layer.py": "supermask/test_supermask",
    "supermask/masks.py": "supermask/test_masks",
    "supermask/model.py": "supermask/test_mask_files supermask/test_supermask",
    "tuner/checks.py": "tuner/test_config trajectory/test_tuning",
    "tuner/subspace_files.py": "trajectory/test_tuning_files trajectory/test_tuning",
    "tuner/attach.py": "tuner/test_config tuner/test_head tuner/test_targets tuner/test_modules",
    "tuner/adapter_names.py": "tuner/test_mixed",
    "tuner/bank.py": "tuner/test_bank",
    "tuner/batches.py": "tuner/test_mixed",
    "tuner/config.py": "tuner/test_config",
    "tuner/lazy_tensor.py": "tuner/test_readers tuner/test_modules",
    "tuner/files.py": "tuner/test_loading",
    "tuner/head.py": "tuner/test_head",
    "tuner/parametrized.py": "tuner/test_modules tuner/test_copies tuner/test_mixed",
    "tuner/layer.py": "tuner/test_readers tuner/test_merging tuner/test_adapters",
    "tuner/merging.py": "tuner/test_merging tuner/test_added_bias tuner/test_quantized",
    "tuner/model.py": "tuner/test_config tuner/test_head tuner/test_merging tuner/test_adapters",
    "tuner/modules.py": "tuner/test_modules tuner/test_readers tuner/test_lora tuner/test_mixed",
    "tuner/registration.py": "tuner/test_adapters",
    "tuner/base_model.py": "trajectory/test_tuning_files codec/test_digests tuner/test_targets",
    "tuner/loading.py": "tuner/test_head",
    "tuner/manifest.py": "tuner/test_loading",
    "tuner/module_types.py": "tuner/test_targets tuner/test_added_bias tuner/test_modules",
    "tuner/names.py": "tuner/test_targets",
    "tuner/targets.py": "tuner/test_targets tuner/test_added_bias tuner/test_modules",
    "tuner/to_lora.py": "tuner/test_lora",
    "tuner/vector.py": "tuner/test_mixed tuner/test_precision tuner/test_gradients tuner/test_loading",
}
"""Tests of each file, fastest first."""

FEWER = "not (roberta or distilbert or electra or qwen2 or gemma or bart or whisper or mamba or moe or n8192)"
"""Selection of tests by pytest: fewer families and no huge block, for speed."""

NAMED = r"""
tuner/head.py    | words(0, "head", name, parameter.numel())) * std | words(0, "other", name, parameter.numel())) * 0.06
tuner/attach.py  | words(seed, "theta", "", length)                 | words(seed, "other", "", length)
tuner/names.py   | (?:.*?\.)?\d+(?=\.)                              | (?:.*\.)?\d+(?=\.)
tuner/modules.py | self.train(base_layer.training)                  | pass
tuner/vector.py  | if not self.training or not distributed          | if not distributed
tuner/vector.py  | if not self.training or not distributed          | if self.training or not distributed
"""
"""Faults that once went unnoticed: file, text and replacement."""

HEAVY = ["torch", "torch._dynamo", "scipy.special", "transformers", "peft", "regex", "hypothesis", "pytest"]
HEAVY += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "t5", "vit")]

ONE = (ast.Lt, ast.Gt, ast.Eq, ast.Is, ast.In, ast.And, ast.Add, ast.Mult)
OTHER = (ast.LtE, ast.GtE, ast.NotEq, ast.IsNot, ast.NotIn, ast.Or, ast.Sub, ast.Div)
OPERATORS = dict(zip(ONE + OTHER, OTHER + ONE, strict=True))
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A fault: the bytes `start` to `stop` of a file are replaced by `new`."""

    file: str
    start: int
    stop: int
    new: str

    def put_into(self, package: Path) -> None:
        """Write the file with its fault."""
        source = (PACKAGE / self.file).read_bytes()
        (package / self.file).write_bytes(source[: self.start] + self.new.encode() + source[self.stop :])

    def __str__(self) -> str:
        source = (PACKAGE / self.file).read_bytes()
        line, old = source[: self.start].count(b"\n") + 1, source[self.start : self.stop].decode()
        return f"{self.file}:{line}  {' '.join(old.split())}  →  {self.new}"


def alter(node: ast.AST) -> Iterator[str]:
    """Yield replacements of a node."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            ops = [*node.ops[:i], OPERATORS[type(operator)](), *node.ops[i + 1 :]]
            yield f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in OPERATORS:
        other = copy.copy(node)
        other.op = OPERATORS[type(node.op)]()
        yield f"({ast.unparse(other)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"bool({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(value := node.value, bool | int | float):
        yield repr(not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield NAMES[node.id]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and its descendants without annotations, raised errors and texts."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            skipped = field in ("annotation", "returns", "exc") or isinstance(child, ast.JoinedStr)
            if isinstance(child, ast.AST) and not skipped:
                yield from nodes(child)


def make_mutants(file: str, count: int) -> list[Mutant]:
    """Make the named faults of a file, then at most `count` others in the order of the text.

    Raises:
        LookupError: the text of a named fault does not occur exactly once.
    """
    source = (PACKAGE / file).read_bytes()
    named = []
    for own, old, new in (map(str.strip, line.split(" | ")) for line in NAMED.strip().splitlines()):
        if own == file:
            before, *rest = source.split(old.encode())
            if len(rest) != 1:
                raise LookupError(f"{file} has {old!r} {len(rest)} times. Update NAMED.")
            named.append(Mutant(file, len(before), len(source) - len(rest[0]), new))
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    others = [
        Mutant(file, starts[n.lineno - 1] + n.col_offset, starts[n.end_lineno - 1] + n.end_col_offset, new)
        for n in nodes(ast.parse(source))
        for new in alter(n)
    ]
    return named + sorted(random.Random(file).sample(others, min(count, len(others))), key=lambda other: other.start)


def run_tests(mutant: Mutant | None, paths: list[str], limit: int) -> str:
    """Run tests on a copy of the package in a new process. Return `survived`, `killed` or `timed out`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder, PACKAGE.name))
        if mutant:
            mutant.put_into(Path(folder, PACKAGE.name))
        if not (child := os.fork()):
            signal.alarm(limit)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            os.environ["PYTHONPATH"] = folder
            sys.path.insert(0, folder)
            with suppress(BaseException):
                os._exit(import_module("pytest").main(["-x", "-p", "no:cacheprovider", "-k", FEWER, *paths]))
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "survived", -signal.SIGALRM: "timed out"}.get(code, "killed")


def main() -> None:
    """Run the tests with each fault, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILES", help=f"such as {next(iter(TESTS))}; by default all")
    parser.add_argument("--per-file", type=int, default=6, metavar="N", help="faults of each file (default 6)")
    parser.add_argument("--all", dest="per_file", action="store_const", const=sys.maxsize, help="all faults")
    options = parser.parse_args()
    if unknown := set(options.files) - set(TESTS):
        parser.error(f"no tests belong to {', '.join(sorted(unknown))}")
    chosen = {file: make_mutants(file, options.per_file) for file in options.files or TESTS}

    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for module in HEAVY:
        import_module(module)

    counts: Counter[str] = Counter()
    for file, faults in chosen.items():
        paths = [f"tests/{path}.py" for path in TESTS[file].split()]
        began = time.monotonic()
        if run_tests(None, paths, 1800) != "survived":
            raise RuntimeError(f"{' '.join(paths)} fail without any fault.")
        limit = 20 + 3 * int(time.monotonic() - began)
        for mutant in faults:
            counts[result := run_tests(mutant, paths, limit)] += 1
            print(f"{result:10}{mutant}", flush=True)
    print(", ".join(f"{counts[result]} {result}" for result in ("killed", "survived", "timed out")))


if __name__ == "__main__":
    main()
