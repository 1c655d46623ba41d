"""Kernel launches and host synchronisations of a forward on a GPU, counted without one.

Every tensor of the model is a tensor on torch's meta device, and beside it lies its twin on the CPU, which holds the
values. So upstream's and our own code take the paths that they take on a GPU (nothing is on the CPU), what has to be
known of values is known, and a copy between host and device is told from a copy within the device.

A launch is an operator that writes on the device: one that returns memory which no argument has, or mutates an
argument, as its schema says, and is no allocation (``empty`` and its kin). Views write nothing. An operator of torch
counts once, although some are several kernels (a sort, ``masked_scatter``, attention that splits the keys): the counts
are lower bounds. An op of this package counts as the kernels and operators that its Triton launcher starts.

A synchronisation is an operator whose result or shape depends on values (by its tags: ``item``, ``equal``, ``nonzero``,
``unique``, ``masked_select``), one that takes a number from a tensor on the device (``masked_fill``), each mask in an
index, and a blocking copy between host and device, either way. ``copy_`` of a number, a list as an index, and one
element set to a number are such copies; ``fill_``, and rows or what a mask chooses set to a number, are none: a launch
takes the number along. All as the CUDA tensors of torch 2.13 do it, not as those on the meta device do. `READS` says
how often operators wait that read several numbers back. What else waits by its tags counts once, which is a lower bound
too: how often ``unique`` waits is up to the sort that it takes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import vlmfast
from vlmfast.registry import OPS, Op

ATEN = torch.ops.aten
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN._unsafe_index}
COPIES = {ATEN._to_copy, ATEN.copy_}
# Operators whose CUDA kernels are launched with a number that they take from a tensor -> which argument that is.
NUMBERS = {
    ATEN.masked_fill: slice(2, 3),
    ATEN.masked_fill_: slice(2, 3),
    ATEN.index_fill: slice(3, 4),
    ATEN.index_fill_: slice(3, 4),
    ATEN.linspace: slice(2),
}
# Operators that read several numbers back -> how many, for their arguments.
READS: dict[Any, Callable[..., int]] = {
    # the sum of the repeats, and whether one is negative
    ATEN.repeat_interleave: lambda repeats, output_size=None: 2 * (output_size is None and repeats.numel() > 0),
    # the least and the largest number, where no range is given
    ATEN.histc: lambda x, bins=100, min=0, max=0, out=None: 2 * (min == max and x.numel() > 0),
    # the largest, and whether one is negative, which no byte is
    ATEN.bincount: lambda x, *_: (1 if x.dtype == torch.uint8 else 2) * (x.numel() > 0),
    # whether a deviation is negative, once more where the result is allocated
    ATEN.normal: lambda mean, std=1.0, *_, out=None, generator=None: (
        (1 if out is not None else 2) * (isinstance(std, Tensor) and std.is_meta and std.numel() > 0)
    ),
    # whether all weights are finite and none is negative, and whether one is not zero
    ATEN.multinomial: lambda weights, samples, replacement=False, out=None, generator=None: (
        2 * (weights.numel() > 0 and (samples == 1 or not replacement))
    ),
}
COLLECTION = 256  # operators between two
ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default
OURS = str(Path(vlmfast.__file__).parent)
ALLOCATIONS = ("empty", "new_empty")
TO_DEVICE = "copy to the device"


@dataclass
class Count:
    """What one forward did.

    Attributes:
        operators: name of an operator -> how many launches.
        waits: where the host waits, and in which operator -> how often.
    """

    operators: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """All launches."""
        return self.operators.total()

    @property
    def syncs(self) -> int:
        """How often the host waits."""
        return self.waits.total()


class Device:
    """A device that computes on the CPU what a GPU would be asked for, and says that it is another one.

    Its tensors are torch's own: no subclass, which code made for a GPU would treat differently.
    """

    def __init__(self) -> None:
        # a storage on the meta device -> whether it is still there, and the storage with its values
        self._storages: dict[int, tuple[StorageWeakRef, UntypedStorage]] = {}

    def put(self, value: Tensor) -> Tensor:
        """A copy of a CPU tensor on this device; they share their values."""
        size = value.untyped_storage().nbytes()
        storage = UntypedStorage(size, device="meta")  # type: ignore[no-untyped-call]
        self._storages[storage._cdata] = StorageWeakRef(storage), value.untyped_storage()  # type: ignore[no-untyped-call]
        return _view(storage, value)

    def has(self, tensor: Tensor) -> bool:
        """Whether it is on this device."""
        return tensor.is_meta and tensor.untyped_storage()._cdata in self._storages

    def values(self, tensor: Tensor) -> Tensor:
        """The values of a tensor on this device, as a CPU tensor."""
        return _view(self._storages[tensor.untyped_storage()._cdata][1], tensor)

    def collect(self) -> None:
        """Free the values of tensors that are gone."""
        for key in [key for key, (weak, _) in self._storages.items() if weak.expired()]:  # type: ignore[no-untyped-call]
            del self._storages[key]

    def move(self, model: nn.Module) -> None:
        """Put the parameters and buffers of a model here; tied ones stay tied."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None and id(value) not in moved:
                        new = self.put(value.detach())
                        moved[id(value)] = nn.Parameter(new, False) if isinstance(value, nn.Parameter) else new
                    tensors[name] = None if value is None else moved[id(value)]  # type: ignore[assignment]

    @contextmanager
    def count(self) -> Iterator[Count]:
        """Count what runs in the block; nothing on this device can run outside of one."""
        found = Count()
        with (
            torch.no_grad(),
            patch.object(torch, "is_autocast_enabled", _no_autocast),
            _Calls(),
            _Operators(self, found),
        ):
            yield found


