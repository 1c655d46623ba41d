"""Steps of training, with fewer visual tokens or patched alone: ``python -m vlmfast bench training [model ...]``.

A step is forward, loss, backward and gradient descent on a batch of two prompts with an image each. Copies of one model
take it in turns:

- ``full``: unpatched, all tokens;
- ``compressed``: unpatched, on prompts that `vlmfast.compress_inputs` has shortened;
- ``reduced``: patched with ``reduce``.

With ``--all-tokens`` they are ``unpatched`` and ``patched``. The last two compute the same in real arithmetic, and so
do these, which are not timed:

- ``prompts swapped``, ``prompts one by one`` and ``neurons permuted``: as the unpatched one, summed in other orders. In
  half precision a step moves weights by roundings, so that any two orders soon come apart: how far these do is how far
  the patched one may;
- ``float32``, of 16-bit models with all tokens: their arithmetic in float32, with weights rounded to 16 bits each step.
  From it come the errors of each copy's first gradients; those of copies that compute the same differ by a fifth.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, cast

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
        gradients: of the first step, by the names of their parameters, in the memory of the host; only if ``rounded``.
        error: of the first step's gradients, relative to the norm of those of ``exact``; None without them.
        saved_bytes: of all tensors that the first forward has kept for its backward, without the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *batches: Batch,
        compress: Any = None,
        patch: dict[str, Any] | None = None,
        rounded: torch.dtype | None = None,
        exact: dict[str, Tensor] | None = None,
    ) -> None:
        self.model: Any = twin(copy.deepcopy(model), patch).train()
        self.batches, self.compress, self.rounded, self.exact = batches, compress, rounded, exact
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.error: float | None = None
        self.saved_bytes = 0

    def step(self) -> None:
        """Take one timed step."""
        synchronize = synchronizer(self.batches[0]["input_ids"].device.type)
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
        total = 0.0
        for batch in self.batches:
            with contextlib.nullcontext() if self.losses else self._counting():
                if self.compress is not None:
                    batch = vlmfast.compress_inputs(self.model, batch, self.compress)
                loss = self.model(**batch).loss / len(self.batches)
            loss.backward()
            total += loss.item()
        if not self.losses:
            self._compare_gradients()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dtype = self.rounded or parameter.dtype
                    parameter.copy_(parameter.to(dtype) - RATE * parameter.grad.to(dtype))
                    parameter.grad = None
        self.losses.append(total)

    def _compare_gradients(self) -> None:
        found = {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}
        if self.rounded is not None:
            self.gradients = {name: grad.to("cpu", copy=True) for name, grad in found.items()}
        if self.exact is not None:
            far = sum(torch.dist(found[name].cpu().float(), grad).item() ** 2 for name, grad in self.exact.items())
            self.error = (far / sum(grad.norm().item() ** 2 for grad in self.exact.values())) ** 0.5


def permuted(model: nn.Module) -> nn.Module:
    """Copy the model with the neurons of its gated MLPs in another order, which changes only the order of sums."""
    generator, result = torch.Generator().manual_seed(0), copy.deepcopy(model)
    for module in result.modules():
        layers = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            gate, up, down = (cast("nn.Linear", layer) for layer in layers)
            order = torch.randperm(gate.out_features, generator=generator).to(gate.weight.device)
            for values, dim in ((gate.weight, 0), (gate.bias, 0), (up.weight, 0), (up.bias, 0), (down.weight, 1)):
                if values is not None:
                    values.data = values.data.index_select(dim, order)
    return result


def measure(
    recipe: Published, size: str, dtype: torch.dtype, device: str, steps: int, out: Console, all_tokens: bool = False
) -> list[Record]:
    """Train all variants of one model for so many steps; return a record of each."""
    model, inputs = recipe.build(size, dtype, device)
    batch, swapped = batch_of(inputs), batch_of(inputs, (1, 0))
    method = None if all_tokens else recipe.method
    base, ours = ("unpatched", "patched") if method is None else ("compressed", "reduced")
    same: dict[str, Any] = {"compress": method}
    if dtype == torch.float32 or method is not None:  # in float32 a method may choose other tokens
        exact = None
    else:
        wide = {name: _widened(value) for name, value in batch.items()}
        reference = Trained(copy.deepcopy(model).float(), wide, rounded=dtype, **same)
        _train({"float32": reference}, steps, out)
        exact = same["exact"] = reference.gradients
    timed = {} if method is None else {"full": Trained(model, batch)}
    timed[base] = Trained(model, batch, **same)
    timed[ours] = Trained(model, batch, patch={} if method is None else {"reduce": method}, exact=exact)
    _train(timed, steps, out)
    against = timed[base]
    records = [
        {"variant": name, **_times(trained, against), **_numbers(trained, against)} for name, trained in timed.items()
    ]
    one_by_one = [_half(batch, index) for index in (0, 1)]
    orders: dict[str, Callable[[], Trained]] = {
        "prompts swapped": lambda: Trained(model, swapped, **same),
        "prompts one by one": lambda: Trained(model, *one_by_one, **same),
        "neurons permuted": lambda: Trained(permuted(model), batch, compress=method),
    }
    for name, make in orders.items():
        other = make()  # one at a time, for their memory
        _train({name: other}, steps, out)
        records.append({"variant": name, **_numbers(other, against)})
    if exact is not None:
        records.append({"variant": "float32", **_numbers(reference, against)})
    return records


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _half(batch: Batch, index: int) -> Batch:
    """Return the batch of one of the two prompts."""
    return {name: value.chunk(2)[index] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _train(variants: dict[str, Trained], steps: int, out: Console) -> None:
    """Take all steps of some variants in turns, then free their models."""
    for _ in track(range(steps), ", ".join(variants), console=out, transient=True, disable=not out.is_terminal):
        for variant in variants.values():
            variant.step()
    for variant in variants.values():
        variant.model = variant.exact = None


def _times(trained: Trained, against: Trained) -> Record:
    """Return the times of one variant; the first step, which counts and may compile, is not in them."""
    seconds, others = trained.seconds[1:], against.seconds[1:]
    return {
        "step_ms": 1e3 * median(seconds),
        "range": (max(seconds) - min(seconds)) / median(seconds),
        "speedup": median(b / a for a, b in zip(seconds, others, strict=True)),
        "saved_mb": trained.saved_bytes / 1e6,
    }


def _numbers(trained: Trained, against: Trained) -> Record:
    apart = [abs(a - b) / abs(b) for a, b in zip(trained.losses, against.losses, strict=True)]
    return {
        "first_loss": trained.losses[0],
        "last_loss": trained.losses[-1],
        "losses_apart": max(apart),  # largest relative difference of a step's loss
        "gradient_error": trained.error,
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
            how = size, getattr(torch, options.dtype), str(device), options.steps, out, options.all_tokens
            found = measure(published.MODELS[name], *how)
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
    columns = {
        "step_ms": ("step, ms", "{:.0f}"),
        "range": ("range", "{:.0%}"),
        "speedup": ("speed-up", "{:.2f}"),
        "saved_mb": ("saved, MB", "{:.1f}"),
        "first_loss": ("first loss", "{:.4f}"),
        "last_loss": ("last loss", "{:.4f}"),
        "losses_apart": ("apart", "{:.1e}"),
        "gradient_error": ("gradients' error", "{:.2e}"),
    }
    rows = []
    for record in (record for record in records if "error" not in record):
        values = [(record.get(key), shape) for key, (_, shape) in columns.items()]
        texts = ["" if value is None else shape.format(value) for value, shape in values]
        rows.append((None, [record["model"], record["variant"], *texts]))
    report.show_table(console, ("model", "", *(head for head, _ in columns.values())), 2, rows)
    report.show_errors(console, (f"{record['model']}: {record['error']}" for record in records if "error" in record))
