"""Whole models: ``python -m vlmfast bench models [model ...]``.

Each model answers one prompt with one image, as it is, patched, and with its visual tokens reduced: one prefill (the
vision tower, the reduction and the whole prompt), then steps of greedy decoding. The weights are random, which changes
no time. On a CPU the models are scaled down, with as many tokens.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vlmfast.benchmarks import published
from vlmfast.benchmarks.forwards import patches_of
from vlmfast.benchmarks.modes import MODES, NOT_RUN, Variant, median, prepare
from vlmfast.benchmarks.published import Published
from vlmfast.console import CommandError, one_line

ROUNDS = {"cpu": 3, "cuda": 10}
EAGER = "eager original"  # runs along in every mode
DOES = {"eager": "a first answer", "compile": "compiling, which takes minutes on a CPU", "graph": "capturing"}
Record = dict[str, Any]
Save = Callable[[list[Record]], None]


def measure(
    recipe: Published,
    model: nn.Module,
    inputs: dict[str, Tensor],
    mode: str,
    doing: Callable[[str], None] = lambda what: None,
) -> list[Record]:
    """Time all variants of one model in one mode, in turns, so that a slow spell of the machine hits each alike.

    Args:
        recipe: what the model was built of.
        model: left as it is.
        inputs: of its prompt.
        mode: one of `MODES`.
        doing: is told what is done next.

    Returns:
        One record for each variant; ``error`` in it where the variant has no time.
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
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    rounds = ROUNDS[inputs["input_ids"].device.type]
    for index in range(rounds):
        doing(f"round {index + 1} of {rounds}")
        for name, variant in variants.items():
            if variant.error is None:
                variant.time(times[name])
    times.setdefault(EAGER, times["original"])
    return [{"variant": name, **_row(variants[name], name, times)} for name in patches_of(recipe)]


def _row(variant: Variant, name: str, times: dict[str, list[tuple[float, float]]]) -> Record:
    """Write down what was found of one variant; ratios are medians of the rounds' ratios."""
    if variant.error is not None:
        return {"error": variant.error}
    row: Record = dict(variant.facts)
    for index, part in enumerate(("prefill", "decode")):
        taken = [pair[index] for pair in times[name]]
        row[f"{part}_ms"] = 1e3 * median(taken)
        row[f"{part}_range"] = (max(taken) - min(taken)) / median(taken)
        for against, key in (("original", "speedup"), (EAGER, "over_eager")):
            others = [pair[index] for pair in times.get(against, [])]
            if len(others) == len(taken):
                row[f"{part}_{key}"] = median(a / b for a, b in zip(others, taken, strict=True))
    return row


def run(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    full: bool | None = None,
    modes: Sequence[str] = (),
    console: Console,
    save: Save = lambda records: None,
    budget: float | None = None,
) -> list[Record]:
    """Measure models, in the order of their names.

    Args:
        names: of `vlmfast.benchmarks.published.MODELS`; none for all.
        device: "cpu" or "cuda".
        dtype: of weights and activations; None for float32 on a CPU, else bfloat16.
        full: the published sizes; None for those on a GPU, and for the small ones on a CPU.
        modes: of `MODES`; none for all that the device has.
        console: shows what is being done.
        save: called with all records whenever there are more.
        budget: seconds after which no further model is begun.

    Returns:
        One record for each model, mode and variant.

    Raises:
        CommandError: for a dtype or mode that the device does not have.
    """
    wanted = chosen_modes(modes, device)
    dtype = chosen_dtype(dtype, device)
    size = "full" if (device != "cpu" if full is None else full) else "small"
    start = time.monotonic()
    records: list[Record] = []
    for name in names or published.MODELS:
        if records and budget is not None and time.monotonic() - start > budget:
            console.print(f"the budget of {budget:g} s is spent: {name} and what follows it were not measured")
            break
        common = {"model": name, "size": size, "dtype": str(dtype).removeprefix("torch.")}
        if not console.is_terminal:  # nobody sees the status there
            console.print(f"{', '.join(common.values())}: {', '.join(wanted)}")
        for found in _all_modes(published.MODELS[name], common, wanted, device, console):
            records += found
            save(records)
    return records


