"""Count the kernel launches and host synchronisations of a forward on a GPU, without a GPU.

A tensor "on the device" is a meta tensor whose storage has a twin on the CPU that holds the values. Upstream's code and
ours therefore take the paths that they take on a GPU, since no tensor is on the CPU. They get the values that they
read, and a copy between host and device differs from a copy within the device. A subclass of `Tensor` would not do:
code treats subclasses differently.

A launch is an operator that writes on the device: it returns memory that no argument has, or mutates an argument
according to its schema, and is not an allocation. Views write nothing. An operator of torch counts once, although some
are several kernels (a sort, ``masked_scatter``, attention that splits the keys). An op of this package counts as the
kernels and operators that its Triton launcher starts.

A synchronisation is one of these: a blocking copy between host and device; a mask used as an index; a number that an
operator reads from the device; and an operator whose result or shape depends on values, according to its tags, such as
``item``, ``nonzero`` and ``unique``. Such an operator counts once however often it reads, except
``repeat_interleave``. Both counts are lower bounds.
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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import vlmfast
from vlmfast.registry import OPS, Op

ATEN = torch.ops.aten
COPIES = {ATEN._to_copy, ATEN.copy_}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN._unsafe_index}
FILLS = {ATEN.masked_fill, ATEN.masked_fill_, ATEN.index_fill, ATEN.index_fill_, ATEN.fill_}
READERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
OURS = str(Path(vlmfast.__file__).parent)
TO_DEVICE = "copy to the device"


@dataclass
class Count:
    """Launches of one block, by operator, and waits, by calling function and operator."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Return the totals of both, and the waits in order of frequency."""
        waits = dict(self.waits.most_common())
        return {"launches": self.launches.total(), "syncs": self.waits.total(), "waits": waits}


def put(value: Tensor) -> Tensor:
    """Return a tensor on the device that shares its values with this CPU tensor."""
    storage = UntypedStorage(value.untyped_storage().nbytes(), device="meta")  # type: ignore[no-untyped-call]
    storage.host = value.untyped_storage()  # type: ignore[attr-defined]
    return _view(storage, value)


def is_put(value: Any) -> bool:
    """Return whether a value is a tensor on the device."""
    return isinstance(value, Tensor) and value.is_meta and hasattr(value.untyped_storage(), "host")