def _no_autocast(device_type: str = "meta") -> bool:
    """Torch raises when it is asked for the meta device."""
    return False


def _view(storage: UntypedStorage, like: Tensor) -> Tensor:
    """The part of a storage that ``like`` is of its own."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())  # type: ignore[call-overload]


class _Calls(TorchFunctionMode):
    """Functions that go behind the dispatcher's back to a tensor's memory, or do so otherwise for the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy):
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            return ATTENTION(*args[:3])[0]
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            parts = args[1] if isinstance(args[1], tuple) else args[1:2]
            # a number that is set stays on the host, as it does for CUDA tensors alone
            value = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=args[0].dtype) for v in args[2:])
            return func(args[0], tuple(_index(part, args[0]) for part in parts), *value)
        if func is Tensor.new_tensor:
            given = {name: value for name, value in kwargs.items() if value is not None}
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **given}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if isinstance(args[0], Tensor):
                return func(*args, **kwargs)
            device = kwargs.pop("device", None)
            data = tree_map(lambda value: value.item() if isinstance(value, Tensor) else value, args[0])
            made = func(data, *args[1:], **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _index(part: Any, tensor: Tensor) -> Any:
    """A list as an index goes to the tensor's device first."""
    if not isinstance(part, list) or not all(isinstance(number, int) for number in part):
        return part
    made = torch.tensor(part)
    return (made if made.dtype == torch.bool else made.long()).to(tensor.device)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator on the twins of its arguments, and counts."""

    def __init__(self, device: Device, found: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.found, self.operators = device, found, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = dict(kwargs or {}), self.device
        here = [tensor for tensor in _tensors((args, kwargs)) if device.has(tensor)]
        wanted = kwargs.get("device")
        target = bool(here) if wanted is None else torch.device(wanted).type == "meta"
        if func.overloadpacket in (ATEN.copy_, ATEN.fill_):  # the others write where they read
            target = device.has(args[0])
        if reasons := _waits(func, args, kwargs, device, target):
            caller = _caller(sys._getframe(1))
            self.found.waits.update(f"{caller}: {reason}" for reason in reasons)
        arguments: dict[int, Tensor] = {}  # what works in place returns its argument

        def values(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor) or not device.has(value):
                return value
            result = device.values(value)
            arguments[id(result)] = value
            return result

        host_args, host_kwargs = tree_map(values, args), tree_map(values, kwargs)
        output = (_attention if func is ATTENTION else func)(*host_args, **host_kwargs)
        if not target:
            return output
        if func.namespace == "vlmfast":
            self.found.operators.update(op_launches(OPS[func.overloadpacket.__name__], *args, **kwargs))
        elif _writes(func, host_args, host_kwargs, output):
            self.found.operators[str(func.overloadpacket)] += 1
        storages = {device.values(tensor).untyped_storage()._cdata: tensor.untyped_storage() for tensor in here}

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in arguments:
                return arguments[id(value)]
            storage = storages.get(value.untyped_storage()._cdata)
            return device.put(value) if storage is None else _view(storage, value)

        self.operators += 1
        if self.operators % COLLECTION == 0:
            device.collect()
        return tree_map(back, output)


# ---- the rules ----


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether the operator writes memory: of an argument, or some that no argument has."""
    if func.overloadpacket.__name__.startswith(ALLOCATIONS):
        return False
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[index] if index < len(args) else kwargs.get(argument.name))
    given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    written += [tensor for tensor in _tensors(output) if tensor.untyped_storage()._cdata not in given]
    return any(tensor.numel() for tensor in written)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device, target: bool) -> list[str]:
    """Why the host waits for the device; one reason for each time.

    Args:
        func: the operator.
        args: its arguments, in the order of its schema.
        kwargs: those that have to be named.
        device: the device.
        target: the result is on the device.
    """
    packet, given = func.overloadpacket, _tensors((args, kwargs))
    here = [tensor for tensor in given if device.has(tensor)]
    if packet in COPIES:
        return _waiting_copy(packet, args, kwargs, device, target)
    if not here:
        return []
    if packet in INDEXING:
        return _waiting_index(args, device)
    if packet is ATEN.where:
        return [TO_DEVICE] * (len(given) - len(here))
    if numbers := sum(map(device.has, _tensors(args[NUMBERS.get(packet, slice(0))]))):
        return [f"a number for {packet.__name__}"] * numbers
    if packet is ATEN.fill_:
        return [] if target else [f"a number for {packet.__name__}"]
    name = str(packet.__name__).lstrip("_")
    if packet in READS:
        return [name] * READS[packet](*args, **kwargs)
    return [name] if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) else []


