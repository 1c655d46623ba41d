"""How the ops on masked rows are tested and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import BadCall, Cases, Samples, Workloads, derived, row_bytes
from vlmfast.ops.masked_rows import definition

# ---- the code that the ops replace ----


def deepstack_upstream(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    method: Any = Qwen3VLTextModel._deepstack_process
    probe = torch.zeros(1, 1, 1)
    method(None, probe, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1))
    if probe.item():  # transformers 4.57 overwrites its argument
        return lambda: method(None, hidden_states.clone(), visual_pos_masks, visual_embeds)
    return lambda: method(None, hidden_states, visual_pos_masks, visual_embeds)


def place_upstream(
    inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    return lambda: inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_embeds.to(inputs_embeds.dtype))


def compact_upstream(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Sort, gather, and write zeros through a boolean mask, as 4M does, but with an exact sort key."""

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


# ---- other ways to compute the same ----


def deepstack_index_add(
    hidden_states: Tensor, mask: Tensor, embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        added = hidden_states.clone(memory_format=torch.contiguous_format)
        added.view(-1, added.shape[2]).index_add_(0, mask.flatten().nonzero().squeeze(1), embeds)
        return added

    return run


def place_index_put(
    inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        placed = inputs_embeds.clone()
        placed[mask] = image_embeds
        return placed

    return run


def index_cumsum(mask: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        flat = mask.flatten()
        ranks = (flat.cumsum(0, dtype=torch.int32) - flat.int()).view(mask.shape)
        return torch.where(mask, ranks, ~ranks)

    return run


def compact_stable(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Sort the mask itself, and gather whole rows."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        batch, length, size = tokens.shape
        found = invalid.sort(stable=True, dim=1).indices[:, :keep]
        if pad_left:
            found = found.gather(1, invalid.gather(1, found).sort(stable=True, dim=1, descending=True).indices)
        masked = invalid.gather(1, found)
        rows = (found + torch.arange(batch, device=found.device)[:, None] * length).flatten()
        packed = tokens.reshape(-1, size).index_select(0, rows).view(batch, keep, size)
        return packed.masked_fill_(masked[..., None], 0), masked, found

    return run


# ---- calls to test, to refuse and to time ----

# (B, T, D), the share of masked rows
_SHAPES = [
    ((1, 1, 64), 1.0),
    ((2, 20, 96), 0.5),
    ((3, 17, 128), 0.8),
    ((2, 21, 1000), 0.3),
    ((2, 40, 64), 0.0),  # more rows than one program takes
    ((2, 40, 64), 1.0),
    ((0, 4, 64), 0.5),
    ((2, 0, 64), 0.5),
    ((2, 70, 64), 0.5),  # fills blocks, in the layouts of the first shape, which does not
    ((3, 100, 7), 0.5),
    ((1, 2, 12288), 0.5),
    ((1, 5008, 4), 0.5),  # positions before a chunk are counted in several steps:
    ((1, 5000, 4), 0.5),  # by two kernels, because Triton specialises for multiples of 16
    ((2, 9, 1536), 0.5),  # from here on for what a real shape is compiled to, which rows that fill no block do not fill
    ((2, 700, 4), 0.6),
    ((1, 5003, 4), 0.5),
    ((1, 5008, 1), 0.5),
    ((2, 3, 0), 0.5),
    ((3, 7, 1552), 0.8),
]


def _masked(device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for shape, share in _SHAPES:
        mask = torch.rand(shape[:2], device=device) < share
        yield torch.randn(shape, device=device, dtype=dtype), mask


def deepstack_samples(device: str, dtype: torch.dtype) -> Samples:
    for number, (x, mask) in enumerate(_masked(device, dtype)):
        embeds = torch.randn(int(mask.sum()), x.shape[2], device=device, dtype=dtype)
        index = (definition.row_index.op.reference(mask),) if number % 2 else ()
        yield x, mask, embeds, *index
    yield x, mask, torch.randn(embeds.shape, device=device)  # float32 features of a tower


def split_samples(device: str, dtype: torch.dtype) -> Samples:
    for number, (x, mask, embeds, *index) in enumerate(deepstack_samples(device, dtype)):
        yield x, mask, embeds.shape[0], *(index or [None]), number % 3 > 0 and number != 8


def compact_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (x, mask) in enumerate(_masked(device, dtype)):
        tokens = x.shape[1]
        keep = (tokens, tokens // 2, (tokens + 3) // 4)[index % 3]
        pad_left = index % 4 > 1
        order = definition.compact_tokens.op.reference(x, mask, keep, None, pad_left)[2] if index % 5 == 3 else None
        yield x, mask, keep, order, pad_left


# (B, T, D), its mask, and what belongs to the three masked positions
_X, _MASK = torch.ones(2, 3, 8), torch.tensor([[True, False, True], [False, False, True]])
_EMBEDS = torch.ones(3, 8)


def _row_bad_calls(name: str, mask: str) -> tuple[BadCall, ...]:
    return (
        (name, _X[0], ValueError, rf"{name} must have shape \(B, T, D\), got \(3, 8\)"),
        (mask, _MASK.long(), TypeError, f"{mask} must be bool, got torch.int64"),
        (mask, _MASK[..., None], ValueError, rf"{mask} must have shape \(B, T\), got \(2, 3, 1\)"),
        (mask, _MASK[:, :2], ValueError, rf"{mask} must have shape \(2, 3\), .* {name}, got \(2, 2\)"),
    )


def _embeds_bad_calls(name: str, mask: str, embeds: str) -> tuple[BadCall, ...]:
    message = f"{mask} must be true at as many positions as {embeds} has rows"
    return (
        *_row_bad_calls(name, mask),
        (embeds, _EMBEDS[:, :7], ValueError, rf"{embeds} must have shape \(V, 8\).* got \(3, 7\)"),
        *((embeds, torch.ones(rows, 8), ValueError, f"{message}, {rows}, got 3") for rows in (2, 4, 0)),
        ("index", _MASK.long(), TypeError, "index must be int32, got torch.int64"),
        ("index", torch.ones(2, 2).int(), ValueError, f"index must have the shape of {mask}"),
        ("index", torch.ones(2, 3).int(), ValueError, f"index must be what .* for {mask}"),
    )


def _prefills(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield prompts of Qwen3-VL-2B/8B: B x T x D, with the visual tokens of each sequence in one run.

    One has rows whose size is not a multiple of 16: the patches of Qwen2.5-VL.
    """
    shapes = [(1, 600, 2048, 256), (1, 256, 1176, 64), (2, 2048, 2048, 1600)]
    for batch, tokens, hidden, visual in [*shapes, (8, 4096, 4096, 3200)] if device != "cpu" else shapes:
        mask = torch.zeros(batch, tokens, device=device, dtype=torch.bool)
        mask[:, 16 : 16 + visual] = True
        yield f"{batch}x{tokens}x{hidden}", torch.randn(batch, tokens, hidden, device=device, dtype=dtype), mask


def deepstack_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, x, mask in _prefills(device, dtype):
        yield label, (x, mask, torch.randn(int(mask.sum()), x.shape[2], device=device, dtype=dtype))


def compact_workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield the input of 4M's encoder: tokens of all modalities, valid and invalid ones in random order."""
    for label, x, _ in _prefills(device, dtype):
        yield label, (x, torch.rand(x.shape[:2], device=device) < 0.5, x.shape[1] // 2)


# ---- the bytes of calls ----


def _index_bytes(mask: Tensor, index: Tensor | None) -> int:
    """Count an index: a given one is read; one made from the mask is written and read."""
    return 4 * mask.numel() + (5 * mask.numel() if index is None else 0)


def deepstack_bytes(hidden_states: Tensor, mask: Tensor, embeds: Tensor, index: Tensor | None = None) -> int:
    """Count all hidden states in and out, and the embeddings in."""
    return 2 * hidden_states.nbytes + embeds.nbytes + _index_bytes(mask, index)


def place_bytes(inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None) -> int:
    """Count each row once in: it comes from one tensor or the other."""
    return 2 * inputs_embeds.nbytes + _index_bytes(mask, index)


def split_bytes(x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True) -> int:
    """Count ``x`` in, its masked rows and the rest out; without the rest, nothing else is read."""
    taken = rows * row_bytes(x)
    return _index_bytes(mask, index) + (2 * x.nbytes + taken if rest else 2 * taken)


def _packed(invalid: Tensor, keep: int) -> int:
    """Count the valid tokens that get one of the ``keep`` places of their sequence."""
    return int((~invalid).sum(1).clamp(max=keep).sum())


def compact_bytes(tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, *_: Any) -> int:
    """Count valid rows in; the order is written (made, or a copy of a given one) and read."""
    places = tokens.shape[0] * keep
    read = _packed(invalid, keep) if order is None else int((~invalid.gather(1, order)).sum())
    numbers = 8 * places + (invalid.nbytes if order is None else 8 * places)
    return row_bytes(tokens) * (read + places) + numbers + 10 * places


def compact_backward_bytes(grad_tokens: Tensor, invalid: Tensor, *_: Any) -> int:
    """Count in only the rows that valid tokens were packed into."""
    return row_bytes(grad_tokens) * (_packed(invalid, grad_tokens.shape[1]) + invalid.numel()) + _index_bytes(
        invalid, None
    )


# ---- the cases of each op ----

deepstack_add = Cases(
    samples=deepstack_samples,
    good_call={"hidden_states": _X, "visual_pos_masks": _MASK, "visual_embeds": _EMBEDS},
    bad_calls=_embeds_bad_calls("hidden_states", "visual_pos_masks", "visual_embeds"),
    workloads=deepstack_workloads,
    bytes=deepstack_bytes,
    flops=lambda hidden_states, mask, embeds, *_: embeds.numel(),
    upstream=deepstack_upstream,
    peers={"index_add_": deepstack_index_add},
    limits={"hidden_states.clone()": lambda hidden_states, *_: hidden_states.clone},
    launches=2,
)

place_embeddings = derived(
    deepstack_add,
    lambda *args: args,
    good_call={"inputs_embeds": _X, "mask": _MASK, "image_embeds": _EMBEDS},
    bad_calls=_embeds_bad_calls("inputs_embeds", "mask", "image_embeds"),
    bytes=place_bytes,
    upstream=place_upstream,
    peers={"index_put_": place_index_put},
    limits={"inputs_embeds.clone()": lambda inputs_embeds, *_: inputs_embeds.clone},
    launches=2,
)

row_index = derived(
    deepstack_add,
    lambda hidden_states, mask, *_: (mask,),
    good_call={"mask": _MASK},
    bad_calls=(
        ("mask", torch.ones(2, 3), TypeError, "mask must be bool, got torch.float32"),
        ("mask", _MASK[0], ValueError, r"mask must have shape \(B, T\), got \(3,\)"),
    ),
    bytes=lambda mask: 5 * mask.numel(),
    peers={"cumsum": index_cumsum},
    requested=1.75,  # each chunk counts the mask before it, a byte per position
)

split_rows = derived(
    deepstack_add,
    lambda x, mask, embeds: (x, mask, embeds.shape[0]),
    samples=split_samples,
    good_call={"x": _X, "mask": _MASK, "rows": 3},
    bad_calls=(*_row_bad_calls("x", "mask"), ("rows", 5, ValueError, "as many positions as rows says, 5")),
    bytes=split_bytes,
    launches=2,
)

compact_tokens = Cases(
    samples=compact_samples,
    good_call={"tokens": _X, "invalid": _MASK, "keep": 2},
    bad_calls=(
        *_row_bad_calls("tokens", "invalid"),
        ("keep", 4, ValueError, "keep must be within 0 and 3, the tokens of a sequence, got 4"),
        ("keep", -1, ValueError, "keep must be within 0 and 3, the tokens of a sequence, got -1"),
        ("keep", 2.0, TypeError, "keep must be an int, got float"),
        ("keep", True, TypeError, "keep must be an int, got bool"),
        ("order", _MASK[:, :2], TypeError, "order must be int64, got torch.bool"),
        ("order", _MASK.long(), ValueError, r"order must have shape \(2, 2\), got \(2, 3\)"),
    ),
    workloads=compact_workloads,
    bytes=compact_bytes,
    upstream=compact_upstream,
    peers={"a stable sort": compact_stable},
    limits={"tokens.clone()": lambda tokens, *_: tokens.clone},
    launches=2,
)

compact_tokens_backward = derived(
    compact_tokens,
    lambda tokens, invalid, keep, order=None, pad_left=False: (torch.randn_like(tokens[:, :keep]), invalid, pad_left),
    good_call={"grad_tokens": _X, "invalid": _MASK},
    bad_calls=(
        ("invalid", _X[..., 0], TypeError, "invalid must be bool, got torch.float32"),
        ("invalid", _MASK[:, :2], ValueError, r"grad_tokens must have shape \(2, keep, D\) with keep <= 2"),
        ("invalid", _MASK[:1], ValueError, r"grad_tokens must have shape \(1, keep, D\)"),
    ),
    bytes=compact_backward_bytes,
    launches=2,
)
