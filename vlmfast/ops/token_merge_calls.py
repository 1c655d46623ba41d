"""The calls of token_merge.py's ops: what a good one looks like, which to test, to refuse and to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.registry import BadCall

MERGES = ("reference", "mean")

# ---- what a call must look like ----


def _check_matrix(name: str, value: Tensor) -> None:
    checks.float_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (B, N), got {tuple(value.shape)}")


def _check_rows(name: str, value: Tensor, size: str) -> None:
    checks.float_tensor(name, value)
    if value.dim() != 3:
        raise ValueError(f"{name} must have shape (B, N, {size}), got {tuple(value.shape)}")


def _check_beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both have the same tokens."""
    if value.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name} must have the first two sizes of {other_name}, {tuple(other.shape[:2])}, got {tuple(value.shape)}"
        )
    checks.same_device(name, value, other_name, other)


def _check_number(name: str, value: int, most: int, of: str) -> None:
    checks.integer(name, value)
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be within 0 and {most}, {of}, got {value}")


def _check_kept(kept: Tensor, name: str, rows: Tensor) -> None:
    checks.integers("kept", kept, torch.int64)
    batch, tokens = rows.shape[:2]
    if kept.dim() != 2 or kept.shape[0] != batch or kept.shape[1] > tokens:
        raise ValueError(f"kept must have shape ({batch}, k) with k <= {tokens}, got {tuple(kept.shape)}")
    checks.same_device("kept", kept, name, rows)
    if checks.on_host(kept) and kept.numel():
        rises = bool((kept[:, 1:] > kept[:, :-1]).all())
        if not rises or int(kept[:, 0].min()) < 0 or int(kept[:, -1].max()) >= tokens:
            raise ValueError(f"kept must be ascending within 0 and {tokens - 1} in each row")


def _check_contextual(contextual: int, tokens: int, kept: int) -> None:
    checks.integer("contextual", contextual)
    if not 0 <= contextual <= tokens - kept:
        raise ValueError(
            f"contextual must be within 0 and {tokens - kept}, the tokens that are left of {tokens} when {kept} are "
            f"kept, got {contextual}"
        )


def check_top_tokens(scores: Tensor, k: int) -> None:
    _check_matrix("scores", scores)
    _check_number("k", k, scores.shape[1], "the tokens of a row")
    if checks.on_host(scores) and bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN, got one that is")


def check_merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> None:
    _check_rows("metric", metric, "M")
    _check_kept(kept, "metric", metric)
    _check_contextual(contextual, metric.shape[1], kept.shape[1])


def _check_slots(slots: Tensor) -> None:
    checks.integers("slots", slots, torch.int32)
    if slots.dim() != 2:
        raise ValueError(f"slots must have shape (B, N), got {tuple(slots.shape)}")


def check_merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> None:
    _check_rows("hidden", hidden, "D")
    _check_kept(kept, "hidden", hidden)
    _check_slots(slots)
    _check_beside("slots", slots, "hidden", hidden)
    _check_contextual(contextual, hidden.shape[1], kept.shape[1])
    checks.one_of("merge", merge, MERGES)


