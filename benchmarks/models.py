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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vlmfast.benchmarks import launches, report
from vlmfast.benchmarks.forwards import variants
from vlmfast.benchmarks.modes import MODES, Contender, median, prepare
from vlmfast.benchmarks.published import MODELS, Published, chosen
from vlmfast.console import CommandError, one_line, table

ROUNDS = {"cpu": 3, "cuda": 10}
EAGER = "eager original"  # runs along in every mode
Record = dict[str, Any]
Save = Callable[[list[Record]], None]


def measure(published: Published, model: nn.Module, inputs: dict[str, Tensor], mode: str) -> list[Record]:
    """All variants of one model in one mode, in turns, so that a slow spell of the machine hits each alike.

    Args:
        published: what the model was built of.
        model: left as it is.
        inputs: of its prompt.
        mode: one of `MODES`.

    Returns:
        One record for each variant; ``error`` in it where the variant has no time.
    """
    wanted = {name: (patch, mode) for name, patch in variants(published).items()}
    if mode != "eager":
        wanted[EAGER] = None, "eager"
    contenders = {name: prepare(model, inputs, *choice) for name, choice in wanted.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(ROUNDS[inputs["input_ids"].device.type]):
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
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    size = "full" if (device != "cpu" if full is None else full) else "small"
    start = time.monotonic()
    records: list[Record] = []
    for name, published in models.items():
        if records and budget is not None and time.monotonic() - start > budget:
            console.print(f"the budget of {budget:g} s is spent: {name} and what follows it were not measured")
            break
        common = {"model": name, "size": size, "dtype": str(dtype).removeprefix("torch.")}
        for found in _one_model(published, common, wanted, device, console):
            records += found
            save(records)
    return records


def _one_model(
    published: Published, common: Record, modes: Sequence[str], device: str, console: Console
) -> Iterator[list[Record]]:
    """The records of one model, mode by mode, in memory that is free again afterwards."""
    model = inputs = None
    try:
        model, inputs = published.build(common["size"], getattr(torch, common["dtype"]), device)
        common["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        common["prompt_tokens"] = inputs["input_ids"].shape[1]
        for mode in modes:
            with console.status(f"{common['model']}, {mode}"):
                rows = measure(published, model, inputs, mode)
            yield [{**common, "mode": mode, **row} for row in rows]
            _free(device)
    except torch.OutOfMemoryError as error:
        yield [{**common, "variant": "all", "error": one_line(error)}]
    finally:
        del model, inputs
        _free(device)


def _free(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


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


def show(console: Console, records: list[Record]) -> None:
    """One table; speed-ups are over the original in the same mode, and over the original in eager mode."""
    names = ("prefill ms", "x original", "x eager", "token ms", "x original", "x eager", "KV MB", "peak MB")
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
            cells.append(f"{record[f'{part}_ms']:.2f}")
            ratios = (record.get(f"{part}_{kind}") for kind in ("speedup", "over_eager"))
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells.append(f"{record['cache_bytes'] / 1e6:.1f}")
        cells.append(f"{record['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in record else "")
        lines.add_row(*heading, record["variant"], *cells)
    console.print(lines)
    if records:
        console.print(f"{records[0]['size']} sizes, {records[0]['dtype']}")
    for error in errors:
        console.print(error, style="red", markup=False, soft_wrap=True)


def main() -> int:
    """Run the models that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m vlmfast.benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"of: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--full", action="store_true", default=None, help="the published sizes (default on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--modes", default="", help=f"of: {','.join(MODES)} (default: all that the device has)")
    parser.add_argument("--count", action="store_true", help="count launches and host synchronisations; no times")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no other model after so many seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", type=Path, help="write the records there, after each")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 130)

    environment = functools.cache(lambda: report.environment("cpu" if options.count else options.device))

    def save(records: list[Record]) -> None:
        if options.json:
            report.write(options.json, {"environment": environment(), "records": records})

    try:
        if options.count:
            launches.show(console, launches.run(options.models, console, save))
            return 0
        chosen_dtype = options.dtype and getattr(torch, options.dtype)
        wanted = [mode for mode in options.modes.split(",") if mode]
        settings = {"full": options.full, "modes": wanted, "budget": options.budget}
        records = run(options.models, device=options.device, dtype=chosen_dtype, console=console, save=save, **settings)
    except CommandError as error:
        parser.error(str(error))
    show(console, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
