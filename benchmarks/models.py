"""Whole models: ``python -m vlmfast.benchmarks.models [model ...] [--full] [--device cpu|cuda] [--json FILE]``.

Each model answers one prompt with one image, as it is, patched, and with its visual tokens reduced: one prefill (the
vision tower, the reduction and the whole prompt), then steps of greedy decoding. The weights are random, which changes
no time. Without ``--full`` the models are scaled down to run on a CPU, with as many tokens. ``--count`` times nothing
and counts kernel launches and host synchronisations instead, on any machine.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vlmfast.benchmarks import launches, report
from vlmfast.benchmarks.forwards import variants
from vlmfast.benchmarks.modes import MODES, NOT_RUN, Contender, median, prepare
from vlmfast.benchmarks.published import MODELS, Published, chosen
from vlmfast.console import CommandError, console, one_line, table, writable

ROUNDS = {"cpu": 3, "cuda": 10}
EAGER = "eager original"  # runs along in every mode
LEGEND = """ms: median of the rounds; range: from shortest to longest, over the median; x: median of the rounds' ratios
compile is of the language model alone; where the host waits in a prefill, it runs as in eager mode (no graph)"""
DOES = {"eager": "a first answer", "compile": "compiling, which takes minutes on a CPU", "graph": "capturing"}
Record = dict[str, Any]
Save = Callable[[list[Record]], None]


def measure(
    published: Published,
    model: nn.Module,
    inputs: dict[str, Tensor],
    mode: str,
    doing: Callable[[str], None] = lambda what: None,
) -> list[Record]:
    """All variants of one model in one mode, in turns, so that a slow spell of the machine hits each alike.

    Args:
        published: what the model was built of.
        model: left as it is.
        inputs: of its prompt.
        mode: one of `MODES`.
        doing: is told what is done next.

    Returns:
        One record for each variant; ``error`` in it where the variant has no time.
    """
    wanted = {name: (patch, mode) for name, patch in variants(published).items()}
    if mode != "eager":
        wanted[EAGER] = None, "eager"
    contenders = {name: Contender(model, inputs, patch) for name, (patch, _) in wanted.items()}
    for name, (patch, how) in wanted.items():
        doing(f"{name}: {DOES[how]}")
        original = contenders["original"] if patch is not None and "reduce" not in patch else None
        prepare(contenders[name], how, original)
        if contenders[name].spoils:
            for other in contenders.values():
                other.error = other.error or NOT_RUN
            break
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    rounds = ROUNDS[inputs["input_ids"].device.type]
    for index in range(rounds):
        doing(f"round {index + 1} of {rounds}")
        for name, contender in contenders.items():
            if contender.error is None:
                contender.time(times[name])
    times.setdefault(EAGER, times["original"])
    return [{"variant": name, **_row(contenders[name], name, times)} for name in variants(published)]


def _row(contender: Contender, variant: str, times: dict[str, list[tuple[float, float]]]) -> Record:
    """What is written down of one contender; ratios are medians of the rounds' ratios."""
    if contender.error is not None:
        return {"error": contender.error}
    row: Record = dict(contender.facts)
    for index, part in enumerate(("prefill", "decode")):
        taken = [pair[index] for pair in times[variant]]
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
        CommandError: for what is unknown, or not to be had on this device.
    """
    models = chosen(names)
    wanted = chosen_modes(modes, device)
    dtype = chosen_dtype(dtype, device)
    size = "full" if (device != "cpu" if full is None else full) else "small"
    start = time.monotonic()
    records: list[Record] = []
    for name, published in models.items():
        if records and budget is not None and time.monotonic() - start > budget:
            console.print(f"the budget of {budget:g} s is spent: {name} and what follows it were not measured")
            break
        common = {"model": name, "size": size, "dtype": str(dtype).removeprefix("torch.")}
        if not console.is_terminal:  # nobody sees the status there
            console.print(f"{', '.join(common.values())}: {', '.join(wanted)}")
        for found in _all_modes(published, common, wanted, device, console):
            records += found
            save(records)
    return records


def _all_modes(
    published: Published, common: Record, modes: Sequence[str], device: str, console: Console
) -> Iterator[list[Record]]:
    """The records of one model, mode by mode; the graph in a process of its own.

    A capture that fails leaves the current stream, the allocator and the random generator of torch in states that
    nothing mends. With the process they are gone: what else of this model would be measured there is not run, the
    other models and modes are. A model that could not be built is not built again.
    """
    if here := [mode for mode in modes if mode != "graph"]:
        for found in _one_model(published, common, here, device, console):
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
    parts = _one_model(MODELS[common["model"]], common, ["graph"], device, Console(quiet=True))
    return [record for part in parts for record in part]


def _one_model(
    published: Published, common: Record, modes: Sequence[str], device: str, console: Console
) -> Iterator[list[Record]]:
    """The records of one model, mode by mode, in memory that is free again afterwards."""
    try:
        model, inputs = published.build(common["size"], getattr(torch, common["dtype"]), device)
    except Exception as error:  # too little memory, say, or a transformers that lacks the model
        yield [{**common, "variant": "all", "error": one_line(error)}]
        return
    common["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    common["prompt_tokens"] = inputs["input_ids"].shape[1]
    for mode in modes:
        shown = f"{common['model']}, {mode}"
        yield [{**common, "mode": mode, **row} for row in _one_mode(published, model, inputs, mode, shown, console)]
        _free(device)
    del model, inputs
    _free(device)


def _one_mode(
    published: Published, model: nn.Module, inputs: dict[str, Tensor], mode: str, shown: str, console: Console
) -> list[Record]:
    with console.status(shown) as status:
        try:
            return measure(published, model, inputs, mode, lambda what: status.update(f"{shown}, {what}"))
        except Exception as error:
            return [{"variant": "all", "error": one_line(error)}]


def _free(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def chosen_dtype(dtype: torch.dtype | None, device: str) -> torch.dtype:
    """That of weights and activations.

    Raises:
        CommandError: for float16 on a CPU, where models run in float32 or bfloat16.
    """
    if device == "cpu" and dtype == torch.float16:
        raise CommandError("no model runs in float16 on a CPU: take --dtype float32 or bfloat16")
    return dtype or (torch.float32 if device == "cpu" else torch.bfloat16)


def chosen_modes(names: Sequence[str], device: str) -> tuple[str, ...]:
    """The modes of these names; all that the device has where there is none.

    Raises:
        CommandError: for a name that is not known, and for a graph without a GPU.
    """
    if unknown := [name for name in names if name not in MODES]:
        raise CommandError(f"unknown mode {', '.join(unknown)}; known: {', '.join(MODES)}")
    if device == "cpu" and "graph" in names:
        raise CommandError("mode graph: CUDA graphs need a GPU")
    if device != "cpu" and not torch.cuda.is_available():
        raise CommandError(f"device {device}: torch sees no GPU")
    return tuple(names) or tuple(mode for mode in MODES if device != "cpu" or mode != "graph")


def was_built(record: Record) -> bool:
    """Whether there was a model: the record of one that could not be built is an error of no mode."""
    return "mode" in record or "error" not in record


def failed(records: list[Record]) -> bool:
    """Whether something of ours failed: what the original did as well, in the same mode and words, is not ours.

    Neither is what was not run, nor one model among others that could not be built.
    """
    originals = {(r["model"], r.get("mode")): r.get("error") for r in records if r["variant"] == "original"}
    errors = [r for r in records if "error" in r and r["error"] != NOT_RUN and was_built(r)]
    return any(r["error"] != originals.get((r["model"], r["mode"])) for r in errors)


def verdict(console: Console, records: list[Record]) -> int:
    """The exit code of a run: 1 where something of ours failed, or where there was no model at all, which is said."""
    if records and not any(map(was_built, records)):
        console.print("no model could be built, so none was measured", style="red")
        return 1
    return int(failed(records))


def show(console: Console, records: list[Record]) -> None:
    """One table; speed-ups are over the original in the same mode, and over the original in eager mode."""
    names = [head for part in ("prefill ms", "token ms") for head in (part, "range", "x original", "x eager")]
    names += ["KV MB", "peak MB"]
    lines = table("model", "mode", "", *names)
    for column in lines.columns[3:]:
        column.justify = "right"
    previous, errors = None, []
    for record in records:
        group = (record["model"], record.get("mode", ""))
        heading = ("", "") if group == previous else group
        previous = group
        if "error" in record:
            errors.append(f"{' '.join(group)} {record['variant']}: {record['error']}")
            lines.add_row(*heading, record["variant"], "no time", style="red")
            continue
        cells = []
        for part in ("prefill", "decode"):
            note = report.prefill_note(record) if part == "prefill" else ""
            cells.append(f"{record[f'{part}_ms']:.2f}{note}")
            spread = record.get(f"{part}_range")  # earlier runs have none
            cells.append("" if spread is None else f"{spread:.0%}")
            ratios = (record.get(f"{part}_{kind}") for kind in ("speedup", "over_eager"))
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells.append(f"{record['cache_bytes'] / 1e6:.1f}")
        cells.append(f"{record['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in record else "")
        lines.add_row(*heading, record["variant"], *cells)
    console.print(lines)
    if records:
        console.print(f"{records[0]['size']} sizes, {records[0]['dtype']}")
        console.print(LEGEND, style="dim", highlight=False)
    for error in errors:
        console.print(error, style="red", markup=False, soft_wrap=True)


def main() -> int:
    """Run the models that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m vlmfast.benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"of: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--full", action="store_true", default=None, help="the published sizes (default on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--modes", default="", help=f"of: {','.join(MODES)} (default: all that the device has)")
    parser.add_argument("--count", action="store_true", help="count launches and host synchronisations; no times")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no other model after so many seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", type=Path, help="write the records there, after each")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    out = console(150)
    environment = functools.cache(lambda: report.environment("cpu" if options.count else options.device))

    def save(records: list[Record]) -> None:
        if options.json:
            report.write(options.json, {"environment": environment(), "records": records})

    try:
        writable(options.json)
        if options.count:
            counts = launches.run(options.models, out, save)
            launches.show(out, counts)
            return verdict(out, counts)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        wanted = [mode for mode in options.modes.split(",") if mode]
        settings = {"full": options.full, "modes": wanted, "budget": options.budget}
        records = run(options.models, device=options.device, dtype=dtype, console=out, save=save, **settings)
    except CommandError as error:
        parser.error(str(error))
    show(out, records)
    return verdict(out, records)


if __name__ == "__main__":
    sys.exit(main())