def values(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that shares the values of a tensor on the device."""
    return _view(tensor.untyped_storage().host, tensor)  # type: ignore[attr-defined]


def _view(storage: UntypedStorage, like: Tensor) -> Tensor:
    """View a storage with dtype, offset, shape and strides of ``like``."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())  # type: ignore[call-overload]


def move(model: nn.Module) -> None:
    """Put the parameters and buffers of a model on the device; tied ones stay tied."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    moved.setdefault(id(value), put(value.detach()))
                    tensors[name] = moved[id(value)]  # type: ignore[assignment]


@contextmanager
def count() -> Iterator[Count]:
    """Count launches and waits in the block; tensors on the device can be used only in such a block."""
    found = Count()
    # torch.is_autocast_enabled("meta") raises an error.
    autocast = patch.object(torch, "is_autocast_enabled", lambda device_type="meta": False)
    with torch.no_grad(), autocast, _Functions(), _Operators(found):
        yield found


class _Functions(TorchFunctionMode):
    """Make torch functions behave as for CUDA tensors where they call no operator or treat meta tensors differently."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy):
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            # Zeros in the memory layout of a GPU kernel: computing attention would take most of the time, and no count
            # depends on its values.
            batch, heads, tokens, _ = args[0].shape
            return args[0].new_zeros(batch, tokens, heads, args[2].shape[-1]).transpose(1, 2)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and is_put(args[0]):
            parts = args[1] if isinstance(args[1], tuple) else args[1:2]
            # A number that is assigned stays on the host.
            value = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=args[0].dtype) for v in args[2:])
            return func(args[0], tuple(_index(part, args[0]) for part in parts), *value)
        if func is Tensor.new_tensor:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            args = args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            data = tree_map(lambda value: value.item() if isinstance(value, Tensor) else value, args[0])
            made = func(data, *args[1:], **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _index(part: Any, tensor: Tensor) -> Any:
    """Copy an index that is a list to the tensor's device, as torch does."""
    if not isinstance(part, list) or not all(isinstance(number, int) for number in part):
        return part
    return torch.tensor(part).to(tensor.device)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run every operator on the CPU values of its arguments, and count its launches and waits."""

    def __init__(self, found: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted, given = kwargs.get("device"), list(filter(is_put, tree_leaves((args, kwargs))))
        if func.overloadpacket in (ATEN.copy_, ATEN.fill_):  # all others write on the device of their arguments
            target = is_put(args[0])
        else:
            target = bool(given) if wanted is None else wanted.type == "meta"
        if reasons := _waits(func, args, kwargs, target):
            caller = _caller(sys._getframe(1))
            self.found.waits.update(f"{caller}: {reason}" for reason in reasons)
        storages = {values(tensor).untyped_storage()._cdata: tensor.untyped_storage() for tensor in given}

        def to_host(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return values(value) if is_put(value) else value

        def to_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            storage = storages.get(value.untyped_storage()._cdata)
            return put(value) if storage is None else _view(storage, value)

        host_args, host_kwargs = tree_map(to_host, args), tree_map(to_host, kwargs)
        output = func(*host_args, **host_kwargs)
        if not target:
            return output
        if func.namespace == "vlmfast":
            self.launch(OPS[func.overloadpacket.__name__], *args, **kwargs)
        elif _writes(func, host_args, host_kwargs, output):
            self.found.launches[str(func.overloadpacket)] += 1
        return tree_map(to_device, output)

    def launch(self, op: Op, *args: Any, **kwargs: Any) -> None:
        """Count what the Triton launcher of an op starts; one launch where Triton does not run the op."""
        backend = op.backend("triton")
        if backend.absent:
            self.found.launches[op.name] += 1
            return
        from triton.runtime.jit import KernelInterface

        def instead(kernel: Any, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: self.found.launches.update([kernel.__name__])

        with patch.object(KernelInterface, "__getitem__", instead), self:
            backend.run(*args, **kwargs)


# ---- the rules ----


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Return whether the operator writes memory: that of an argument, or memory that no argument has."""
    if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
        return False
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[index] if index < len(args) else kwargs.get(argument.name))
    given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    written += [tensor for tensor in _tensors(output) if tensor.untyped_storage()._cdata not in given]
    return any(tensor.numel() for tensor in written)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: bool) -> list[str]:
    """List why the host waits for the device, one reason per wait; ``target``: the result is on the device."""
    packet, name = func.overloadpacket, func.overloadpacket.__name__.lstrip("_")
    if packet in COPIES:
        source = args[1] if packet is ATEN.copy_ else args[0]
        queued = kwargs.get("non_blocking") or args[2:] == (True,)
        if is_put(source) == target or queued or not args[0].numel():
            return []
        return [TO_DEVICE if target else "copy to the host"]
    given = _tensors((args, kwargs))
    on_host = [tensor for tensor in given if tensor.numel() and not is_put(tensor)]
    if len(on_host) == len(given):
        return []
    if packet in INDEXING:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if len(args[1]) == len(masks) and len(masks) == 1 and is_put(masks[0]) and args[2:] and not is_put(args[2]):
            return []  # x[mask] = number is a fill
        # a mask on the host is searched there, and what is found goes through pinned memory
        copied = [tensor for tensor in on_host if not any(tensor is mask for mask in masks)]
        return ["a mask as an index" for mask in masks if is_put(mask)] + [TO_DEVICE for _ in copied]
    if packet is ATEN.where:
        return [TO_DEVICE for _ in on_host]
    if packet in FILLS:
        taken = is_put(args[-1]) and not (packet is ATEN.fill_ and target)
        return [f"a number for {packet.__name__}"] if taken else []
    if packet is ATEN.repeat_interleave:  # it reads the sum of the repeats, and whether one is negative
        return [] if kwargs.get("output_size") is not None else [name, name]
    return [name] if READERS & set(func.tags) else []


def _caller(frame: FrameType | None) -> str:
    """Name the function of transformers or of this package that the operator was called from."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = str(path).startswith(OURS) and path.parent.name != "benchmarks"
        if (ours and path.name not in ("registry.py", "functions.py")) or "transformers" in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the caller"
