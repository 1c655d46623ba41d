"""Parameters of the generated tests: every op, backend, device and dtype, and calls in awkward memory layouts."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlmfast
from vlmfast.cases import Samples
from vlmfast.registry import OPS, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("native", "triton", "emulated", "torch")
PLACES = [("cpu", name) for name in BACKENDS]
PLACES += [("cuda", name) for name in ("native", "triton", "torch")]
# Backends that execute, on the CPU, kernels as compiled for a GPU: Triton's, and CUDA's where nvcc is. See tests/ptx/.
# `make test-ptx` runs them.
COMPILED = [("cpu", "ptx_sm_90"), ("cpu", "ptx_sm_80"), ("cpu", "ptx_sm_100"), ("cpu", "ptx_nvcc")]
EVERY_SAMPLE = {("ptx_sm_90", torch.bfloat16), ("ptx_nvcc", torch.bfloat16)}  # what calls all; see `few_calls`
# How many samples share one call elsewhere. But for matrix products these targets repeat much of what sm_90 has.
SHARING = {"ptx_sm_90": 2, "ptx_nvcc": 2, "ptx_sm_80": 3, "ptx_sm_100": 4}
# Backends whose absence is a failure, not a skip. On a machine with a GPU Triton's interpreter is off, so that the CPU
# has no Triton backend; nothing is required there.
REQUIRED = os.environ.get("VLMFAST_TEST_REQUIRE", "").split(",") if not torch.cuda.is_available() else []


def _marks(device: str, backend: str, op: Op) -> list:
    if device == "cuda":
        return [pytest.mark.gpu]
    if (device, backend) not in COMPILED:
        return []
    # nvcc compiles a family at once: other processes would wait for it
    together = [pytest.mark.xdist_group(f"nvcc-{op.family}")] if backend == "ptx_nvcc" else []
    return [pytest.mark.ptx, *together]


def _parameters(*axes: Any) -> list:
    """Make one pytest parameter per combination, marked ``gpu`` on a GPU and ``ptx`` for kernels as compiled for one.

    Triton's interpreter takes a minute per dtype, and in float16 would run the same code as in bfloat16. Nor is there
    float16 for sm_80; sm_90 has it. For sm_100 Triton compiles what it does for sm_90 but for matrix products, so there
    bfloat16 is enough.
    """
    found = []
    for values in itertools.product(*axes):
        if torch.float16 in values and (("cpu", "triton") in values or ("cpu", "ptx_sm_80") in values):
            continue
        if ("cpu", "ptx_sm_100") in values and (torch.float16 in values or torch.float32 in values):
            continue
        device, backend = next(v for v in values if isinstance(v, tuple))
        op = next(v for v in values if isinstance(v, Op))
        names = [
            v.name if isinstance(v, Op) else str(v).removeprefix("torch.") for v in values if not isinstance(v, tuple)
        ]
        marks = _marks(device, backend, op)
        found.append(pytest.param(*values, marks=marks, id="-".join([*names, device, backend])))
    return found


DIFFERENTIABLE = [op for op in OPS.values() if op.differentiable]
PRIMITIVE = [op for op in OPS.values() if op.compose is None]  # not composed of other ops
REPLACING = [op for op in OPS.values() if op.cases.upstream is not None]  # Hugging Face has code for it


def each(ops: Iterable[Op]) -> list:
    """Make one pytest parameter per op."""
    return [pytest.param(op, id=op.name) for op in ops]


def each_traced(ops: Iterable[Op]) -> list:
    """One pytest parameter per op, of which all but the first of each kind are left to `make test-thorough`.

    For tests of tracers and exporters: what they meet is the registry's code, which is the same for ops of one kind.
    """
    found, kinds = [], set()
    for op in ops:
        kind = (op.compose is None, op.differentiable, "cpu" in op.inlined, op.detached)
        marks = [pytest.mark.thorough] if kind in kinds else []
        kinds.add(kind)
        found.append(pytest.param(op, id=op.name, marks=marks))
    return found


def each_place(ops: Iterable[Op], *axes: Any) -> list:
    """Make one pytest parameter per op, device and backend, and per value of further axes."""
    return _parameters(ops, PLACES, *axes)


def each_as_compiled(*axes: Any) -> list:
    """Make one pytest parameter per op with kernels of its own, backend of `COMPILED`, and value of other axes."""
    return _parameters(PRIMITIVE, COMPILED, *axes)


EACH_OP = each(OPS.values())


def launches_of(op: Op, backend: str) -> int:
    """Return how many kernels a call launches."""
    number = op.cases.launches
    return number if isinstance(number, int) else number[backend]


def family(name: str) -> list[Op]:
    """List the ops of one family."""
    return [op for op in OPS.values() if op.family == name]


def with_cases(op: Op, **changes: Any) -> Op:
    """Return the op with other cases."""
    return dataclasses.replace(op, _cases=dataclasses.replace(op.cases, **changes))


def require(op: Op, backend: str) -> None:
    """Skip the test, with the reason, where the backend is missing; fail it where the backend is `REQUIRED`."""
    found = op.backend(backend)
    if found.absent:
        assert backend not in REQUIRED, f"{backend} must be there: {found.absent}"
        pytest.skip(found.absent)


def runnable(op: Op, backend: str, candidates: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return the calls that the backend accepts. It may refuse some, such as tensors of several dtypes, but not all."""
    require(op, backend)
    reasons = [(op.backend(backend).unsupported(*args), args) for args in candidates]
    accepted = [args for reason, args in reasons if reason is None]
    if not accepted:
        assert backend not in REQUIRED, reasons[0][0]
        pytest.skip(reasons[0][0])
    return accepted


