"""The runs of benchmarks/quality.py, with tables and a plot of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from peft_intrinsic.figures import save_figure, styled

Row = dict[str, Any]
MEASURED = ("numbers", "accuracy", "loss", "train", "seconds", "device", "dtype", "zeros", "sparsity", "bytes")
RATE = 2e-4
BUDGETS = (256, 1024, 64, 4096)
DECODER_BUDGETS = (256, 64, 1024, 16, 4096)
HEADS = (4e-3, 1.6e-2, 6.4e-2)
"""Learning rates of a free head that has its own."""
QUERY_VALUE, LINEAR = ["query", "value"], r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
TINY: dict[int, tuple[int, int, Any]] = {
    64: (4, 5, QUERY_VALUE),
    256: (4, 7, LINEAR),
    1024: (6, 28, LINEAR),
    4096: (11, 113, LINEAR),
}
"""TinyLoRA's r, u and modules for about d trainable parameters."""
LARGER: dict[str, tuple[list[str], int, int, str]] = {
    "sst2_150": (["q", "v"], 4, 3, r".*encoder\.layer\.\d+\..*(q|k|v|o|dense)"),  # MPNet
    "reviews": (["q_proj", "v_proj"], 4, 1, r".*_proj"),  # Llama
    **dict.fromkeys(("reviews_40", "words_40", "python_40"), (["q_proj", "v_proj"], 4, 1, r".*_proj")),
}
"""Tasks of larger models, at d = 256: UniLoRA's modules; TinyLoRA's r, u and modules."""


MAJORITY = 0.6685
"""Accuracy of the majority class on MRPC."""

CHANGES = ("factors", "parts", "logits", "warmup", "batch")
"""Changes of a run that are no options of the configuration."""


def plan(task: str, d: int, lr: float = RATE, seed: int = 0, **other: Any) -> Row:
    """Plan a run of this tuner. `factors` and `parts` replace the projection's, `logits` the size of the logits of a
    head from names, `warmup` is the part of the steps in which the learning rate rises, `batch` multiplies the batches;
    others are options of its config."""
    changed = {name: other.pop(name) for name in CHANGES if name in other}
    return {
        "task": task,
        "method": "intrinsic",
        "d": d,
        "lr": lr,
        "seed": seed,
        "head": "subspace",
        **changed,
        "config": other,
    }


def get_setting(row: Row) -> Row:
    """Return the planned part of a row, without measured values."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def find_row(rows: list[Row], planned: Row) -> Row | None:
    """Find the row of a planned run."""
    return next((row for row in rows if get_setting(row) == planned), None)


def rates(task: str) -> list[Row]:
    """Runs that look for one learning rate for every d."""
    if task in LARGER:
        return [plan(task, d, lr) for d in (256, 4096) for lr in (2e-4, 4e-4, 1e-4)]
    runs = [plan(task, d, lr) for lr in (2e-4, 4e-4, 1e-4) for d in (256, 1024, 4096, 64, 16384)]
    return [*runs, *(plan(task, d, 5e-5) for d in (16384, 4096))]  # where 1e-4 can be the best


def sizes(task: str) -> list[Row]:
    """Runs that compare targets, scales and allocations."""
    if task == "reviews":
        attention = {"target_modules": ["q_proj", "v_proj"]}
        others = [{"add_bias": True}, {"target_modules": "all-linear"}, attention]
        low_rank: Row = {"target_modules": "all-linear", "block_size": 8}
        runs = [plan(task, 256, **c) for c in ({}, *others, low_rank)]
        return [*runs, *(plan(task, 256, 8e-4, **c) for c in (attention, low_rank))]
    every = {"target_modules": "all", "exclude_modules": ".*embeddings.*"}
    if task == "mrpc":
        others = [{"factors": {"norm": 2}}, {"factors": {"bias": 2}}, {"projection": "one_hot"}, {"said": True}]
        return [*(plan(task, 1024, 4e-4, **c) for c in ({}, *others)), plan(task, 1024, **every)]
    close: list[Row] = [{}, {"said": True}, every, {"target_modules": "all"}]
    others = [
        *({"factors": {kind: size}} for kind in ("norm", "bias", "head") for size in (2, 32)),
        {**every, "factors": {"matrix": 4}},
        *({"parts": {"head": parts}} for parts in (1, 4)),
        {"projection": "one_hot"},
        {"projection": "global"},
    ]
    runs = [(seed, c) for seed in range(3) for c in (close + others if seed == 0 else close)]
    again = [(256, 1, {"projection": "one_hot"})]
    again += [(64, seed, c) for c in ({}, {"projection": "one_hot"}) for seed in (0, 1)]
    return [*(plan(task, 256, seed=seed, **c) for seed, c in runs), *(plan(task, d, seed=s, **c) for d, s, c in again)]


def places(task: str) -> list[Row]:
    """Runs with norms, biases and head, and with every parameter, for several d."""
    return [plan(task, d, **c) for c in ({}, {"target_modules": "all"}) for d in (1024, 4096, 16384)]


def heads(task: str) -> list[Row]:
    """Runs that start the head from the labels' names, not from a fixed seed."""
    texts = {"sst2": ["negative", "positive"], "mrpc": ["not equivalent", "equivalent"]}[task]
    labels: Row = {"head": "labels", "label_texts": texts}
    runs = [plan(task, d, seed=seed, **labels) for seed in range(3) for d in (64, 256, 1024)]
    return [*runs, *(plan(task, d, logits=size, **labels) for size in (0.5, 8.0) for d in (64, 256, 1024))]


