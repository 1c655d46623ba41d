"""Accuracy against token budget, of small models trained from scratch.

    python -m vlmfast bench digits [--weights FOLDER] [--out FOLDER]

Random weights cannot show what a reduction of tokens costs, so models are trained here for a few minutes each: a LLaVA
on pictures composed of scans of handwritten digits, which is asked what a quarter of the picture holds, one of ten
digits or nothing; and a Qwen2-VL on videos of digits that move, which is asked which of them came first, second and
third. Training and test use different scans. Every registered method is measured, with several seeds, each of which
sets weights, pictures and videos.

The results compare the methods on these tasks. They say nothing about the accuracy of real models.
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import vlmfast
from vlmfast.benchmarks import report
from vlmfast.benchmarks.digits_data import ANSWER, NOTHING, Batch
from vlmfast.benchmarks.digits_models import LEARNING_RATE, TASKS, TRAININGS, Task, Training, trained
from vlmfast.console import CommandError, console, needed, writable
from vlmfast.reduce.spelling import every, spell

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"pictures": (32, 16, 8, 4), "videos": (4, 2, 1)}  # of a picture's 64 tokens, of a frame's 16
KINDS = {"pictures": "image", "videos": "video"}
LAYER = 1  # at whose input methods cut that do so between the two layers
ALL = "all tokens"


@torch.no_grad()
def accuracy(task: Task, model: Any, drawn: Batch, method: Any = None) -> tuple[float, float]:
    """Return the accuracy of answers about digits, and how many visual tokens a prompt has left."""
    hits, left = [], []
    for start in range(0, len(drawn.contents), 50):
        part = slice(start, start + 50)
        some = Batch(drawn.pixels[part], drawn.contents[part], drawn.places[part])
        for inputs, answers in task.questions_in_turn(some):
            if method is None:
                logits = model(**inputs).logits
                left.append(float(task.tokens))
            else:
                with vlmfast.patch(model, exclude="*", reduce=method) as patched:
                    logits = model(**inputs).logits
                left.append(_left(patched, method, task))
            right = logits[:, -1].argmax(1) - ANSWER == answers
            hits.append(right[answers != NOTHING])
    return float(torch.cat(hits).float().mean()), statistics.mean(left)


def _left(patched: Any, method: Any, task: Task) -> float:
    """Return the mean number of visual tokens of a prompt; in the last layer, if layers differ."""
    shown = patched.images + patched.videos
    if shown:
        return statistics.mean(image.features.shape[0] for image in shown)
    return float(method.budget(0, task.tokens))


def measure(task: Task, model: Any, drawn: Batch, out: Console) -> list[dict[str, Any]]:
    """Return one record for each method and budget, all tokens first."""
    found = [{"method": ALL, "tokens": task.patches, "left": task.tokens, "right": accuracy(task, model, drawn)[0]}]
    refused = set()
    for budget in track(BUDGETS[task.name], f"measuring {task.name}", console=out):
        for method in every(KINDS[task.name], budget, task.tokens, LAYER, task.drawer.frames):
            try:
                right, left = accuracy(task, model, drawn, method)
            except ValueError as error:
                refused.add(f"{spell(method).partition(':')[0]}: {error}")
                continue
            record = {"method": _label(method), "tokens": budget, "settings": spell(method)}
            found.append(record | {"left": round(left, 2), "right": right})
    for reason in sorted(refused):
        out.print(f"left out {reason}", markup=False, soft_wrap=True)
    return found


def _label(method: Any) -> str:
    """Return the name of a method's class with the switches that are on, the same for every budget."""
    on = [name for name, value in vars(method).items() if value is True]
    return " ".join([type(method).__name__, *(f"({name})" for name in on)])


