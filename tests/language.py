"""Counts words that are private to this project although the field has a term.

    python tests/language.py

Reads the documentation, the notebook, docstrings, comments, test names, and strings of several words (messages, help,
labels). Prints every hit with the field's term, then the counts by kind of text. Fails if a hit is not covered by
`EXCEPTIONS`.
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("*.py", "*.ipynb", "*.md", "*.toml", "*.in", "*.cff", "*.yaml", "*.yml", "Makefile", ".ci/run")
SKIPPED = r"benchmarks/results/(?!(.*/)?README\.md)|tests/language\.py"  # reports of stored runs, and the list itself
KINDS = ("document", "docstring", "comment", "string", "test name")

# Private words as regular expressions, and the field's term. A space matches line breaks too.
WORDS = {
    "numbers": "trainable parameters; weights",
    "handful": "a few; the count",
    "moves?|moved|moving": "adapts, adapted; is updated through P; changes",
    "stays? still|still stays?|keeps? (its|their) places?": "stays frozen; is unchanged",
    "[\"'`]+vectors[\"'`]+|(the|on|of|as|trains|default) vectors (alone|are|d=)": "norms and biases",
    "fresh(ly)?": "newly initialized",
    "(re)?drawn|draws? (again|anew|it|them)|anew": "re-initialized from a fixed seed; sampled",
    "fixed streams?": "fixed seed",
    "told|tells?|without a word": "reported; silently",
    "refus(e|es|ed|ing|als?)": "raises ValueError; not supported",
    "strangers?|anybody's": "untrusted input",
    "rates?": "learning rate",
    "(right|wrong) (answers?|ones)|answers? right": "correct predictions",
    "trivial answers?": "majority-class baseline",
    "contestants?|peers?|beside others": "baseline, method",
    "level (with|by|on|and)|(is|are|be|nearly) level|ahead|(is|are|be|falls?) behind": "on par with; better than",
    "comes? before|passes (full|the target)|kinship": "exceeds; related tasks",
    "in full": "full fine-tuning; trained fully; completely",
    "asks?|asked|asking": "re-analyze; request; require",
    "stands? (for|in|at|by)|stand-ins?": "is the aggregate of; mock, stub",
    "where the width is": "allocating the remaining budget",
    "units?|counted in": "scale of θ",
    "deals?|dealt|dealing": "allocates, allocation",
    "shares? of|(a|an|the|its|their|each|one|equal|this|that) share": "allocation; fraction",
    "holders?": "parameter container",
    "places?": "module and parameter names; position",
    "bars?|aims?": "target",
    "kept": "stored, preserved",
    "learnt": "learned",
    "whoever|nobody|anybody": "the user; no",
    "(of|and|are|is) (ours|yours)|yours": "the package's; the user's",
    "to the bit": "bitwise",
    "go(es|ing)? on|went on|begun": "resumes, continues; started",
    "for ever": "permanently",
    "(comes?|came|coming) back": "is restored; is loaded",
    "in our hands": "upstream limitations",
}
# British spellings: found within names too.
STEMS = (
    "anonym|categor|character|custom|discret|emphas|factor|final|general|initial|linear|local|material|maxim|memor|minim|"
    "normal|optim|organ|parallel|parametr|penal|quant|random|real|recogn|regular|serial|special|standard|summar|"
    "synchron|token|util|vector|visual"
)
SPELLINGS = {
    rf"\w*?({STEMS})is(e|es|ed|er|ers|ing|ations?)": "…ize",
    "(re)?analys(e|ed|ing)": "analyze",
    r"(behavi|col|fav|neighb|hon|lab)our\w*": "…or",
    r"\w*(labell|modell|cancell|signall|travell)(ed|ing)": "one l",
    "licence|defence|artefacts?|centres?|centred|grey|judgement|programme|spelt|whilst": "US spelling",
}
# What a hit may be part of, with the reason.
EXCEPTIONS = {
    "(real|random|line|whole|page|port|version|complex|floating-point|different|two|sorted|decimal) numbers": "as such",
    "numbers (of|as|between)": "counts; numbers as such",
    "(compares?|needs?|several|not|than|metric of|to|holds|are|and convert|stores) numbers": "values of cells",
    "numbers( that are not|, or|\\.csv)": "likewise",
    "numbers: (name|whether)|bar: tqdm": "names of parameters",
    "unexpected keyword.*redrawn": "the former name, in a test that it raises",
    "learning[ _-]rates?": "the term",
    "(error|sampling|dropout|success) rates?": "other rates",
    r"(rates|peers|places|sizes)-(sst2|mrpc|reviews|words|python|scored)\w*": "names of groups",
    "rates, sizes, places, plateau, peers": "names of groups",
    "mov(e|es|ed|ing) .{,30}?(to|from|onto) (a |the |another )?(CPU|GPU|cuda|meta|memory|disk|dtype|device)": "tensors",
    "fresh (process|interpreter)(es)?": "one that has imported nothing",
    "rate falls|rates alike": "simulated curves, whose names are stored",
    "in full (precision|fine-tuning)": "float32; the term",
    "unit (tests?|norm|length|vectors?|variance)|SI units?|(output|hidden|per|each) units?|units of": "tests; neurons",
    "(in|out of)[ -]place|decimal places?|takes? place|in place of": "in-place operations; idioms",
    "(progress|error|color)[ -]?bars?|bar charts?": "plots",
    "drawn (from a|independently|uniformly|as)": "sampling; plots",
    "--ask": "an option: prompts",
    '`numbers` \\||`rates` are the former|"moved" that of': "names in stored files, in the README that explains them",
}


def compile_words(words: dict[str, str], before: str, after: str) -> list[tuple[re.Pattern[str], str, str]]:
    """Patterns with their source and the term."""
    spaced = {word: word.replace(" ", r"\s+") for word in words}
    return [
        (re.compile(rf"(?<!{before})(?:{spaced[word]})(?!{after})", re.IGNORECASE), word, term)
        for word, term in words.items()
    ]


PATTERNS = compile_words(WORDS, r"\w", r"\w") + compile_words(SPELLINGS, "[a-z]", "[a-z]")
ALLOWED = compile_words(EXCEPTIONS, r"\w", r"\w")


def read_python(source: str) -> Iterator[tuple[str, int, str]]:
    """Kind, first line and text of every piece of prose in a Python file."""
    tree = ast.parse(source)
    seen: set[ast.expr] = set()
    for node in ast.walk(tree):  # a container comes before what it contains
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield "test name", node.lineno, node.name.replace("_", " ")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is not ...:
            seen.add(node.value)
            yield "docstring", node.lineno, str(node.value.value)
        elif isinstance(node, ast.JoinedStr):
            seen.update(node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "string", node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and node not in seen and re.search(r"\w\s+\w", str(node.value)):
            yield "string", node.lineno, str(node.value)
    lines: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != start + len(lines):
            yield "comment", start, "\n".join(lines)
            lines = []
        start = start if lines else token.start[0]
        lines.append(token.string.lstrip("#"))
    yield "comment", start, "\n".join(lines)


def read(name: str) -> Iterator[tuple[str, int, str]]:
    """Kind, first line and text of every piece of prose in a file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        yield from read_python(text)
    elif name.endswith(".ipynb"):
        for cell in json.loads(text)["cells"]:  # lines are those of the cell
            source = "".join(cell["source"])
            yield from read_python(source) if cell["cell_type"] == "code" else [("document", 1, source)]
    else:  # names of tests are counted where the tests are
        yield "document", 1, re.sub(r"tests/[\w/]+\.py(::\w+)?", "", text)


