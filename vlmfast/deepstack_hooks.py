"""DeepStack: the patches of a high-resolution image, added to the visual tokens of successive layers.

DeepStack-L adds them in the language model and DeepStack-V in the vision tower: `deepstack` does both.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmfast import checks
from vlmfast.ops.masked_rows import deepstack_add, row_index
from vlmfast.patches.swap import trace_anew


def deepstack_levels(features: Tensor, grid: tuple[int, int], side: int, pad_to: int | None = None) -> Tensor:
    """Sample the features of a high-resolution image into levels, each of which covers the whole image.

    The crops are laid out as one map of ``gh * side`` rows and ``gw * side`` columns. Level ``k = i * gw + j`` holds
    what stands at ``map[i::gh, j::gw]``, in row-major order. Levels of several images are joined along the second
    dimension, in the order of the images' placeholders: ``torch.cat([...], dim=1)``.

    Args:
        features: (gh * gw, side * side, C) float32, float16 or bfloat16: the crops in row-major order (the first row of
            crops from left to right, then the second), each with its patches in row-major order.
        grid: ``(gh, gw)``, how many crops there are in height and in width. DeepStack's ``bestgrid`` is the other way
            round, ``(gw, gh)``.
        side: patches in the height and in the width of a crop.
        pad_to: the number of levels to return; zeros follow where there are fewer, as DeepStack's ``num_crops``.

    Returns:
        (gh * gw or ``pad_to``, side * side, C) contiguous, of the dtype of ``features``; differentiable.

    Raises:
        TypeError: for an argument of another type. ValueError: for a shape that does not fit ``grid`` and ``side``, or
            a ``pad_to`` below the number of crops.

    Source:
        process_plain_deepstack of MengLcool/DeepStack-VL, sampling "2d".
    """
    checks.tensor("features", features)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (height, width), got {grid!r}")
    height, width = (_count(f"grid[{axis}]", size, least=1) for axis, size in enumerate(grid))
    _count("side", side, least=1)
    crops = height * width
    if features.dim() != 3 or features.shape[:2] != (crops, side * side):
        raise ValueError(
            f"features must have shape ({crops}, {side * side}, C), for a grid of {height} x {width} crops of "
            f"{side} x {side} patches, got {tuple(features.shape)}"
        )
    rows_by_columns = features.reshape(height, width, side, side, -1).transpose(1, 2)  # gh, side, gw, side, C
    phases = rows_by_columns.reshape(side, height, side, width, features.shape[2])  # map row = y * gh + i
    levels = phases.permute(1, 3, 0, 2, 4).reshape(features.shape).contiguous()
    if pad_to is None:
        return levels
    missing = _count("pad_to", pad_to, least=crops) - crops
    return torch.cat([levels, levels.new_zeros(missing, *levels.shape[1:])])


class DeepStack:
    """The hooks of one `deepstack` call. As a context manager, it removes them at the end of the block."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._added = False

    def remove(self) -> None:
        """Take the hooks out of the layers, and warn if nothing was ever added. A second call does nothing."""
        self._end(warn=True)

    def __enter__(self) -> DeepStack:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._end(warn=error is None)

    def _end(self, warn: bool) -> None:
        if not self._hooks:
            return
        while self._hooks:
            self._hooks.pop().remove()
        trace_anew()
        if warn and not self._added:
            warnings.warn("vlmfast.deepstack added nothing: no pass with its positions was run", stacklevel=3)

    def __repr__(self) -> str:
        return f"<DeepStack: {len(self._hooks)} layers>" if self._hooks else "<DeepStack: removed>"