def _all_modes(
    recipe: Published, common: Record, modes: Sequence[str], device: str, console: Console
) -> Iterator[list[Record]]:
    """Yield the records of one model, mode by mode; the graph in a process of its own.

    A capture that fails leaves the current stream, the allocator and the random generator of torch in states that
    nothing mends. With the process they are gone: what else of this model would be measured there is not run, the
    other models and modes are. A model that could not be built is not built again.
    """
    if here := [mode for mode in modes if mode != "graph"]:
        for found in _one_model(recipe, common, here, device, console):
            yield found
            if not any(map(was_built, found)):
                return
    if "graph" in modes:
        place = device if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        with console.status(f"{common['model']}, graph"):
            yield apart({**common, "mode": "graph"}, _graphs, common, place, torch.get_num_threads())


def apart(common: Record, function: Callable[..., list[Record]], *args: Any) -> list[Record]:
    """Call a function that gives records in a process of its own; what ends that process is a record too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        try:
            return processes.submit(function, *args).result()
        except Exception as error:
            return [{**common, "variant": "all", "error": one_line(error)}]


def _graphs(common: Record, device: str, threads: int) -> list[Record]:
    torch.set_num_threads(threads)
    torch.cuda.set_device(device)
    parts = _one_model(published.MODELS[common["model"]], common, ["graph"], device, Console(quiet=True))
    return [record for part in parts for record in part]


def _one_model(
    recipe: Published, common: Record, modes: Sequence[str], device: str, console: Console
) -> Iterator[list[Record]]:
    """Yield the records of one model, mode by mode, in memory that is free again afterwards."""
    try:
        model, inputs = recipe.build(common["size"], getattr(torch, common["dtype"]), device)
    except Exception as error:  # too little memory, say, or a transformers that lacks the model
        yield [{**common, "variant": "all", "error": one_line(error)}]
        return
    common["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    common["prompt_tokens"] = inputs["input_ids"].shape[1]
    for mode in modes:
        shown = f"{common['model']}, {mode}"
        yield [{**common, "mode": mode, **row} for row in _one_mode(recipe, model, inputs, mode, shown, console)]
        _free(device)
    del model, inputs
    _free(device)


def _one_mode(
    recipe: Published, model: nn.Module, inputs: dict[str, Tensor], mode: str, shown: str, console: Console
) -> list[Record]:
    with console.status(shown) as status:
        try:
            return measure(recipe, model, inputs, mode, lambda what: status.update(f"{shown}, {what}"))
        except Exception as error:
            return [{"variant": "all", "error": one_line(error)}]


def _free(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def chosen_dtype(dtype: torch.dtype | None, device: str) -> torch.dtype:
    """Return the dtype of weights and activations.

    Raises:
        CommandError: for float16 on a CPU, where models run in float32 or bfloat16.
    """
    if device == "cpu" and dtype == torch.float16:
        raise CommandError("no model runs in float16 on a CPU: take --dtype float32 or bfloat16")
    return dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


def chosen_modes(names: Sequence[str], device: str) -> tuple[str, ...]:
    """Return the modes of these names, or without a name all that the device has.

    Raises:
        CommandError: for a graph without a GPU.
    """
    if device == "cpu" and "graph" in names:
        raise CommandError("mode graph: CUDA graphs need a GPU")
    return tuple(names) or tuple(mode for mode in MODES if device != "cpu" or mode != "graph")


def was_built(record: Record) -> bool:
    """Return whether there was a model: the record of one that could not be built is an error of no mode."""
    return "mode" in record or "error" not in record


def failed(records: list[Record]) -> bool:
    """Return whether something of ours failed: what the original did as well, in the same mode and words, is not ours.

    Neither is what was not run, nor one model among others that could not be built.
    """
    originals = {(r["model"], r.get("mode")): r.get("error") for r in records if r["variant"] == "original"}
    errors = [r for r in records if "error" in r and r["error"] != NOT_RUN and was_built(r)]
    return any(r["error"] != originals.get((r["model"], r["mode"])) for r in errors)


def verdict(console: Console, records: list[Record]) -> int:
    """Return the exit code: 1 where something of ours failed, or, which is said, where there was no model at all."""
    if records and not any(map(was_built, records)):
        console.print("no model could be built, so none was measured", style="red")
        return 1
    return int(failed(records))


if __name__ == "__main__":  # as it was called once
    from vlmfast.benchmarks.command import moved

    counts = "--count" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--count"]
    sys.exit(moved("launches" if counts else "models"))