def check_merge_rows_backward(grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> None:
    _check_rows("grad_tokens", grad_tokens, "D")
    _check_slots(slots)
    batch, tokens = slots.shape
    if grad_tokens.shape[0] != batch or grad_tokens.shape[1] > tokens:
        raise ValueError(
            f"grad_tokens must have shape ({batch}, k + C, D) with k + C <= {tokens}, got {tuple(grad_tokens.shape)}"
        )
    checks.same_device("slots", slots, "grad_tokens", grad_tokens)
    _check_number("contextual", contextual, grad_tokens.shape[1], "the rows of grad_tokens")
    checks.one_of("merge", merge, MERGES)


def check_merge_tokens(hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str = "reference") -> None:
    _check_rows("hidden", hidden, "D")
    _check_rows("metric", metric, "M")
    _check_beside("metric", metric, "hidden", hidden)
    _check_kept(kept, "hidden", hidden)
    _check_contextual(contextual, hidden.shape[1], kept.shape[1])
    checks.one_of("merge", merge, MERGES)


def check_visionzip(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str = "reference"
) -> None:
    _check_rows("hidden", hidden, "D")
    _check_rows("metric", metric, "M")
    _check_beside("metric", metric, "hidden", hidden)
    check_top_tokens(scores, 0)
    _check_beside("scores", scores, "hidden", hidden)
    _check_number("dominant", dominant, hidden.shape[1], "the tokens of a row")
    _check_contextual(contextual, hidden.shape[1], dominant)
    checks.one_of("merge", merge, MERGES)


# ---- other ways to compute the same ----


def topk(scores: Tensor, k: int) -> Callable[[], Tensor]:
    return lambda: scores.topk(k, dim=1).indices.sort(1).values


def merge_plain(
    hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str = "reference"
) -> Callable[[], Tensor]:
    """Batched and without a loop, in the dtype of the model."""

    def run() -> Tensor:
        batch, tokens, size = hidden.shape
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device).scatter_(1, kept, False)
        others = mask.nonzero()[:, 1].view(batch, -1)
        step = others.shape[1] // contextual
        unit = torch.nn.functional.normalize(metric, dim=2)
        rest = torch.ones(others.shape[1], dtype=torch.bool, device=hidden.device)
        rest[: contextual * step : step] = False
        targets, joining = others[:, ~rest], others[:, rest]
        to, joins = (unit.gather(1, i[..., None].expand(-1, -1, unit.shape[2])) for i in (targets, joining))
        owner = (joins @ to.transpose(1, 2)).argmax(2)
        rows = hidden.gather(1, joining[..., None].expand(-1, -1, size))
        sums = torch.zeros(batch, contextual, size, dtype=hidden.dtype, device=hidden.device)
        sums.scatter_add_(1, owner[..., None].expand(-1, -1, size), rows)
        count = torch.zeros(batch, contextual, dtype=hidden.dtype, device=hidden.device)
        count.scatter_add_(1, owner, torch.ones_like(owner, dtype=hidden.dtype))
        target = hidden.gather(1, targets[..., None].expand(-1, -1, size))
        if merge == "mean":
            return (target + sums) / (1 + count)[..., None]
        return target + sums / count.clamp(min=1)[..., None]

    return run


def visionzip_plain(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str = "reference"
) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        kept = scores.topk(dominant, dim=1).indices.sort(1).values
        rows = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
        return torch.cat([rows, merge_plain(hidden, metric, kept, contextual, merge)()], 1), kept

    return run


# ---- calls to test, to refuse and to time ----

# B, N, D, M, kept, contextual
_SIZES = [
    (1, 1, 8, 16, 0, 1),
    (2, 17, 64, 16, 5, 3),
    (3, 40, 7, 33, 0, 40),
    (2, 64, 96, 64, 54, 10),
    (1, 12, 32, 16, 12, 0),
    (2, 9, 16, 20, 4, 0),
    (0, 9, 16, 16, 4, 2),
    (2, 0, 16, 16, 0, 0),
    (1, 577, 40, 80, 27, 5),
    (2, 300, 0, 16, 20, 7),
    (1, 150, 264, 128, 10, 70),
]


def _chosen(batch: int, tokens: int, kept: int, device: str) -> Tensor:
    return torch.rand(batch, tokens, device=device).argsort(1)[:, :kept].sort(1).values


def top_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for batch, tokens, *_, kept, _ in _SIZES:
        yield torch.randn(batch, tokens, device=device, dtype=dtype), kept
    yield torch.zeros(2, 33, device=device, dtype=dtype), 7  # ties
    yield torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0]], device=device, dtype=dtype), 3
    yield torch.randint(-2, 3, (3, 700), device=device).to(dtype), 300
    yield torch.tensor([[-torch.inf, torch.inf, -torch.inf, 0.0]], device=device, dtype=dtype), 3
    yield torch.rand(1, 4500, device=device).to(dtype), 2000


def slots_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for batch, tokens, _, size, kept, contextual in _SIZES:
        metric = torch.randn(batch, tokens, size, device=device, dtype=dtype)
        yield metric, _chosen(batch, tokens, kept, device), contextual
    same = metric[:, :5].repeat(1, 30, 1)  # each target has its double
    yield same, _chosen(1, 150, 10, device), 30
    zeros = metric.clone()
    zeros[:, ::3] = 0
    yield zeros, _chosen(1, 150, 10, device), 20


def rows_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    from vlmfast.ops.token_merge import merge_slots

    for position, (metric, kept, contextual) in enumerate(slots_samples(device, dtype)):
        size = _SIZES[position % len(_SIZES)][2]
        hidden = torch.randn(*metric.shape[:2], size, device=device, dtype=dtype)
        slots = merge_slots.op.reference(metric, kept, contextual)
        kept = kept[:, :0] if position % 3 == 2 else kept
        yield hidden, kept, slots, contextual, MERGES[position % 2]
    one = torch.full_like(slots, contextual)  # everything joins the first target, and nothing the others
    one[:, :contextual] = torch.arange(contextual, device=device)
    yield hidden, kept[:, :0], one, contextual


