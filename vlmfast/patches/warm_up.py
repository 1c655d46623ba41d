"""Run the kernels of a patched model once, so that none is compiled while the model serves or is captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.checks import DTYPES
from vlmfast.modules import at_hand
from vlmfast.ops.masked_rows import deepstack_add, place_embeddings
from vlmfast.ops.rope import qk_norm_rope
from vlmfast.patches import grids, masked_rows, rms_norm, segments, tiles
from vlmfast.patches.swap import PatchedModule
from vlmfast.patches.upstream import site_name
from vlmfast.registry import OPS, order, override


@dataclass(frozen=True)
class Warmup:
    """What `warmup` ran.

    Attributes:
        ops: op -> the backends that ran it.
        compiled: the Triton kernels that were compiled, or loaded from Triton's cache; a name may be listed repeatedly.
        left: the sites that did not run, because their inputs are unknown without a prompt.
    """

    ops: dict[str, tuple[str, ...]]
    compiled: tuple[str, ...]
    left: tuple[str, ...]

    def report(self) -> str:
        """Write what was compiled, which backend runs each op, and which sites did not run."""
        head = f"{len(self.compiled)} Triton kernels compiled" if self.compiled else "nothing was to be compiled"
        lines = [head, *(f"  {name}: {' and '.join(backends)}" for name, backends in self.ops.items())]
        return "\n".join([*lines, *(f"  {site}: not run, give `warmup` a prompt" for site in self.left)])

    def __str__(self) -> str:
        return self.report()


def warmup(model: nn.Module, *prompts: Mapping[str, Any]) -> Warmup:
    """Compile what a patched model needs, before it serves or a CUDA graph is captured.

    Triton compiles a kernel at its first call, which takes about a second of that prompt's time, and is an error during
    a capture. No kernel is compiled for a particular number of tokens, so a few rows warm it up for every prompt.
    Without prompts this runs what the weights determine: norms, the placement of embeddings, DeepStack, and the RoPE of
    vision towers. Decoder layers need a prompt, connectors and token reduction a prompt with an image; for token
    reduction pass a short and a long one.

    Args:
        model: a patched model, or a module with patched modules in it, on the device that it will run on.
        *prompts: inputs of the model, as ``generate`` takes them by name. Two tokens are generated for each; of a model
            without ``generate``, the forward runs.

    Returns:
        A `Warmup`, which lists what was compiled: nothing, where the ops run on a CPU or in CUDA C++.

    Raises:
        TypeError: if ``model`` is not a module, or a prompt is not a mapping. ValueError: if nothing in the model is
            patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for prompt in prompts:
        if not isinstance(prompt, Mapping):
            raise TypeError(f"prompts must map the model's arguments to values, got {type(prompt).__name__}")
    patched: list[nn.Module] = [module for module in model.modules() if isinstance(module, PatchedModule)]
    if not patched:
        raise ValueError(f"model must be patched, got a {type(model).__name__} that is not: vlmfast.patch(model) first")
    left: dict[str, None] = {}
    with torch.no_grad(), _watched_ops() as ops, _watched_compiler() as compiled:
        for module in patched:
            for method, function in type(module).replacements.items():  # type: ignore[attr-defined]
                if not _run(model, module, function) and not prompts:
                    left[site_name(type(module).original_class, method)] = None  # type: ignore[attr-defined]
        for prompt in prompts:
            generate: Any = getattr(model, "generate", None)
            if generate is None:
                model(**prompt)
            else:
                generate(**prompt, max_new_tokens=2)
    return Warmup({name: tuple(sorted(found)) for name, found in ops.items()}, tuple(compiled), tuple(left))


def _run(model: nn.Module, module: nn.Module, function: Callable[..., Any]) -> bool:
    """Run a replacement on a few rows; return False if its inputs are unknown without a prompt."""
    if function.__module__ == rms_norm.__name__:
        return _run_norm(model, module, function)
    if function.__module__ == segments.__name__:
        return _run_rotation(module)
    if function.__module__ in (grids.__name__, tiles.__name__):  # these replacements run no op
        return True
    table = _embeddings(module, model)
    if function.__module__ != masked_rows.__name__ or table is None:
        return False
    if table.dtype not in DTYPES:
        return _runs_no_op(table)
    x = table.new_zeros(1, 4, table.shape[1])
    mask = torch.tensor([[False, True, True, False]], device=x.device)
    op = deepstack_add if "deepstack" in function.__name__ else place_embeddings
    op(x, mask, x[0, :2])
    return True


def _run_norm(model: nn.Module, module: nn.Module, function: Callable[..., Any]) -> bool:
    table = _embeddings(model)
    with at_hand(module):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return False
        for dtype in {weight.dtype, weight.dtype if table is None else table.dtype}:
            x = weight.new_zeros(1, 2, weight.shape[0], dtype=dtype)
            # A gated norm takes two tensors; the gate has the shape and dtype of the input.
            function(module, *[x] * (len(inspect.signature(function).parameters) - 1))
    return True


def _run_rotation(module: Any) -> bool:
    """Apply RoPE to the queries and keys of two patches, as the attention of a vision tower does."""
    weight = getattr(module.qkv, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    if weight.dtype not in DTYPES:
        return _runs_no_op(weight)
    with at_hand(module.qkv):
        size = module.qkv.weight.shape[0] // (3 * module.num_heads)
        query, key, _ = module.qkv.weight.new_zeros(2, 3, module.num_heads, size).unbind(1)
    angles = torch.zeros(2, size, device=query.device)
    qk_norm_rope(query, key, None, None, angles, angles)
    return True


def _runs_no_op(weight: Tensor) -> bool:
    """Tell whether a weight has the dtype of the inputs, which no op takes; those of a quantised weight are unknown."""
    return weight.dtype == torch.float64


def _embeddings(*modules: nn.Module) -> Tensor | None:
    """Return the (vocabulary, D) token embeddings of the first of these modules that has them."""
    for module in modules:
        try:
            weight = module.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        except (AttributeError, NotImplementedError):  # vision towers and modules outside transformers have none
            continue
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return weight
    return None


@contextmanager
def _watched_ops() -> Iterator[dict[str, set[str]]]:
    """Record which backends run which ops in the block."""
    found: dict[str, set[str]] = {}

    def noting(op: str, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            found.setdefault(op, set()).add(backend)
            return run(*args)

        return noted

    with ExitStack() as stack:
        for entry in (entry for entry in OPS.values() if entry.compose is None):
            for name in order.get():
                backend = entry.backend(name)
                noted = replace(backend, run=noting(entry.name, name, backend.run))
                stack.enter_context(override(entry, name, noted))
        yield found


@contextmanager
def _watched_compiler() -> Iterator[list[str]]:
    """Record which kernels Triton compiles, or loads from its cache on disk, in the block."""
    found: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield found
        return
    before = knobs.runtime.jit_post_compile_hook

    def note(*args: Any, fn: Any, **kwargs: Any) -> Any:
        found.append(fn.name)
        return before(*args, fn=fn, **kwargs) if before else None

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before
