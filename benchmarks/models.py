"""Whole models: ``python -m vlmfast.benchmarks.models [model ...] [--full] [--device cpu|cuda] [--json FILE]``.

Each model answers one prompt with one image, as it is, patched, and with its visual tokens reduced. The first token
takes the vision tower, the reduction and the prefill; each further one a step of decoding. The weights are random,
which changes no time. Without ``--full`` the models are scaled down to run on a CPU, with as many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import vlmfast
from vlmfast.benchmarks import report
from vlmfast.benchmarks.published import MODELS, Published

STEPS = 8  # of decoding
ROUNDS = {"cpu": 3, "cuda": 10}


def variants(published: Published) -> dict[str, dict[str, Any] | None]:
    """Name -> the arguments of ``vlmfast.patch``, or None for the model as it is."""
    found: dict[str, dict[str, Any] | None] = {"original": None, "patched": {}}
    if published.method is not None:
        found["reduced"] = {"reduce": published.method}
    return found


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def cache_bytes(cache: Any) -> int:
    """What the keys and values of all layers take."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def _answer(model: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    """One prompt: seconds to the first token, seconds for each further one, and the size of the cache."""
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first, output = _seconds(lambda: model.generate(**inputs, max_new_tokens=1, **settings))
    kept = cache_bytes(output.past_key_values)
    both, _ = _seconds(lambda: model.generate(**inputs, max_new_tokens=1 + STEPS, **settings))
    return {"first": first, "step": (both - first) / STEPS, "cache_bytes": kept}


def measure(name: str, small: bool, device: str, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """All variants of one model, in turns, so that a slow spell of the machine hits each alike."""
    published = MODELS[name]
    model, inputs = published.build(small, dtype, device)
    rounds: dict[str, list[dict[str, float]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped is in the report of the patch
        for turn in track(range(1 + ROUNDS[device]), name, console=console):
            for variant, arguments in variants(published).items():
                with nullcontext() if arguments is None else vlmfast.patch(model, **arguments):
                    taken = _answer(model, inputs)
                if turn:  # the first is the warm-up
                    rounds.setdefault(variant, []).append(taken)
    found: dict[str, Any] = {
        "model": name,
        "small": small,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "reduction": repr(published.method),
        "variants": {},
    }
    for variant, answers in rounds.items():
        row: dict[str, float] = {"cache_bytes": answers[0]["cache_bytes"]}
        for key in ("first", "step"):
            row[f"{key}_ms"] = 1e3 * statistics.median(answer[key] for answer in answers)
            pairs = zip(rounds["original"], answers, strict=True)
            row[f"{key}_speedup"] = statistics.median(original[key] / answer[key] for original, answer in pairs)
        found["variants"][variant] = row
    return found


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """One table; speed-ups are medians of the rounds' ratios."""
    table = Table("model", "", "first token", "speed-up", "further token", "speed-up", "KV cache")
    for record in records:
        for index, (variant, row) in enumerate(record["variants"].items()):
            name = f"{record['model']}{' (small)' if record['small'] else ''}, {record['prompt_tokens']} tokens"
            cells = [f"{row['first_ms']:.1f} ms", f"{row['first_speedup']:.2f}x"]
            cells += [f"{row['step_ms']:.2f} ms", f"{row['step_speedup']:.2f}x", f"{row['cache_bytes'] / 1e6:.1f} MB"]
            table.add_row("" if index else name, variant, *cells)
        table.add_section()
    console.print(table)


def main() -> int:
    """Run the models that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m vlmfast.benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"of: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--full", action="store_true", help="the published sizes (default on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device cuda: torch sees no GPU")
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    console, records = Console(width=None if sys.stdout.isatty() else 130), []
    for name in options.models or MODELS:
        small = options.device == "cpu" and not options.full
        records.append(measure(name, small, options.device, dtype, console))
        if options.json:
            report.write(options.json, {"environment": report.environment(options.device), "records": records})
    show(console, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