def rows_backward_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for hidden, kept, slots, contextual, *merge in rows_samples(device, dtype):
        rows = kept.shape[1] + contextual
        yield torch.randn(hidden.shape[0], rows, hidden.shape[2], device=device, dtype=dtype), slots, contextual, *merge


def merge_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for position, (metric, kept, contextual) in enumerate(slots_samples(device, dtype)):
        hidden = torch.randn(*metric.shape[:2], _SIZES[position % len(_SIZES)][2], device=device, dtype=dtype)
        yield hidden, metric, kept, contextual, *((), ("mean",))[position % 2]


def visionzip_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for hidden, metric, kept, contextual, *merge in merge_samples(device, dtype):
        scores = torch.randn(hidden.shape[:2], device=device).to(dtype)
        yield hidden, metric, scores, kept.shape[1], contextual, *merge
    yield hidden, metric, scores.float(), kept.shape[1], contextual  # as the attention ops give them


def top_bad_calls() -> Iterator[BadCall]:
    scores = torch.ones(2, 5)
    yield BadCall(([1.0], 1), TypeError, "scores must be a torch.Tensor, got list")
    yield BadCall((scores.double(), 1), TypeError, "scores must be float32, float16 or bfloat16, got torch.float64")
    yield BadCall((scores[0], 1), ValueError, r"scores must have shape \(B, N\), got \(5,\)")
    yield BadCall((scores, 6), ValueError, "k must be within 0 and 5, the tokens of a row, got 6")
    yield BadCall((scores, -1), ValueError, "k must be within 0 and 5, the tokens of a row, got -1")
    yield BadCall((scores, 1.0), TypeError, "k must be an int, got float")
    yield BadCall((scores * torch.nan, 1), ValueError, "scores must not be NaN")


def _kept_bad_calls() -> Iterator[tuple[Any, type[Exception], str]]:
    kept = torch.tensor([[0, 3], [1, 2]])
    yield [0], TypeError, "kept must be a torch.Tensor, got list"
    yield kept.int(), TypeError, "kept must be int64, got torch.int32"
    yield kept[:1], ValueError, r"kept must have shape \(2, k\) with k <= 5, got \(1, 2\)"
    yield kept.flip(1), ValueError, "kept must be ascending within 0 and 4"
    yield kept[:, [0, 0]], ValueError, "kept must be ascending within 0 and 4"
    yield kept + 2, ValueError, "kept must be ascending within 0 and 4"
    yield kept - 1, ValueError, "kept must be ascending within 0 and 4"
    yield kept.to("meta"), ValueError, "kept must be on the device of"


def _contextual_bad_calls() -> Iterator[tuple[Any, type[Exception], str]]:
    yield 4, ValueError, "contextual must be within 0 and 3, the tokens that are left of 5 when 2 are kept, got 4"
    yield -1, ValueError, "contextual must be within 0 and 3"
    yield True, TypeError, "contextual must be an int, got bool"


def slots_bad_calls() -> Iterator[BadCall]:
    metric, kept = torch.ones(2, 5, 8), torch.tensor([[0, 3], [1, 2]])
    yield BadCall((metric.double(), kept, 1), TypeError, "metric must be float32, float16 or bfloat16")
    yield BadCall((metric[0], kept, 1), ValueError, r"metric must have shape \(B, N, M\), got \(5, 8\)")
    for bad, error, message in _kept_bad_calls():
        yield BadCall((metric, bad, 1), error, message)
    for number, error, message in _contextual_bad_calls():
        yield BadCall((metric, kept, number), error, message)


def rows_bad_calls() -> Iterator[BadCall]:
    hidden, kept = torch.ones(2, 5, 8), torch.tensor([[0, 3], [1, 2]])
    slots = torch.zeros(2, 5, dtype=torch.int32)
    yield BadCall((hidden.double(), kept, slots, 1), TypeError, "hidden must be float32, float16 or bfloat16")
    yield BadCall((hidden, kept, slots.long(), 1), TypeError, "slots must be int32, got torch.int64")
    yield BadCall((hidden, kept, slots[0], 1), ValueError, r"slots must have shape \(B, N\), got \(5,\)")
    yield BadCall(
        (hidden, kept, slots[:, :4], 1), ValueError, r"slots must have the first two sizes of hidden, \(2, 5\)"
    )
    yield BadCall((hidden, kept, slots, 1, "sum"), ValueError, "merge must be one of 'reference', 'mean', got 'sum'")
    for number, error, message in _contextual_bad_calls():
        yield BadCall((hidden, kept, slots, number), error, message)


