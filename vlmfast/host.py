"""Values that the host needs to know: asked for once, and what it makes of them sent without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vlmfast.torch_internals import is_jit_tracing

T = TypeVar("T")


def is_traced() -> bool:
    """Tell whether this code runs once for a graph that runs again without it."""
    return bool(torch.compiler.is_compiling() or is_jit_tracing())


def notices_writes(tensor: Tensor) -> bool:
    """Tell whether a write to the tensor changes its version, so that what was made of its values can be kept.

    Inference tensors do not count their versions, and a traced or captured graph runs again without this code. The
    memory of a CPU tensor may be that of an array, and asking for its values is no wait.
    """
    if tensor.is_cpu or tensor.is_inference() or is_traced():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def kept(tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
    """Return what ``make`` makes of a tensor: once for its values, where writes to it are noticed.

    It is kept on the tensor, which no two calls share unless they are given the same one.
    """
    if not notices_writes(tensor):
        return make(tensor)
    version, value = getattr(tensor, name, (None, None))
    if version != tensor._version:
        value = make(tensor)
        keep(tensor, name, value)
    return value  # type: ignore[return-value]


def keep(tensor: Tensor, name: str, value: object) -> None:
    """Keep on a tensor what is known of its values, for `kept`."""
    if notices_writes(tensor):
        setattr(tensor, name, (tensor._version, value))


def on_host(tensor: Tensor) -> Tensor:
    """Return what a tensor holds on the host, kept on it: the sizes of images, which several modules are given."""
    return tensor if tensor.is_cpu else kept(tensor, "_on_host", _copied)


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):  # another call may have gradients
        return to_host([tensor])[0]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host with one wait for each device: the copies of one stream end in their order."""
    last = {tensor.device: number for number, tensor in enumerate(tensors) if tensor.numel()}
    return [tensor.to("cpu", non_blocking=number != last.get(tensor.device)) for number, tensor in enumerate(tensors)]


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy tensors to a device; those of the host without waiting for it."""
    if device.type == "cuda":
        tensors = tuple(tensor.pin_memory() if tensor.is_cpu else tensor for tensor in tensors)
    return [tensor.to(device, non_blocking=device.type != "cpu") for tensor in tensors]
