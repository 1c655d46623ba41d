"""Whole models: ``python -m vlmfast bench models [model ...]``.

Each model answers one prompt with one image: unpatched, patched, and with its visual tokens reduced. An answer is one
prefill (vision tower, reduction and the whole prompt) and some steps of greedy decoding. The weights are random, which
does not change the times.

On a CPU the models are scaled down, with the same number of tokens. Narrow models have all layers but few channels, and
answer a prompt without an image, whose tokens would be copied with the cache. They compute almost nothing, so their
time is that of the host, which limits an eager GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from torch import Tensor, nn

from vlmfast.benchmarks import published
from vlmfast.benchmarks.forwards import patches_of
from vlmfast.benchmarks.modes import NOT_RUN, Variant, median, prepare
from vlmfast.benchmarks.published import Published
from vlmfast.console import one_line

ROUNDS = {"cpu": 3, "cuda": 10}
MORE = 4  # factor of the rounds for narrow models, whose steps take milliseconds
EAGER = "eager original"  # timed in every mode
DOES = {"eager": "a first answer", "compile": "compiling, which takes minutes on a CPU", "graph": "capturing"}
Record = dict[str, Any]
Save = Callable[[list[Record]], None]


def measure(
    recipe: Published,
    model: nn.Module,
    inputs: dict[str, Tensor],
    mode: str,
    doing: Callable[[str], None] = lambda what: None,
    more: int = 1,
) -> list[Record]:
    """Time all variants of one model in one mode, in turns, so that a slow spell of the machine hits all alike.

    The model itself is not changed. Returns one record per variant, with an ``error`` where the variant has no time.
    """
    wanted = {name: (patch, mode) for name, patch in patches_of(recipe).items()}
    if mode != "eager":
        wanted[EAGER] = None, "eager"
    variants = {name: Variant(model, inputs, patch) for name, (patch, _) in wanted.items()}
    for name, (patch, how) in wanted.items():
        doing(f"{name}: {DOES[how]}")
        original = variants["original"] if patch is not None and "reduce" not in patch else None
        prepare(variants[name], how, original)
        if variants[name].spoils:
            for other in variants.values():
                other.error = other.error or NOT_RUN
            break
    rounds = more * ROUNDS[inputs["input_ids"].device.type]
    for index in range(rounds):
        doing(f"round {index + 1} of {rounds}")
        for variant in variants.values():
            if variant.error is None:
                variant.time()
    variants.setdefault(EAGER, variants["original"])
    return [{"variant": name, **_row(variants[name], variants)} for name in patches_of(recipe)]


def _row(variant: Variant, variants: Mapping[str, Variant]) -> Record:
    """Make the record of one variant; ratios are medians over the rounds."""
    if variant.error is not None:
        return {"error": variant.error}
    row: Record = dict(variant.facts)
    for index, part in enumerate(("prefill", "decode")):
        taken = [pair[index] for pair in variant.times]
        row[f"{part}_ms"] = 1e3 * median(taken)
        row[f"{part}_range"] = (max(taken) - min(taken)) / median(taken)
        for against, key in (("original", "speedup"), (EAGER, "over_eager")):
            others = [pair[index] for pair in variants[against].times]
            if len(others) == len(taken):
                row[f"{part}_{key}"] = median(a / b for a, b in zip(others, taken, strict=True))
    return row


def run(
    names: Sequence[str],
    console: Console,
    *,
    modes: Sequence[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: str = "small",
    save: Save = lambda records: None,
    budget: float | None = None,
    earlier: Sequence[Record] = (),
    reduce: str | None = None,
    layers: int | None = None,
) -> list[Record]:
    """Measure models, in the order of their names.

    Args:
        names: keys of `vlmfast.benchmarks.published.MODELS`; empty for all models.
        console: shows the progress.
        modes: some of `vlmfast.benchmarks.modes.MODES`.
        device: "cpu" or "cuda".
        dtype: of weights and activations.
        size: one of `vlmfast.benchmarks.published.SIZES`.
        save: called with all records so far, after each model and mode.
        budget: seconds after which no further model is started.
        earlier: records of an earlier run; a model is not measured again in a mode in which it has some.
        reduce: the text of how visual tokens are reduced, where they can be; None for the method of each model.
        layers: of the language model; None for the number of the size.

    Returns:
        One record per model, mode and variant.
    """
    start = time.monotonic()
    records: list[Record] = list(earlier)
    settings = {"reduce": reduce, "layers": layers}
    asked = {key: value for key, value in settings.items() if value is not None}
    for name in names or published.MODELS:
        if len(records) > len(earlier) and budget is not None and time.monotonic() - start > budget:
            console.print(f"the budget of {budget:g} s is spent: {name} and what follows it were not measured")
            break
        common: Record = {"model": name, "size": size, "dtype": str(dtype).removeprefix("torch."), **asked}
        alike = [r for r in earlier if all(r.get(key) == value for key, value in {**settings, **common}.items())]
        left = [mode for mode in modes if mode not in [r.get("mode") for r in alike]]
        if not left:
            continue
        if not console.is_terminal:  # rich shows its status line on a terminal only
            console.print(f"{', '.join(map(str, common.values()))}: {', '.join(left)}")
        for found in _all_modes(common, left, device, console):
            records += found
            save(records)
    return records


def _all_modes(common: Record, modes: Sequence[str], device: str, console: Console) -> Iterator[list[Record]]:
    """Yield the records of one model, mode by mode; mode "graph" runs in a process of its own.

    A failed capture leaves torch's current stream, allocator and random generator in states that cannot be repaired;
    they end with the process. The rest of that mode of this model is then not run, but other modes and models are. A
    model that could not be built is not built again for the next mode.
    """
    if here := [mode for mode in modes if mode != "graph"]:
        for found in _one_model(common, here, device, console):
            yield found
            if not any(map(was_built, found)):
                return
    if "graph" in modes:
        place = device if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        with console.status(f"{common['model']}, graph"):
            yield apart({**common, "mode": "graph"}, _graphs, common, place, torch.get_num_threads())


def apart(common: Record, function: Callable[..., list[Record]], *args: Any) -> list[Record]:
    """Call a function that returns records in a process of its own; if the process dies, return that as a record."""
    interrupt = signal.SIGINT, signal.SIG_DFL  # Ctrl-C reaches both processes, and only one should report it
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, interrupt) as processes:
        try:
            return processes.submit(function, *args).result()
        except Exception as error:
            return [{**common, "variant": "all", "error": one_line(error)}]


def _graphs(common: Record, device: str, threads: int) -> list[Record]:
    torch.set_num_threads(threads)
    torch.cuda.set_device(device)
    return [record for part in _one_model(common, ["graph"], device, Console(quiet=True)) for record in part]


def _one_model(common: Record, modes: Sequence[str], device: str, console: Console) -> Iterator[list[Record]]:
    """Yield the records of one model, mode by mode, and free its memory afterwards."""
    recipe = published.MODELS[common["model"]]
    if recipe.method is not None:
        recipe = dataclasses.replace(recipe, method=common.get("reduce", recipe.method))
    try:
        dtype = getattr(torch, common["dtype"])
        model, inputs = recipe.build(common["size"], dtype, device, common.get("layers"))
    except Exception as error:  # for example, too little memory, or a transformers release without the model
        yield [{**common, "variant": "all", "error": one_line(error)}]
        return
    more = 1
    if common["size"] == "narrow":
        inputs, more = published.text_of(inputs), MORE
    common["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    common["prompt_tokens"] = inputs["input_ids"].shape[1]
    for mode in modes:
        with console.status(head := f"{common['model']}, {mode}") as status:
            try:
                rows = measure(recipe, model, inputs, mode, functools.partial(_say, status, head), more)
            except Exception as error:
                rows = [{"variant": "all", "error": one_line(error)}]
        yield [{**common, "mode": mode, **row} for row in rows]
        _free(device)
    del model, inputs
    _free(device)


def _say(status: Status, *doing: str) -> None:
    status.update(", ".join(doing))


def _free(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def was_built(record: Record) -> bool:
    """Return whether the model was built; the record of one that was not has an error and no mode."""
    return "mode" in record or "error" not in record


def failed(records: list[Record]) -> bool:
    """Return whether something of ours failed.

    These do not count: an error that the original has too, in the same mode, settings and words; what was not run; and
    a model that could not be built, unless it is the only one.
    """

    def run_of(record: Record) -> tuple[Any, ...]:
        return tuple(map(record.get, ("model", "mode", "reduce", "layers")))

    originals = {run_of(r): r.get("error") for r in records if r["variant"] == "original"}
    errors = [r for r in records if "error" in r and r["error"] != NOT_RUN and was_built(r)]
    return any(r["error"] != originals.get(run_of(r)) for r in errors)


def verdict(console: Console, records: list[Record]) -> int:
    """Return the exit code: 1 if something of ours failed, or if no model was built, which is then printed."""
    if records and not any(map(was_built, records)):
        console.print("no model could be built, so none was measured", style="red")
        return 1
    return int(failed(records))


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("models")
