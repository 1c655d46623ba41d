"""Compute on the host, by upstream's own functions, what depends on the sizes of images alone.

Upstream computes positions, windows, segments and interpolation from ``image_grid_thw`` on the device that holds it,
and so makes the host wait for that device many times. Here the sizes are copied to the host once, and the results are
copied to the device.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.host import is_traced, on_host, to_device, to_host
from vlmfast.patches.segments import tell_segments
from vlmfast.patches.upstream import names_of

# Keyword arguments of a tower's forward, which it computes from the grid where the caller does not pass them.
ENDS = ("cu_seqlens", "cu_window_seqlens")
TENSORS = (*ENDS, "position_ids", "window_index", "interp_indices", "interp_weights")


def encode(self: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
    """Replace the forward of the vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and its copies."""
    if _is_on_one_device(self, hidden_states) and not any(kwargs.get(name) is not None for name in TENSORS):
        kwargs = {**kwargs, **_of_grid(self, on_host(grid_thw), hidden_states.device)}
    return self.original_class.forward(self, hidden_states, grid_thw, **kwargs)


def _is_on_one_device(self: Any, hidden_states: Tensor) -> bool:
    """Tell whether a tower lies on one device other than the host, and nothing is being traced.

    One weight of each block is looked at: to ask all weights takes as long as upstream's own waits.
    """
    if hidden_states.is_cpu or is_traced():
        return False
    parts = (part for child in self.children() for part in (child if isinstance(child, nn.ModuleList) else [child]))
    return {weight.device for part in parts for weight in islice(part.parameters(), 1)} == {hidden_states.device}


@torch.no_grad()
def _of_grid(self: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
    """Compute on the host what the tower's forward computes from the grid, and copy the tensors to the device."""
    names = names_of(self.original_class, "forward")
    found: dict[str, Any] = {"position_ids": names["get_vision_position_ids"](grid, self.spatial_merge_size)}
    found["cu_seqlens"], found["max_seqlen"] = names["get_vision_attention_seqlens"](grid, self.config)
    if "get_vision_window_index" in names:
        found["window_index"], found["cu_window_seqlens"] = names["get_vision_window_index"](
            grid, spatial_merge_size=self.spatial_merge_size, window_size=self.window_size, patch_size=self.patch_size
        )
        found["max_window_seqlen"] = names["get_max_seqlen"](found["cu_window_seqlens"], self.config)
    if "get_vision_interpolation_indices_and_weights" in names:
        found["interp_indices"], found["interp_weights"] = names["get_vision_interpolation_indices_and_weights"](
            grid,
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
            spatial_merge_size=self.config.spatial_merge_size,
        )
    sent = [name for name in TENSORS if name in found]
    with torch.inference_mode(False):
        on_device = dict(zip(sent, to_device(device, *(found[name] for name in sent)), strict=True))
    for name in sent:
        if name in ENDS:
            tell_segments(on_device[name], found[name])
    return {**found, **on_device}


def index_positions(
    self: Any,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replace get_rope_index of Qwen2-VL and Qwen3-VL."""
    return _index_positions(
        self,
        input_ids=input_ids,
        mm_token_type_ids=mm_token_type_ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        attention_mask=attention_mask,
        **kwargs,
    )


def index_timed_positions(
    self: Any,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replace get_rope_index of Qwen2.5-VL, which also takes the seconds per temporal grid step of each video."""
    return _index_positions(
        self,
        input_ids=input_ids,
        mm_token_type_ids=mm_token_type_ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        second_per_grid_ts=second_per_grid_ts,
        attention_mask=attention_mask,
        **kwargs,
    )


def _index_positions(self: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """Run upstream's method on host copies of its arguments, and copy the positions to the device."""
    upstream, ids = self.original_class.get_rope_index, given["input_ids"]
    if not isinstance(ids, Tensor) or ids.is_cpu or is_traced():
        return upstream(self, **given)  # type: ignore[no-any-return]
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    grids = {name: on_host(grid) for name, grid in tensors.items() if name.endswith("grid_thw")}
    others = {name: value for name, value in tensors.items() if name not in grids}
    on_cpu = dict(zip(others, to_host(list(others.values())), strict=True))
    positions, deltas = to_device(ids.device, *upstream(self, **{**given, **grids, **on_cpu}))
    return positions, deltas
