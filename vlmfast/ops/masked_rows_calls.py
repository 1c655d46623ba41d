"""The calls of masked_rows.py's ops: what a good one looks like, which to test, to refuse and to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.registry import BadCall

# ---- what a call must look like ----


def check_row_index(mask: Tensor) -> None:
    checks.bool_matrix("mask", mask)
    if mask.numel() >= 2**31:
        raise ValueError(f"mask must have fewer than 2**31 positions, got {mask.numel()}")


def check_rows(name: str, x: Tensor, mask_name: str, mask: Tensor, index: Tensor | None) -> None:
    checks.float_tensor(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} must have shape (B, T, D), got {tuple(x.shape)}")
    checks.bool_matrix(mask_name, mask)
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{mask_name} must have shape {tuple(x.shape[:2])}, the first sizes of {name}, got {tuple(mask.shape)}"
        )
    checks.same_device(mask_name, mask, name, x)
    if index is not None:
        checks.integers("index", index, torch.int32)
        checks.same_shape("index", index, mask_name, mask)
        checks.same_device("index", index, name, x)
        if checks.on_host(mask) and checks.on_host(index) and not torch.equal(index >= 0, mask):
            raise ValueError(f"index must be what row_index gives for {mask_name}, got that of another mask")


def _check_count(mask_name: str, mask: Tensor, rows_name: str, rows: int) -> None:
    if checks.on_host(mask) and (found := int(mask.count_nonzero())) != rows:
        raise ValueError(f"{mask_name} must be true at as many positions as {rows_name}, {rows}, got {found}")


def _check_embeds(name: str, x: Tensor, mask_name: str, mask: Tensor, embeds_name: str, embeds: Tensor) -> None:
    checks.float_tensor(embeds_name, embeds)
    if embeds.dim() != 2 or embeds.shape[1] != x.shape[2]:
        raise ValueError(
            f"{embeds_name} must have shape (V, {x.shape[2]}), the last size that of {name}, got {tuple(embeds.shape)}"
        )
    checks.same_device(embeds_name, embeds, name, x)
    _check_count(mask_name, mask, f"{embeds_name} has rows", embeds.shape[0])


def check_deepstack_add(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> None:
    check_rows("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks, index)
    _check_embeds("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks, "visual_embeds", visual_embeds)


def check_place_embeddings(
    inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None
) -> None:
    check_rows("inputs_embeds", inputs_embeds, "mask", mask, index)
    _check_embeds("inputs_embeds", inputs_embeds, "mask", mask, "image_embeds", image_embeds)


def check_split_rows(x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True) -> None:
    check_rows("x", x, "mask", mask, index)
    _check_count("mask", mask, "rows says", rows)


def check_compact_tokens(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> None:
    check_rows("tokens", tokens, "invalid", invalid, None)
    checks.integer("keep", keep)
    if not 0 <= keep <= invalid.shape[1]:
        raise ValueError(f"keep must be within 0 and {invalid.shape[1]}, the tokens of a sequence, got {keep}")
    if order is not None:
        checks.integers("order", order, torch.int64)
        if order.shape != (invalid.shape[0], keep):
            raise ValueError(f"order must have shape {(invalid.shape[0], keep)}, got {tuple(order.shape)}")
        checks.same_device("order", order, "tokens", tokens)


def check_compact_tokens_backward(grad_tokens: Tensor, invalid: Tensor, pad_left: bool = False) -> None:
    checks.float_tensor("grad_tokens", grad_tokens)
    checks.bool_matrix("invalid", invalid)
    checks.same_device("invalid", invalid, "grad_tokens", grad_tokens)
    shape = tuple(grad_tokens.shape)
    if len(shape) != 3 or shape[0] != invalid.shape[0] or shape[1] > invalid.shape[1]:
        raise ValueError(
            f"grad_tokens must have shape ({invalid.shape[0]}, keep, D) with keep <= {invalid.shape[1]}, got {shape}"
        )


# ---- the code that the ops replace ----


def deepstack_upstream(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    method: Any = Qwen3VLTextModel._deepstack_process
    probe = torch.zeros(1, 1, 1)
    method(None, probe, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1))
    if probe.item():  # transformers 4.57 writes into its argument
        return lambda: method(None, hidden_states.clone(), visual_pos_masks, visual_embeds)
    return lambda: method(None, hidden_states, visual_pos_masks, visual_embeds)


def place_upstream(
    inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    return lambda: inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_embeds.to(inputs_embeds.dtype))


def compact_upstream(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Sort, gather, and write zeros through a boolean mask, as 4M does, with an exact key."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(invalid.shape[1], device=invalid.device)
        key = invalid * invalid.shape[1] + position
        found = key.argsort(1)[:, :keep]
        if pad_left:
            found = found.gather(1, (key.gather(1, found) + ~invalid.gather(1, found) * 2 * key.shape[1]).argsort(1))
        packed = tokens.gather(1, found.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        masked = invalid.gather(1, found)
        packed[masked] = 0.0
        return packed, masked, found

    return run


# ---- calls to test, to refuse and to time ----

# (B, T, D), the share of masked rows
_SHAPES = [
    ((1, 1, 64), 1.0),
    ((2, 5, 96), 0.5),
    ((3, 17, 128), 0.8),
    ((2, 21, 1000), 0.3),
    ((2, 6, 64), 0.0),
    ((2, 6, 64), 1.0),
    ((0, 4, 64), 0.5),
    ((2, 0, 64), 0.5),
    ((2, 3, 0), 0.5),
    ((3, 5, 7), 0.5),
    ((1, 2, 12288), 0.5),
    ((2, 700, 4), 0.6),
]


def _masked(device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for shape, share in _SHAPES:
        mask = torch.rand(shape[:2], device=device) < share
        yield torch.randn(shape, device=device, dtype=dtype), mask


def row_index_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for _, mask in _masked(device, dtype):
        yield (mask,)


def deepstack_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    from vlmfast.ops.masked_rows import row_index

    for position, (x, mask) in enumerate(_masked(device, dtype)):
        embeds = torch.randn(int(mask.sum()), x.shape[2], device=device, dtype=dtype)
        index = (row_index.op.reference(mask),) if position % 2 else ()
        yield x, mask, embeds, *index
    yield x, mask, torch.randn(embeds.shape, device=device)  # features of a tower kept in float32


def split_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for position, (x, mask, embeds, *index) in enumerate(deepstack_samples(device, dtype)):
        yield x, mask, embeds.shape[0], *(index or [None]), position % 3 > 0


def compact_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    from vlmfast.ops.masked_rows import compact_tokens

    for position, (x, mask) in enumerate(_masked(device, dtype)):
        tokens = x.shape[1]
        keep = (tokens, tokens // 2, (tokens + 3) // 4)[position % 3]
        pad_left = position % 4 > 1
        order = compact_tokens.op.reference(x, mask, keep, None, pad_left)[2] if position % 5 == 3 else None
        yield x, mask, keep, order, pad_left


def compact_backward_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, mask, keep, _, pad_left in compact_samples(device, dtype):
        yield torch.randn(x.shape[0], keep, x.shape[2], device=device, dtype=dtype), mask, pad_left


def row_index_bad_calls() -> Iterator[BadCall]:
    yield BadCall(([True],), TypeError, "mask must be a torch.Tensor, got list")
    yield BadCall((torch.ones(2, 3),), TypeError, "mask must be bool, got torch.float32")
    yield BadCall((torch.ones(3, dtype=torch.bool),), ValueError, r"mask must have shape \(B, T\), got \(3,\)")


def _row_bad_calls(name: str, mask_name: str) -> Iterator[tuple[tuple[Any, Any], type[Exception], str]]:
    x, mask = torch.ones(2, 3, 8), torch.tensor([[True, False, True], [False, False, True]])
    yield ([1.0], mask), TypeError, f"{name} must be a torch.Tensor, got list"
    yield (x.double(), mask), TypeError, f"{name} must be float32, float16 or bfloat16, got torch.float64"
    yield (x[0], mask), ValueError, rf"{name} must have shape \(B, T, D\), got \(3, 8\)"
    yield (x, mask.long()), TypeError, f"{mask_name} must be bool, got torch.int64"
    yield (x, mask[..., None]), ValueError, rf"{mask_name} must have shape \(B, T\), got \(2, 3, 1\)"
    yield (x, mask[:, :2]), ValueError, rf"{mask_name} must have shape \(2, 3\), .* {name}, got \(2, 2\)"
    yield (x, mask.to("meta")), ValueError, f"{mask_name} must be on the device of {name}, cpu, got meta"


def _embeds_bad_calls(name: str, mask_name: str, embeds_name: str) -> Iterator[BadCall]:
    embeds = torch.ones(3, 8)
    for args, error, message in _row_bad_calls(name, mask_name):
        yield BadCall((*args, embeds), error, message)
    x, mask = torch.ones(2, 3, 8), torch.tensor([[True, False, True], [False, False, True]])
    yield BadCall((x, mask, 1.0), TypeError, f"{embeds_name} must be a torch.Tensor, got float")
    yield BadCall((x, mask, embeds.double()), TypeError, f"{embeds_name} must be float32, float16 or bfloat16")
    yield BadCall((x, mask, embeds[:, :7]), ValueError, rf"{embeds_name} must have shape \(V, 8\).* got \(3, 7\)")
    yield BadCall((x, mask, embeds.to("meta")), ValueError, f"{embeds_name} must be on the device of {name}")
    for rows in (2, 4, 0):
        message = f"{mask_name} must be true at as many positions as {embeds_name} has rows, {rows}, got 3"
        yield BadCall((x, mask, torch.ones(rows, 8)), ValueError, message)
    yield BadCall((x, mask, embeds, mask.long()), TypeError, "index must be int32, got torch.int64")
    yield BadCall((x, mask, embeds, torch.ones(2, 2).int()), ValueError, f"index must have the shape of {mask_name}")
    yield BadCall((x, mask, embeds, torch.ones(2, 3).int()), ValueError, f"index must be what .* for {mask_name}")


def deepstack_bad_calls() -> Iterator[BadCall]:
    return _embeds_bad_calls("hidden_states", "visual_pos_masks", "visual_embeds")


def place_bad_calls() -> Iterator[BadCall]:
    return _embeds_bad_calls("inputs_embeds", "mask", "image_embeds")


def split_bad_calls() -> Iterator[BadCall]:
    for args, error, message in _row_bad_calls("x", "mask"):
        yield BadCall((*args, 3), error, message)
    yield BadCall(
        (torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), 5), ValueError, "as many positions as rows says, 5"
    )


def compact_bad_calls() -> Iterator[BadCall]:
    for args, error, message in _row_bad_calls("tokens", "invalid"):
        yield BadCall((*args, 2), error, message)
    x, invalid = torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    yield BadCall((x, invalid, 4), ValueError, "keep must be within 0 and 3, the tokens of a sequence, got 4")
    yield BadCall((x, invalid, -1), ValueError, "keep must be within 0 and 3, the tokens of a sequence, got -1")
    yield BadCall((x, invalid, 2.0), TypeError, "keep must be an int, got float")
    yield BadCall((x, invalid, True), TypeError, "keep must be an int, got bool")
    yield BadCall((x, invalid, 2, invalid[:, :2]), TypeError, "order must be int64, got torch.bool")
    yield BadCall((x, invalid, 2, invalid.long()), ValueError, r"order must have shape \(2, 2\), got \(2, 3\)")


def compact_backward_bad_calls() -> Iterator[BadCall]:
    x, invalid = torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    yield BadCall((x.double(), invalid), TypeError, "grad_tokens must be float32, float16 or bfloat16")
    yield BadCall((x, x[..., 0]), TypeError, "invalid must be bool, got torch.float32")
    yield BadCall((x, invalid[:, :2]), ValueError, r"grad_tokens must have shape \(2, keep, D\) with keep <= 2")
    yield BadCall((x, invalid[:1]), ValueError, r"grad_tokens must have shape \(1, keep, D\)")


def _prefills(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prompts of Qwen3-VL-2B/8B: B x T x D, with the visual tokens of each sequence in one run."""
    shapes = [(1, 600, 2048, 256), (2, 2048, 2048, 1600)]
    for batch, tokens, hidden, visual in [*shapes, (8, 4096, 4096, 3200)] if device != "cpu" else shapes:
        mask = torch.zeros(batch, tokens, device=device, dtype=torch.bool)
        mask[:, 16 : 16 + visual] = True
        yield f"{batch}x{tokens}x{hidden}", torch.randn(batch, tokens, hidden, device=device, dtype=dtype), mask


def row_index_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, _, mask in _prefills(device, dtype):
        yield label, (mask,)


def deepstack_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, x, mask in _prefills(device, dtype):
        yield label, (x, mask, torch.randn(int(mask.sum()), x.shape[2], device=device, dtype=dtype))


def split_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, x, mask in _prefills(device, dtype):
        yield label, (x, mask, int(mask.sum()))


def compact_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """4M's encoder: the visible tokens of all modalities, in a random order of valid and invalid ones."""
    for label, x, _ in _prefills(device, dtype):
        yield label, (x, torch.rand(x.shape[:2], device=device) < 0.5, x.shape[1] // 2)


def compact_backward_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (x, invalid, keep) in compact_workloads(device, dtype):
        yield label, (x[:, :keep].contiguous(), invalid)