def rows_backward_bad_calls() -> Iterator[BadCall]:
    grad, slots = torch.ones(2, 3, 8), torch.zeros(2, 5, dtype=torch.int32)
    yield BadCall((grad.double(), slots, 1), TypeError, "grad_tokens must be float32, float16 or bfloat16")
    yield BadCall((grad[:1], slots, 1), ValueError, r"grad_tokens must have shape \(2, k \+ C, D\) with k \+ C <= 5")
    yield BadCall((grad, slots, 4), ValueError, "contextual must be within 0 and 3, the rows of grad_tokens, got 4")
    yield BadCall((grad, slots, 1, "sum"), ValueError, "merge must be one of 'reference', 'mean', got 'sum'")


def merge_bad_calls() -> Iterator[BadCall]:
    hidden, metric, kept = torch.ones(2, 5, 8), torch.ones(2, 5, 4), torch.tensor([[0, 3], [1, 2]])
    yield BadCall((hidden.double(), metric, kept, 1), TypeError, "hidden must be float32, float16 or bfloat16")
    yield BadCall(
        (hidden, metric[:, :4], kept, 1), ValueError, r"metric must have the first two sizes of hidden, \(2, 5\)"
    )
    yield BadCall((hidden, metric.to("meta"), kept, 1), ValueError, "metric must be on the device of hidden")
    yield BadCall((hidden, metric, kept, 1, "sum"), ValueError, "merge must be one of 'reference', 'mean', got 'sum'")
    for bad, error, message in _kept_bad_calls():
        yield BadCall((hidden, metric, bad, 1), error, message)
    for number, error, message in _contextual_bad_calls():
        yield BadCall((hidden, metric, kept, number), error, message)


def visionzip_bad_calls() -> Iterator[BadCall]:
    hidden, metric, scores = torch.ones(2, 5, 8), torch.ones(2, 5, 4), torch.ones(2, 5)
    yield BadCall((hidden.double(), metric, scores, 2, 1), TypeError, "hidden must be float32, float16 or bfloat16")
    yield BadCall((hidden, metric, scores[:, :4], 2, 1), ValueError, r"scores must have the first two sizes of hidden")
    yield BadCall((hidden, metric, scores * torch.nan, 2, 1), ValueError, "scores must not be NaN")
    yield BadCall(
        (hidden, metric, scores, 6, 1), ValueError, "dominant must be within 0 and 5, the tokens of a row, got 6"
    )
    yield BadCall((hidden, metric, scores, 2, 1, "sum"), ValueError, "merge must be one of 'reference', 'mean'")
    for number, error, message in _contextual_bad_calls():
        yield BadCall((hidden, metric, scores, 2, number), error, message)


# (label, B, N, D, M, kept, contextual): the crops of LLaVA-NeXT without their CLS tokens, an image in Qwen2.5-VL
_WORKLOADS = [("5x576x1024", 5, 576, 1024, 64, 26, 5), ("1x1024x3584", 1, 1024, 3584, 80, 460, 51)]


def top_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for _, batch, tokens, *_, kept, _ in _WORKLOADS:
        yield f"{batch}x{tokens}", (torch.rand(batch, tokens, device=device), kept)


def visionzip_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, batch, tokens, size, metric_size, kept, contextual in _WORKLOADS:
        hidden, metric = (torch.randn(batch, tokens, s, device=device, dtype=dtype) for s in (size, metric_size))
        yield label, (hidden, metric, torch.rand(batch, tokens, device=device), kept, contextual)


def merge_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (hidden, metric, _, kept, contextual) in visionzip_workloads(device, dtype):
        yield label, (hidden, metric, _chosen(hidden.shape[0], hidden.shape[1], kept, device), contextual)


def slots_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (_, *rest) in merge_workloads(device, dtype):
        yield label, tuple(rest)


def rows_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    from vlmfast.ops.token_merge import merge_slots

    for label, (hidden, metric, kept, contextual) in merge_workloads(device, dtype):
        yield label, (hidden, kept, merge_slots.op.reference(metric, kept, contextual), contextual)


def rows_backward_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (hidden, kept, slots, contextual) in rows_workloads(device, dtype):
        yield label, (hidden[:, : kept.shape[1] + contextual].contiguous(), slots, contextual)