def _waiting_copy(
    packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device, target: bool
) -> list[str]:
    """A number that is copied becomes a tensor on the host first. Only pinned memory is written behind its back."""
    into = packet is ATEN.copy_
    source = args[1 if into else 0]
    if (isinstance(source, Tensor) and device.has(source)) == target or not args[0].numel():
        return []
    asked = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    free = asked and (target or not into or args[0].is_pinned())
    return [] if free else [TO_DEVICE if target else "copy to the host"]


def _waiting_index(args: tuple[Any, ...], device: Device) -> list[str]:
    """What is set to a number by one mask is filled; otherwise masks are searched and what is on the host is copied.

    A mask of the host is searched there, and what is found goes through pinned memory, for which nobody waits; where
    values are added, it is copied as any other index is, by dimension.
    """
    indices = [index for index in args[1] if index is not None]
    masks = [index.dtype in (torch.bool, torch.uint8) for index in indices]
    numbers = [value for value in args[2:3] if not device.has(value)]
    accumulate = len(args) > 3 and args[3]
    if numbers and masks == [True] and device.has(indices[0]) and not accumulate:
        return []
    found, copies = [], len(numbers)
    for index, mask in zip(indices, masks, strict=True):
        if device.has(index):
            found += ["a mask as an index"] * mask
        elif index.numel():
            copies += (index.dim() if accumulate else 0) if mask else 1
    return found + [TO_DEVICE] * copies


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros, laid out as on a GPU, in the place of attention, which takes most of the time and decides nothing."""
    batch, heads, tokens, _ = query.shape
    output = query.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_zeros(query.shape[:-1])


def _caller(frame: FrameType | None) -> str:
    """The function of transformers or of this package that the operator was called from."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = str(path).startswith(OURS) and path.parent.name != "benchmarks"
        if (ours and path.name != "registry.py") or "transformers" in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the caller"


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a launcher asks torch for beside its kernels."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.found[str(func.overloadpacket)] += _writes(func, args, kwargs or {}, output)
        return output


def op_launches(op: Op, *args: Any, **kwargs: Any) -> Counter[str]:
    """What the Triton launcher of an op starts, for arguments on the meta device; one launch without Triton."""
    backend, found = op.backend("triton"), Counter[str]()
    if isinstance(backend, str):
        return Counter({op.name: 1})
    from triton.runtime.jit import KernelInterface

    def instead(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: found.update([kernel.__name__])

    with patch.object(KernelInterface, "__getitem__", instead), _Writes(found):
        backend.run(*args, **kwargs)
    return +found
