"""Values that the host needs: copied from the device once and kept, and sent back without a synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vlmfast.torch_internals import is_jit_tracing

T = TypeVar("T")


def is_traced() -> bool:
    """Return whether this code runs under a tracer or a capture, whose graph later runs without it."""
    return bool(torch.compiler.is_compiling() or is_jit_tracing())


def notices_writes(tensor: Tensor) -> bool:
    """Return whether a write to the tensor changes its version, so that results from its values may be kept.

    Inference tensors have no version counter, and a traced or captured graph runs again without this code. CPU tensors
    are excluded too: their memory may be shared with an array, and reading them needs no synchronisation.
    """
    if tensor.is_cpu or tensor.is_inference() or is_traced():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def kept(tensor: Tensor, name: str, make: Callable[[Tensor], T]) -> T:
    """Return what ``make`` computes from a tensor, computed once per version of its values if writes are noticed.

    The result is kept on the tensor object, so only calls that are given the same object share it.
    """
    if not notices_writes(tensor):
        return make(tensor)
    version, value = getattr(tensor, name, (None, None))
    if version != tensor._version:
        value = make(tensor)
        keep(tensor, name, value)
    return value  # type: ignore[return-value]


def keep(tensor: Tensor, name: str, value: object) -> None:
    """Store on a tensor a result from its values, for `kept`."""
    if notices_writes(tensor):
        setattr(tensor, name, (tensor._version, value))


def on_host(tensor: Tensor) -> Tensor:
    """Return the values of a tensor on the host, and keep them on it: several modules ask for the sizes of images."""
    return tensor if tensor.is_cpu else kept(tensor, "_on_host", _copied)


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):  # another call may have gradients
        return to_host([tensor])[0]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host with one wait per device, which suffices because copies of one stream end in order."""
    last = {tensor.device: number for number, tensor in enumerate(tensors) if tensor.numel()}
    return [tensor.to("cpu", non_blocking=number != last.get(tensor.device)) for number, tensor in enumerate(tensors)]


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy tensors to a device, without waiting for copies from the host."""
    if device.type == "cuda":
        tensors = tuple(tensor.pin_memory() if tensor.is_cpu else tensor for tensor in tensors)
    return [tensor.to(device, non_blocking=device.type != "cpu") for tensor in tensors]