def joined(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the records of several seeds: accuracies become lists, one number per seed."""
    return [
        {**records[0], "left": round(statistics.mean(r["left"] for r in records), 2)}
        | {"right": [round(record["right"], 4) for record in records]}
        for records in zip(*runs, strict=True)
    ]


# ---- show ----


def rows_of(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Make the table of a task: its head, and a row per method with the mean and range over seeds in %."""
    whole, *reduced = found["records"]
    budgets = list(dict.fromkeys(record["tokens"] for record in reduced))
    by_method: dict[str, dict[int, str]] = {}
    for record in reduced:
        by_method.setdefault(record["method"], {})[record["tokens"]] = spread(record["right"])
    of = "of each frame" if found["task"] == "videos" else "left"
    head = [f"{found['task']}: tokens {of}", *map(str, (whole["tokens"], *budgets))]
    rows = [
        [method, spread(whole["right"]) if number == 0 else "", *(cells.get(budget, "") for budget in budgets)]
        for number, (method, cells) in enumerate(by_method.items())
    ]
    return head, rows


def spread(shares: list[float]) -> str:
    """Format shares in %: their mean and, in brackets, the lowest and the highest."""
    low, middle, high = (round(100 * share) for share in (min(shares), statistics.mean(shares), max(shares)))
    return str(middle) if len(shares) == 1 else f"{middle} ({low} to {high})"


def show(out: Console, tasks: list[dict[str, Any]], path: Path) -> None:
    """Print a table of each task, and plot the accuracy over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(tasks), 4.2), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        head, rows = rows_of(found)
        out.print(f"{found['question']} right answers in %, mean (lowest-highest) of {len(found['seeds'])} seeds")
        report.show_table(out, head, 1, [(None, row) for row in rows])
        whole, *reduced = found["records"]
        axes.axhline(statistics.mean(whole["right"]), color="grey", linestyle="--", label=ALL)
        for number, method in enumerate(dict.fromkeys(record["method"] for record in reduced)):
            own = [record for record in reduced if record["method"] == method]
            tokens = [record["tokens"] for record in own]
            mean, low, high = ([f(record["right"]) for record in own] for f in (statistics.mean, min, max))
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            axes.plot(tokens, mean, marker="o", markersize=3, label=method, **style)
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.axhline(0.1, color="lightgrey", linestyle=":", label="chance")
        budgets = sorted({record["tokens"] for record in reduced})
        axes.set(xscale="log", xlabel=head[0], ylabel="right answers", ylim=(0, 1))
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{found['question']} ({found['model']}, {len(found['seeds'])} seeds)", size=9)
        axes.legend(frameon=False, fontsize=6)
    figure.savefig(path, dpi=130)


# ---- the command ----


def run(options: Namespace) -> int:
    """Train and measure as the command line says, and write ``digits.json`` and ``digits.png``."""
    out = console()
    for name, folder in (("--out", options.out), ("--weights", options.weights)):
        if folder is not None and not folder.is_dir():
            raise CommandError(f"{name}: there is no folder {folder}")
    for name in ("digits.json", "digits.png"):
        writable("--out", options.out / name)
    for package in ("transformers", "sklearn", "matplotlib"):
        needed(package, "bench digits")
    path = options.out / "digits.json"
    known = json.loads(path.read_text())["tasks"] if options.tasks and path.exists() and path.stat().st_size else []
    tasks = {found["task"]: found for found in known}  # tasks that are not measured again stay
    for name in options.tasks or TASKS:
        task, usual = TASKS[name], TRAININGS[name]
        training = Training(options.steps or usual.steps, options.batch or usual.batch)
        losses, runs = [], []
        for seed in options.seeds:
            model, lost = trained(task, training, seed, options.weights, out)
            losses.append(lost)
            drawn = task.drawer(train=False, seed=1000 + seed).draw(options.test_samples)
            runs.append(measure(task, model, drawn, out))
        settings = {"steps": training.steps, "batch": training.batch, "learning_rate": LEARNING_RATE}
        tasks[name] = {
            "task": name,
            "environment": report.environment("cpu"),
            "question": task.question,
            "model": f"{model.config.model_type}, {sum(p.numel() for p in model.parameters())} parameters",
            "seeds": options.seeds,
            "training": {**settings, "loss_every_100_steps": losses},
            "test_samples": options.test_samples,
            "records": joined(runs),
        }
    ordered = [tasks[name] for name in TASKS if name in tasks]
    path.write_text(json.dumps({"tasks": ordered}, indent=1) + "\n")
    show(out, ordered, options.out / "digits.png")
    return 0


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("digits")