def find(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Line (from 0), what was found, its pattern and the field's term, where no exception applies."""
    allowed = [match.span() for pattern, _, _ in ALLOWED for match in pattern.finditer(text)]
    for pattern, word, term in PATTERNS:
        for match in pattern.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in allowed):
                yield text.count("\n", 0, match.start()), " ".join(match[0].split()), word, term


def main() -> int:
    names = subprocess.run(["git", "ls-files", *FILES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts: Counter[tuple[str, str]] = Counter()
    for name in names.splitlines():
        if not re.match(SKIPPED, name) and (ROOT / name).exists():
            for kind, first, text in read(name):
                for line, found, word, term in find(text):
                    print(f"{name}:{first + line}: {found} → {term}")
                    counts[word, kind] += 1
    rows = {word: [counts[word, kind] for kind in KINDS] for word in dict.fromkeys(word for word, _ in counts)}
    rows = dict(sorted(rows.items(), key=lambda row: -sum(row[1])))
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)] or [0] * len(KINDS)
    print(f"\n{'word':36}", *(f"{kind:>9}" for kind in (*KINDS, "all")))
    for word, row in rows.items():
        label = SPELLINGS.get(word, word)
        print(f"{label[:35]:36}", *(f"{count:9}" for count in (*row, sum(row))))
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