def plateau(task: str) -> list[Row]:
    """Runs of ten seeds, of which some stay at the majority class."""
    recipes: list[Row] = [
        {},
        {"warmup": 0.1},
        {"lr": 4e-4, "warmup": 0.1},
        {"head": "labels", "label_texts": ["not equivalent", "equivalent"]},
        {"batch": 4},
        {"parts": {"head": 4}},
        {"factors": {"head": 2}},
    ]
    return [plan(task, 256, seed=seed, **recipe) for seed in range(10) for recipe in recipes]


OWN = {"rates": rates, "sizes": sizes, "places": places, "heads": heads, "plateau": plateau}


def peers(task: str) -> dict[str, tuple[Row, tuple[float, ...]]]:
    """Methods of about d trainable parameters: a run of each, and its first learning rates, a factor of 4 apart."""
    result: dict[str, tuple[Row, tuple[float, ...]]] = {}
    base: Row = {"task": task, "seed": 0, "head": "frozen"}
    larger = LARGER.get(task)
    for d in BUDGETS if larger is None else (256,):
        places, r, u, modules = larger or (QUERY_VALUE, *TINY[d])
        result[f"ours {d}"] = plan(task, d), (5e-5, 2e-4, 8e-4)
        options: Row = {"r": 4, "theta_d_length": d, "target_modules": places, "proj_seed": "seed"}
        result[f"unilora {d}"] = {**base, "method": "unilora", "d": d, "config": options}, (1.25e-2, 5e-2, 2e-1)
        options = {"r": r, "u": u, "target_modules": modules, "projection_seed": "seed"}
        result[f"tinylora {d}"] = {**base, "method": "tinylora", "d": d, "config": options}, (3e-3, 1.25e-2, 5e-2)
    values: Row = {"projection": "value_bias"}
    if task.endswith("_40"):
        tuned = (1e-4, 2e-4, 4e-4) if task == "reviews_40" else (5e-5, 2e-4, 8e-4)
        result["ours, value biases 256"] = plan(task, 256, **values), tuned
        result["unilora 256"] = result["unilora 256"][0], (5e-2, 2e-1, 8e-1)
        options = {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
        result["lora"] = {**base, "method": "lora", "d": None, "config": options}, (1e-3, 4e-3, 1.6e-2)
    if task == "scored_100":  # a decoder with a head
        for d in DECODER_BUDGETS:
            tuned = (1e-4, RATE, 4e-4) if d in (256, 1024) else (RATE,)
            result[f"ours {d}"] = plan(task, d), tuned
            result[f"ours, value biases {d}"] = plan(task, d, **values), tuned
    if task == "reviews":
        for d in DECODER_BUDGETS:
            result[f"ours, value biases {d}"] = plan(task, d, **values), (RATE,)
            options = {**result["unilora 256"][0]["config"], "theta_d_length": d}
            tuned = (2e-1, 8e-1, 3.2) if d == 256 else (2e-1,) if d > 256 else (8e-1,)  # 0.8 diverges above 256
            result[f"unilora {d}"] = {**base, "method": "unilora", "d": d, "config": options}, tuned
        every = plan(task, 256, **values, layers_to_transform=list(range(30)))
        result["ours, value biases of all layers 256"] = every, (RATE,)
        result["ours, value biases as a LoRA 256"] = plan(task, 256, projection="value_lora"), (RATE,)
        # value projections alone
        for name, option in (("unilora", {}), ("tinylora", {"u": 8})):
            run, rates = result[f"{name} 256"]
            options = {**run["config"], **option, "target_modules": ["v_proj"]}
            result[f"{name} v 256"] = {**run, "config": options}, rates
    return result


def smallest(task: str) -> dict[str, tuple[Row, tuple[float, ...]]]:
    """Other methods of PEFT at small settings, a trained head, full fine-tuning. Only BitFit trains the head's bias."""
    base: Row = {"task": task, "seed": 0, "head": "frozen", "d": None, "config": {}}
    options: dict[str, tuple[Row, tuple[float, ...]]] = {
        "head": ({}, (6.4e-2, 2.56e-1, 1.024)),
        "full": ({}, (2.5e-5, 1e-4, 4e-4)),
        "lora": ({"r": 1, "lora_alpha": 2, "target_modules": QUERY_VALUE}, (2e-3, 8e-3, 3.2e-2)),
        "ia3": (
            {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
            (8e-3, 3.2e-2, 1.28e-1),
        ),
        "lntuning": ({"target_modules": ["LayerNorm"]}, (1e-3, 4e-3, 1.6e-2)),
        "bitfit": ({}, (2e-3, 8e-3, 3.2e-2)),
        "vera": ({"r": 16, "target_modules": QUERY_VALUE, "projection_prng_key": "seed"}, (8e-3, 3.2e-2, 1.28e-1)),
        "vblora": (
            {"r": 1, "num_vectors": 8, "vector_length": 64, "target_modules": QUERY_VALUE},
            (4e-3, 1.6e-2, 6.4e-2),
        ),
        "beft": ({}, (4e-3, 1.6e-2, 6.4e-2)),
        "fourierft": (
            {"n_frequency": 16, "target_modules": QUERY_VALUE, "random_loc_seed": "seed"},
            (1.28, 5.12, 20.48),
        ),
    }
    return {method: ({**base, "method": method, "config": o}, rates) for method, (o, rates) in options.items()}


def list_methods(kind: str, task: str) -> dict[str, tuple[Row, tuple[float, ...]]]:
    """Methods of a group. `free` are those at d = 256 with a free head, at one learning rate or its own."""
    if kind == "smallest":
        return smallest(task)
    methods = peers(task)
    if kind == "peers":
        return methods
    free = {name: ({**run, "head": "free"}, rates) for name, (run, rates) in methods.items() if name.endswith(" 256")}
    apart = {f"{name}, head at {r:g}": ({**free[name][0], "head_lr": r}, free[name][1]) for r in HEADS for name in free}
    return free | apart


def tune(methods: dict[str, tuple[Row, tuple[float, ...]]], rows: list[Row], model: str) -> Iterator[tuple[str, Row]]:
    """Yield the next runs: all learning rates, more while the best by loss is at an edge, then two more seeds.

    A single learning rate is taken as it is.
    """
    for name, (run, grid) in methods.items():
        done: dict[float, float] = {}
        todo = list(grid)
        while todo:
            for lr in todo:
                yield name, (planned := {**run, "lr": lr})
                if row := find_row(rows, {"model": model, **planned}):
                    done[lr] = row["loss"]
            if any(lr not in done for lr in todo):
                break
            best, todo = min(done, key=done.__getitem__), []
            if len(grid) > 1 and best in (min(done), max(done)):
                todo = [best / 4 if best == min(done) else best * 4]
            else:
                for seed in (1, 2):
                    yield name, {**run, "lr": best, "seed": seed}


def at_best(method: tuple[Row, tuple[float, ...]], rows: list[Row], model: str) -> list[Row]:
    """Rows of a method at its best learning rate by loss on the first seed, one for each seed."""
    runs = [run for _, run in tune({"": method}, rows, model)]
    done = [row for run in runs if (row := find_row(rows, {"model": model, **run}))]
    first = [row for row in done if row["seed"] == 0]
    best = min(first, key=lambda row: row["loss"])["lr"] if first else None
    return [row for row in done if row["lr"] == best]


def list_runs(name: str, rows: list[Row], model: str) -> list[Row]:
    """List the runs of a group: its kind, a dash, and the task; other seeds last.

    Raises:
        SystemExit: there is no such group.
    """
    kind, _, task = name.partition("-")
    if kind in ("peers", "free", "smallest"):
        runs = [run for _, run in tune(list_methods(kind, task), rows, model)]
        return sorted(runs, key=lambda run: run["seed"])
    if kind not in OWN:
        raise SystemExit(
            f"Unknown group {name!r}. Use heads, rates, sizes, places, plateau, peers, free or "
            "smallest, a dash, and the task."
        )
    return OWN[kind](task)


def describe(row: Row) -> tuple[str, str, str]:
    """Describe a run of this tuner: d, learning rate, and its options."""
    changed = {**row["config"], **{name: row[name] for name in CHANGES if name in row}}
    words = ", ".join(f"{name} {value}" for name, value in changed.items())
    return f"{row['d']}", f"{row['lr']:g}", words or "default"


def print_row(*cells: Any) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |")


def format_cell(rows: list[Row]) -> str:
    """Format mean accuracy / mean cross-entropy of several seeds."""
    if not rows:
        return ""
    return f"{mean(row['accuracy'] for row in rows):.3f} / {mean(row['loss'] for row in rows):.3f}"


def largest_jump(row: Row) -> float:
    """Highest mean training loss over 25 steps, minus the lowest one before it."""
    return max(later - min(row["train"][: i + 1]) for i, later in enumerate(row["train"]))


def table(rows: list[Row], name: str) -> None:
    """Print a group as Markdown: accuracy / cross-entropy."""
    kind, _, task = name.partition("-")
    for model in dict.fromkeys(row["model"] for row in rows if row["task"] == task):
        mine = [row for row in rows if row["model"] == model and row["task"] == task]
        print(f"\n{name}, {model}\n")
        if kind == "rates":
            grid = sorted({run["lr"] for run in rates(task)})
            print_row("d", *(f"lr {lr:g}" for lr in grid), f"jump at {RATE:g}")
            print_row(*["---"] * (len(grid) + 2))
            for d in sorted({run["d"] for run in rates(task)}):
                done = [find_row(mine, {"model": model, **plan(task, d, lr)}) for lr in grid]
                jumps = [f"{largest_jump(row):.3f}" for row in done if row and row["lr"] == RATE]
                print_row(d, *(format_cell([row] if row else []) for row in done), *jumps)
        elif kind in OWN:
            last = "at the majority class" if kind == "plateau" else "each"
            print_row("d", "lr", "candidate", "accuracy / cross-entropy", "seeds", last)
            print_row(*["---"] * 6)
            planned = [{"model": model, **run} for run in OWN[kind](task)]
            for words in dict.fromkeys(map(describe, planned)):
                same = [run for run in planned if describe(run) == words]
                if done := [row for run in same if (row := find_row(mine, run))]:
                    each = ", ".join(f"{row['loss']:.3f}" for row in done)
                    stuck = sum(row["accuracy"] < MAJORITY + 0.005 for row in done) if kind == "plateau" else None
                    print_row(*words, format_cell(done), len(done), each if stuck is None else stuck)
        else:
            methods = list_methods(kind, task)
            print_row("method", "parameters", "best learning rate", "accuracy / cross-entropy", "seeds")
            print_row(*["---"] * 5)
            for label in sorted(methods, key=lambda label: (methods[label][0]["d"] or 0, label)):
                if best := at_best(methods[label], rows, model):
                    print_row(label, best[0]["numbers"], f"{best[0]['lr']:g}", format_cell(best), len(best))


LABELS = {
    "ours": "this package",
    "unilora": "UniLoRA",
    "tinylora": "TinyLoRA",
    "head": "head alone",
    "full": "full fine-tuning",
    "lora": "LoRA (r = 1)",
    "ia3": "IA³",
    "lntuning": "LayerNorm tuning",
    "bitfit": "BitFit",
    "vera": "VeRA",
    "vblora": "VB-LoRA",
    "beft": "BEFT",
    "fourierft": "FourierFT",
}
"""Methods as the plot's legend names them."""


def summarize(runs: list[Row], name: str) -> tuple[int, float, float, float]:
    """Return trainable parameters, mean of a measured value over seeds, and the distances to its lowest and highest."""
    values = [row[name] for row in runs]
    return runs[0]["numbers"], mean(values), mean(values) - min(values), max(values) - mean(values)


def draw(axes: Any, points: list[list[Row]], **style: Any) -> None:
    """Draw cross-entropy and accuracy against trainable parameters, a point for the seeds of each setting."""
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        numbers, means, below, above = zip(*sorted(summarize(rows, name) for rows in points), strict=True)
        axis.errorbar(numbers, means, yerr=(below, above), **style)


@styled
def plot(rows: list[Row], many_classes: list[Row], path: str) -> None:
    """Draw the quality of methods against trainable parameters, each at its best learning rate: a row for each task.

    Args:
        rows: of this benchmark.
        many_classes: of benchmarks/many_classes.py.
        path: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 12))
    panels = figure.subplots(4, 2)
    encoder, decoder = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
    titles = {
        "sst2": (encoder, "sentiment (SST-2), 2 classes"),
        "mrpc": (encoder, "paraphrases (MRPC), 2 classes"),
        "reviews": (decoder, "next token of film reviews, a decoder"),
    }
    for axes, (task, (model, title)) in zip(panels, titles.items(), strict=False):
        ours = "ours, value biases" if task == "reviews" else "ours"
        methods = peers(task)
        for method, curve in ((ours, "ours"), ("unilora", "unilora"), ("tinylora", "tinylora")):
            names = [name for name in methods if name.rpartition(" ")[0] == method]
            if best := [found for name in names if (found := at_best(methods[name], rows, model))]:
                draw(axes, best, marker="o", label=LABELS[curve])
        if task == "reviews" and (norms := at_best(methods["ours 256"], rows, model)):
            draw(axes, [norms], marker="s", color="C0", linestyle="", label=f"{LABELS['ours']}, norms")
        elif task != "reviews":
            for marker, (label, run) in zip("oXs^v<>PDd", smallest(task).items(), strict=True):
                if best := at_best(run, rows, model):
                    draw(axes, [best], color="black", linestyle="", marker=marker, label=LABELS[label])
        axes[0].set_title(title, loc="left")
    last = panels[-1]
    fine = [{**row, "numbers": row["trained"]} for row in many_classes if row["task"] == "fine"]
    kinds = (
        ("intrinsic", "labels", "C0", f"{LABELS['ours']}, head from names"),
        ("intrinsic", "subspace", "C5", LABELS["ours"]),
        ("lora", "subspace", "C3", "LoRA (r = 8)"),
        ("head", "subspace", "C6", "head alone"),
    )
    for method, head, color, label in kinds:
        runs = [row for row in fine if (row["method"], row["head"]) == (method, head)]
        if method != "intrinsic" and len({row["lr"] for row in runs}) < 3:
            continue  # not tuned
        if method != "intrinsic":  # at the best learning rate on the validation set
            first = max((row for row in runs if row["seed"] == 0), key=lambda row: row["validation"])
            runs = [row for row in runs if row["lr"] == first["lr"]]
        if groups := [[row for row in runs if row["numbers"] == n] for n in sorted({row["numbers"] for row in runs})]:
            draw(last, groups, marker="o", color=color, label=label)
    for row in fine:
        if row["method"] == "frozen":
            last[1].plot(row["numbers"], row["accuracy"], "k*", label="frozen encoder, logistic regression")
    last[0].set_title("questions (TREC), 50 classes", loc="left")
    for axes in panels:
        for axis, label in zip(axes, ("cross-entropy, lower is better", "accuracy"), strict=True):
            axis.set(xscale="log", xlabel="trainable parameters", ylabel=label)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, path)