def run(op: Op, backend: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of the op's function on one backend."""
    with vlmfast.use(backend):
        return outputs(op.function(*args))


def outputs(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the same call with its floating-point tensors in float64."""
    return tuple(a.double() if is_float(a) else a for a in args)


# ---- layouts: each takes a tensor and returns an equal one with another memory layout ----


def _filling(x: Tensor) -> float:
    """Return a value that a kernel must not read: NaN; True for a mask, a large number for an index."""
    return float("nan") if x.is_floating_point() else torch.iinfo(torch.int32).max


def _in_nan(x: Tensor, size: int, stride: tuple[int, ...], offset: int) -> Tensor:
    """Copy ``x`` into a view of a buffer that holds `_filling` everywhere else."""
    buffer = torch.full((size + 64,), _filling(x), dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, stride, offset).copy_(x)


def contiguous(x: Tensor) -> Tensor:
    return x


def offset(x: Tensor) -> Tensor:
    """Start one element behind an aligned address."""
    return _in_nan(x, x.numel() + 1, x.contiguous().stride(), 1)


def padded(x: Tensor, by: int = 16) -> Tensor:
    """Put NaN between the rows, as in a slice of a wider tensor."""
    if x.dim() < 2:
        return offset(x)
    wide = x.shape[-1] + by
    stride = torch.empty(*x.shape[:-1], wide, device="meta").stride()
    return _in_nan(x, x.numel() // max(x.shape[-1], 1) * wide, stride, 0)


def oddly_padded(x: Tensor) -> Tensor:
    """Start rows at addresses that are not aligned for vector loads."""
    return padded(x, 3)


def transposed(x: Tensor) -> Tensor:
    """Give leading dimensions strides that no single row stride describes, such as heads before tokens."""
    if x.dim() < 2 or (x.dim() < 3 and x.is_floating_point()):
        return padded(x)
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x: Tensor) -> Tensor:
    """Give the last dimension a stride of two."""
    return torch.stack([x, torch.full_like(x, _filling(x))], -1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    """Repeat the first row with a stride of zero, except in masks and indexes, which would no longer fit."""
    return x[:1].expand(x.shape) if x.dim() > 1 and x.is_floating_point() else x


LAYOUTS = (contiguous, offset, padded, oddly_padded, transposed, every_other, expanded)
# (layout of the first argument, step to the layout of each next argument). With different layouts, a kernel that uses
# the strides of another argument is found out.
AWKWARD = [*((first, 0) for first in range(1, len(LAYOUTS))), (1, 1), (2, 1)]


def laid_out(sample: tuple[Any, ...], first: int, step: int) -> tuple[Any, ...]:
    """Return a sample in a layout of `AWKWARD`; (0, 0) is as it is."""
    layouts = (LAYOUTS[(first + step * index) % len(LAYOUTS)] for index in range(len(sample)))
    return tuple(layout(a) if is_tensor(a) else a for a, layout in zip(sample, layouts, strict=True))


def calls(op: Op, device: str, dtype: torch.dtype, turns: Iterable[int] = range(3)) -> Samples:
    """Yield every sample of the op as it is, and in the next of the awkward layouts for each of ``turns``."""
    for position, sample in enumerate(op.cases.samples(device, dtype)):
        yield laid_out(sample, 0, 0)
        yield from (laid_out(sample, *AWKWARD[(3 * position + turn) % len(AWKWARD)]) for turn in turns)


def few_calls(op: Op, place: tuple[str, str], dtype: torch.dtype) -> Samples:
    """Yield the calls of a place where one takes a second: each sample once, every second one in a layout.

    At `COMPILED` places, where most calls compile a kernel of their own, only `EVERY_SAMPLE` has all: otherwise one of
    two to four, in `SHARING`, and another dtype has another one. The calls of all ops together meet every layout at
    each place.
    """
    turn, at = DTYPES.index(dtype), COMPILED.index(place) if place in COMPILED else 0
    layout = turn + crc32(op.name.encode())  # another first one for each op
    samples = op.cases.samples(place[0], dtype)
    if place in COMPILED and (place[1], dtype) not in EVERY_SAMPLE:
        # not the even or the odd ones: samples alternate between small and large numbers, for example
        step = SHARING[place[1]]
        own = (at + (dtype != torch.float32)) % step
        samples = (sample for index, sample in enumerate(samples) if (index + index // step) % step == own)
    for number, sample in enumerate(samples):
        plain = (number + turn // 2 + at) % 2 == 0
        yield laid_out(sample, *((0, 0) if plain else AWKWARD[(number // 2 * 3 + layout) % len(AWKWARD)]))


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


# Operators that make the host wait for the device and cannot be captured in a graph: the shape of their result, or the
# next step of the host, depends on values.
WAITING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::masked_select", "aten::is_nonzero"}
