"""Kernel launches and host synchronisations of whole models: ``python -m vlmfast bench launches [model ...]``.

They are counted on models with all layers of the published ones but few channels, and an image of the published size;
see `counting` for the rules. No GPU is needed: a CPU takes a few seconds per model.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vlmfast.benchmarks import counting, models, published, report
from vlmfast.benchmarks.forwards import Decoding, patches_of, twin
from vlmfast.benchmarks.published import Published
from vlmfast.console import console, one_line, writable


def count(recipe: Published, size: str = "narrow") -> Iterator[dict[str, Any]]:
    """Count the launches and waits of one prefill and of one step of decoding, in bfloat16.

    Yields one record per variant, without the model's name; a single one with an ``error`` if no model could be built.
    """
    try:
        model, inputs = recipe.build(size, torch.bfloat16, "cpu")
    except Exception as error:  # for example, a transformers release without the model
        yield {"variant": "all", "error": one_line(error)}
        return
    counting.move(model)
    for variant, arguments in patches_of(recipe).items():
        # New tensors for each variant: vlmfast caches on a tensor what it has read from it.
        on_device = {name: counting.put(value) for name, value in inputs.items()}
        with counting.count():
            decoding = Decoding(twin(model, arguments), on_device)
        with counting.count() as prefill:
            logits = decoding.prompt()
        with counting.count():
            decoding.begin(logits)
        length = decoding.cached()
        with counting.count() as decode:
            decoding.forward()
        yield {
            "variant": variant,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "cached_tokens": length,
            "prefill": prefill.summary(),
            "decode": decode.summary(),
        }


def run(options: Namespace) -> int:
    """Count every variant of the models that ``options`` names, or of all; return 1 if no model could be built."""
    writable("--json", options.json, make_folder=True)
    out, records = console(150), []
    environment = report.environment("cpu")
    for name in track(options.models or published.MODELS, "counting", console=out, transient=True):
        for found in count(published.MODELS[name]):
            records.append({"model": name, **found})
            if options.json is not None:  # written after every record, so that a stop loses nothing
                report.write(options.json, {"environment": environment, "records": records})
    show(out, records)
    return models.verdict(out, records)


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """Print one line per model and variant."""
    rows = []
    for record in (record for record in records if "error" not in record):
        counts = [str(record[part][kind]) for part in ("prefill", "decode") for kind in ("launches", "syncs")]
        rows.append((None, [record["model"], record["variant"], str(record["cached_tokens"]), *counts]))
    heads = "model", "", "tokens", "prefill launches", "syncs", "decode launches", "syncs"
    report.show_table(console, heads, 2, rows)
    report.show_errors(console, (f"{record['model']}: {record['error']}" for record in records if "error" in record))
    console.print("all layers, one prompt with one image; lower bounds, by the rules of vlmfast/benchmarks/counting.py")
