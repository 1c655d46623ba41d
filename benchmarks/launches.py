"""Kernel launches and host synchronisations of whole models: ``python -m vlmfast.benchmarks.models --count``.

Counted on models with all the layers of the published ones and few channels, on the published image; see `counting` for
what counts. They depend on no device: it takes a CPU a few seconds for each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vlmfast.benchmarks import counting
from vlmfast.benchmarks.forwards import Answer, twin, variants
from vlmfast.benchmarks.published import Published, chosen
from vlmfast.console import one_line, table

Save = Callable[[list[dict[str, Any]]], None]


def count(published: Published, size: str = "narrow") -> Iterator[dict[str, Any]]:
    """Launches and waits of one prefill and of one step of decoding, in bfloat16.

    Args:
        published: the model.
        size: one of `vlmfast.benchmarks.published.SIZES`.

    Yields:
        One record for each variant, without the model's name; one with an ``error`` where it could not be built.
    """
    try:
        model, inputs = published.build(size, torch.bfloat16, "cpu")
    except Exception as error:  # a transformers that lacks the model, say
        yield {"variant": "all", "error": one_line(error)}
        return
    counting.move(model)
    on_device = {name: counting.put(value) for name, value in inputs.items()}
    for variant, arguments in variants(published).items():
        with counting.count():
            answer = Answer(twin(model, arguments), on_device)
        with counting.count() as prefill:
            logits = answer.prompt()
        with counting.count():
            answer.begin(logits)
        length = answer.cached()
        with counting.count() as decode:
            answer.forward()
        yield {
            "variant": variant,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "cached_tokens": length,
            "prefill": _described(prefill),
            "decode": _described(decode),
        }


def _described(found: counting.Count) -> dict[str, Any]:
    waits = dict(found.waits.most_common())
    return {"launches": found.launches.total(), "syncs": found.waits.total(), "waits": waits}


def run(names: Sequence[str], console: Console, save: Save = lambda records: None) -> list[dict[str, Any]]:
    """Count every variant of the models.

    Args:
        names: of models; none for all.
        console: shows the progress.
        save: called with all records after each.

    Returns:
        One record for each model and variant.

    Raises:
        CommandError: for an unknown name.
    """
    records: list[dict[str, Any]] = []
    for name, published in track(chosen(names).items(), "counting", console=console, transient=True):
        for found in count(published):
            records.append({"model": name, **found})
            save(records)
    return records


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """One line for each model and variant."""
    lines = table("model", "", "tokens", "prefill launches", "syncs", "decode launches", "syncs")
    for column in lines.columns[2:]:
        column.justify = "right"
    previous = None
    for record in (record for record in records if "error" not in record):
        cells = [str(record[part][kind]) for part in ("prefill", "decode") for kind in ("launches", "syncs")]
        name = "" if record["model"] == previous else record["model"]
        lines.add_row(name, record["variant"], str(record["cached_tokens"]), *cells)
        previous = record["model"]
    console.print(lines)
    for record in (record for record in records if "error" in record):
        console.print(f"{record['model']}: {record['error']}", style="red", markup=False, soft_wrap=True)
    console.print("all layers, one prompt with one image; lower bounds, by the rules of vlmfast/benchmarks/counting.py")
