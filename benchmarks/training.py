"""Steps of training with fewer visual tokens: ``python -m vlmfast bench training [model ...]``.

A step is forward, loss, backward and gradient descent on a batch of two prompts with an image each. Copies of one model
take it in turns:

- ``full``: unpatched, all tokens;
- ``compressed``: unpatched, on prompts that `vlmfast.compress_inputs` has shortened;
- ``other order``: the same with the two prompts swapped, which sums gradients in another order;
- ``reduced``: patched with ``reduce``.

The last three compute the same in real arithmetic. How far the losses of the two unpatched ones come apart is how far
those of the patched one may.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vlmfast
from vlmfast.benchmarks import published, report
from vlmfast.benchmarks.forwards import twin
from vlmfast.benchmarks.modes import median
from vlmfast.benchmarks.published import IMAGE, VISION_END, Published
from vlmfast.benchmarks.timing import synchronizer, wall_seconds
from vlmfast.console import CommandError, console, one_line, usable_device, writable

RATE = 0.01
AGAINST = "compressed"  # what the others are compared with
REDUCIBLE = [name for name, recipe in published.MODELS.items() if recipe.method is not None]

Batch = dict[str, Any]
Record = dict[str, Any]


def batch_of(inputs: dict[str, Tensor], order: tuple[int, int] = (0, 1)) -> Batch:
    """Make a batch of the prompt and of another one, in this order, with their words as labels."""
    other = dict(inputs)
    words = inputs["input_ids"] > VISION_END
    other["input_ids"] = torch.where(words, inputs["input_ids"] + 1, inputs["input_ids"])
    other["pixel_values"] = inputs["pixel_values"].flip(-1)
    pair = [(inputs, other)[index] for index in order]
    batch: Batch = {name: torch.cat([sample[name] for sample in pair]) for name in inputs}
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    return batch | {"use_cache": False}


class _Kept:
    """A tensor that a graph has kept; it goes with its part of the graph, which may be before the backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Trained:
    """A copy of the model in training, with its losses, the seconds of its steps and the bytes that a step saves.

    Attributes:
        saved_bytes: of all tensors that the first forward has kept for its backward, without the parameters.
    """

    def __init__(self, model: nn.Module, batch: Batch, *, compress: Any = None, reduce: Any = None) -> None:
        self.model: Any = twin(copy.deepcopy(model), None if reduce is None else {"reduce": reduce}).train()
        self.batch, self.compress = batch, compress
        self.device = batch["input_ids"].device
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.saved_bytes = 0

    def step(self) -> None:
        """Take one timed step."""
        synchronize = synchronizer(self.device.type)
        self.seconds.append(wall_seconds(self._descend, 1, synchronize))

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Count `saved_bytes` in the block; every tensor costs the host a call, so no timed step does this."""
        alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Kept:
            alive.add(kept := _Kept(tensor))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield
        storages = {s.data_ptr(): s.nbytes() for s in (kept.tensor.untyped_storage() for kept in alive)}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.saved_bytes = sum(size for place, size in storages.items() if place not in parameters)

    def _descend(self) -> None:
        batch = self.batch
        with contextlib.nullcontext() if self.losses else self._counting():
            if self.compress is not None:
                batch = vlmfast.compress_inputs(self.model, batch, self.compress)
            loss = self.model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
        self.losses.append(loss.item())


def measure(recipe: Published, size: str, dtype: torch.dtype, device: str, steps: int, out: Console) -> list[Record]:
    """Train all variants of one model for so many steps, in turns; return a record of each."""
    model, inputs = recipe.build(size, dtype, device)
    batch, method = batch_of(inputs), recipe.method
    variants = {
        "full": Trained(model, batch),
        AGAINST: Trained(model, batch, compress=method),
        "other order": Trained(model, batch_of(inputs, (1, 0)), compress=method),
        "reduced": Trained(model, batch, reduce=method),
    }
    for _ in track(range(steps), "training", console=out, transient=True, disable=not out.is_terminal):
        for variant in variants.values():
            variant.step()
    return [{"variant": name, **_record(variant, variants[AGAINST])} for name, variant in variants.items()]


def _record(trained: Trained, against: Trained) -> Record:
    """Make the record of one variant; the first step, which counts and may compile, is not in its times."""
    seconds, others = trained.seconds[1:], against.seconds[1:]
    apart = [abs(a - b) / abs(b) for a, b in zip(trained.losses, against.losses, strict=True)]
    return {
        "step_ms": 1e3 * median(seconds),
        "range": (max(seconds) - min(seconds)) / median(seconds),
        f"over_{AGAINST}": median(b / a for a, b in zip(seconds, others, strict=True)),
        "saved_mb": trained.saved_bytes / 1e6,
        "first_loss": trained.losses[0],
        "last_loss": trained.losses[-1],
        "losses_apart": max(apart),  # largest relative difference of a step's loss
    }


def run(options: Namespace) -> int:
    """Train the models that ``options`` names, or all that can be reduced; return 1 if one failed."""
    writable("--json", options.json, make_folder=True)
    if options.steps < 2:
        raise CommandError(f"--steps must be at least 2, as the first one is not timed, got {options.steps}")
    torch.set_num_threads(options.threads)
    out, device, records = console(150), usable_device(options.device), []
    size = options.size or ("small" if device.type == "cpu" else "full")
    for name in options.models or REDUCIBLE:
        try:
            found = measure(
                published.MODELS[name], size, getattr(torch, options.dtype), str(device), options.steps, out
            )
        except Exception as error:  # for example, too little memory: other models may have enough
            found = [{"variant": "all", "error": one_line(error)}]
        records += [{"model": name, "size": size, "dtype": options.dtype, "steps": options.steps, **r} for r in found]
        if options.json is not None:
            environment = report.environment(device.type)
            report.write(options.json, {"environment": environment, "records": records})
    show(out, records)
    return int(any("error" in record for record in records))


def show(console: Console, records: list[Record]) -> None:
    """Print one line per model and variant."""
    rows = []
    for record in (record for record in records if "error" not in record):
        texts = [record["model"], record["variant"], f"{record['step_ms']:.0f}", f"{record['range']:.0%}"]
        texts += [f"{record[f'over_{AGAINST}']:.2f}", f"{record['saved_mb']:.1f}"]
        texts += [f"{record['first_loss']:.4f}", f"{record['last_loss']:.4f}", f"{record['losses_apart']:.1e}"]
        rows.append((None, texts))
    heads = "model", "", "step, ms", "range", f"x {AGAINST}", "saved, MB", "first loss", "last loss", "apart"
    report.show_table(console, heads, 2, rows)
    report.show_errors(console, (f"{record['model']}: {record['error']}" for record in records if "error" in record))
