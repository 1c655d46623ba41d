"""Kernel launches and host synchronisations of whole models: ``python -m vlmfast bench launches [model ...]``.

Counted on models with all the layers of the published ones and few channels, on the published image; see `counting` for
what counts. They depend on no device: it takes a CPU a few seconds for each model.
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

    Gives one record for each variant, without the model's name; one with an ``error`` where it could not be built.
    """
    try:
        model, inputs = recipe.build(size, torch.bfloat16, "cpu")
    except Exception as error:  # a transformers that lacks the model, say
        yield {"variant": "all", "error": one_line(error)}
        return
    counting.move(model)
    for variant, arguments in patches_of(recipe).items():
        # anew: what was asked of a tensor is kept on it
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
    """Count every variant of the models that ``options`` names, or of all; 1 if no model could be built."""
    writable("--json", options.json, make_folder=True)
    out, records = console(150), []
    environment = report.environment("cpu")
    for name in track(options.models or published.MODELS, "counting", console=out, transient=True):
        for found in count(published.MODELS[name]):
            records.append({"model": name, **found})
            if options.json is not None:  # after each: a stop loses nothing
                report.write(options.json, {"environment": environment, "records": records})
    show(out, records)
    return models.verdict(out, records)


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """Print one line for each model and variant."""
    rows = []
    for record in (record for record in records if "error" not in record):
        counts = [str(record[part][kind]) for part in ("prefill", "decode") for kind in ("launches", "syncs")]
        rows.append((None, [record["model"], record["variant"], str(record["cached_tokens"]), *counts]))
    heads = "model", "", "tokens", "prefill launches", "syncs", "decode launches", "syncs"
    report.show_table(console, heads, 2, rows)
    report.show_errors(console, (f"{record['model']}: {record['error']}" for record in records if "error" in record))
    console.print("all layers, one prompt with one image; lower bounds, by the rules of vlmfast/benchmarks/counting.py")