def deepstack(
    layers: Sequence[nn.Module] | nn.ModuleList,
    levels: Tensor | Sequence[Tensor],
    positions: Tensor,
    start: int = 1,
    interval: int = 1,
) -> DeepStack:
    """Add one level of visual features before each of several layers, at the visual tokens.

    Level ``k`` is added to the hidden states that enter layer ``start + k * interval``, by `vlmfast.deepstack_add`: its
    i-th row goes to the i-th true position, in row-major order over the batch. It is added as the layer before returns
    them, so that ``output_hidden_states`` records them with the level, as DeepStack's own code does; transformers 4.57
    records most decoders without. Gradients reach the levels. With gradient checkpointing, run the backward in the
    block as well: it may call the layers again. What ``torch.compile`` has traced in this process is traced anew in the
    block and after it.

    The levels belong to one prompt, so leave the block before the next one. They are added in passes over as many
    tokens as ``positions`` has: the prefill. A pass over one token, a step of ``generate`` with a cache, is left alone,
    unless ``positions`` has only one itself. Any other pass raises: of a prefill in chunks, of another prompt, of
    ``generate(use_cache=False)``, of assisted decoding. Leaving the block warns if nothing was ever added in it.

        with vlmfast.deepstack(model.model.layers, levels, input_ids == image_token_id):
            model.generate(inputs_embeds=..., attention_mask=...)

    DeepStack-V adds to the patches of a vision tower, half way through, and leaves its CLS token alone:

        positions = torch.ones(images, 1 + patches, dtype=torch.bool)
        positions[:, 0] = False
        with vlmfast.deepstack(tower.encoder.layers, levels, positions, start=len(tower.encoder.layers) // 2):
            tower(pixel_values)

    Args:
        layers: the layers of a decoder or of a vision tower, in order and none left out, since each is given what the
            one before returns: hidden states (B, T, D), as the first argument or ``hidden_states``.
        levels: (K, V, D), or K tensors (V, D); float32, float16 or bfloat16, on the device of the hidden states, to
            whose dtype they are rounded.
        positions: (B, T) bool, true at the V visual tokens; on the device of ``levels``. A copy is kept.
        start: the layer that gets the first level, counted from 0.
        interval: how many layers it is from one level to the next.

    Returns:
        A `DeepStack`: ``remove()``, and a context manager.

    Raises:
        TypeError: for an argument of another type. ValueError: for levels of several shapes, on a CPU levels that have
            not as many rows as ``positions`` is true at (on a GPU that trips a device-side assertion), more levels than
            layers to add them to, or a bad ``start`` or ``interval``; and in a pass of the model for hidden states of
            another batch size, width or device, or of another number of tokens than T and 1. Nothing is hooked after an
            error of this call.

    Source:
        CustomLlamaModel.forward of MengLcool/DeepStack-VL, with exact positions; CLIPVisionTower of the same.
    """
    if not isinstance(layers, (nn.ModuleList, Sequence)) or not all(isinstance(layer, nn.Module) for layer in layers):
        raise TypeError(f"layers must be a sequence of torch.nn.Module, got {type(layers).__name__}")
    layers, levels = list(layers), _levels(levels, positions)
    _count("start", start, least=0)
    _count("interval", interval, least=1)
    last = start + (len(levels) - 1) * interval
    if last >= len(layers):
        raise ValueError(
            f"levels must fit into layers: the last of {len(levels)} would go to layer {last} (start {start}, "
            f"interval {interval}), and there are {len(layers)} layers"
        )
    positions = positions.clone()  # a later in-place change must not make it differ from the index
    # One prefix sum for all levels. On a CPU, checking an index would cost as much as counting again.
    index = None if positions.is_cpu else row_index(positions)
    handle = DeepStack()
    try:
        for number, level in zip(range(start, last + 1, interval), levels, strict=True):
            adding = _Adding(handle, level, positions, index)
            if number == 0:
                hook = layers[0].register_forward_pre_hook(adding.enter, with_kwargs=True)
            else:
                hook = layers[number - 1].register_forward_hook(adding.leave, prepend=True)  # before hooks that record
            handle._hooks.append(hook)
    except BaseException:
        handle._end(warn=False)
        raise
    trace_anew()
    return handle


class _Adding:
    """The hooks that add one level. They keep no count of calls, because gradient checkpointing may run them twice."""

    def __init__(self, handle: DeepStack, level: Tensor, positions: Tensor, index: Tensor | None) -> None:
        self.level, self.positions, self.index = level, positions, index

        def note() -> None:
            handle._added = True

        # torch.compile calls it while tracing, because the graph of a checkpointed layer must have no side effects.
        torch.compiler.assume_constant_result(note)  # type: ignore[no-untyped-call]
        self.note = note

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Add the level to the hidden states that the first layer is called with."""
        what = f"called with hidden states (B, T, D), first or as hidden_states, and {type(layer).__name__} was not"
        if args:
            return (self.add(args[0], what), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.add(kwargs.get("hidden_states"), what)}

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the level to the hidden states that the previous layer returns."""
        what = f"such as return hidden states (B, T, D), alone or first, and {type(layer).__name__} does not"
        if isinstance(output, tuple):
            return self.add(output[0] if output else None, what), *output[1:]
        return self.add(output, what)

    def add(self, hidden_states: object, what: str) -> Tensor:
        """Return the hidden states plus the level, or unchanged in a cached step."""
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
            raise TypeError(f"layers must be {what}")
        positions, level = self.positions, self.level
        batch, tokens, width = hidden_states.shape
        if tokens == 1 and positions.shape[1] != 1:
            return hidden_states
        if (batch, tokens) != positions.shape:
            raise ValueError(
                f"positions must be those of the pass, ({batch}, {tokens}), got {tuple(positions.shape)}: run the "
                f"prefill in one piece, and remove what vlmfast.deepstack returned before the model runs on anything "
                f"else"
            )
        if width != level.shape[1]:
            raise ValueError(f"levels must have the width of the hidden states, {width}, got {level.shape[1]}")
        added = deepstack_add(hidden_states, positions, level, self.index)
        self.note()
        return added


def _levels(levels: object, positions: Tensor) -> list[Tensor]:
    if not isinstance(levels, (Tensor, Sequence)):
        raise TypeError(
            f"levels must be a tensor (K, V, D) or a sequence of tensors (V, D), got {type(levels).__name__}"
        )
    checks.tensor("positions", positions, "BT", (torch.bool,))
    found = list(levels)
    if not found:
        raise ValueError("levels must hold one level or more, got none")
    for number, level in enumerate(found):
        name = f"levels[{number}]"
        checks.tensor(name, level)
        if level.dim() != 2:
            raise ValueError(f"{name} must have shape (V, D), got {tuple(level.shape)}")
        checks.same_shape(name, level, "levels[0]", found[0])
        checks.same_device(name, level, "positions", positions)
    rows = found[0].shape[0]
    if checks.on_host(positions) and (true := int(positions.count_nonzero())) != rows:
        raise ValueError(f"positions must be true at as many places as a level has rows, {rows}, got {true}")
    return found


def _count(name: str, value: int, least: int) -> int:
    checks.integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
