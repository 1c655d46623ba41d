"""How the pixel shuffles and the connector are tested and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import GELU, Identity

from vlmfast.cases import Cases, Samples, Workloads, derived, named, partial_sums_bytes
from vlmfast.ops.pixel_shuffle import connector, definition
from vlmfast.ops.pixel_shuffle.connector import ACTIVATIONS
from vlmfast.ops.pixel_shuffle.definition import ORDERS, square

# ---- the code that the ops replace ----


def shuffle_upstream(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Callable[[], Tensor]:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    idefics: Any = Idefics3Connector.pixel_shuffle
    internvl: Any = InternVLModel.pixel_shuffle

    def run() -> Tensor:
        patches = (x if input_scale == 1.0 else x * input_scale).contiguous()  # both view their argument
        if grid[0] == grid[1]:
            tokens: Tensor = idefics(None, patches, scale)  # squares alone, any scale
            tokens = tokens.view(x.shape[0], grid[0] // scale, grid[1] // scale, tokens.shape[2])
        else:
            tokens = internvl(None, patches.view(x.shape[0], *grid, x.shape[2]), 1 / scale)  # a power of two
        return (tokens.transpose(1, 2) if order == "column" else tokens).flatten(1, 2)

    return run


def one_copy(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Callable[[], Tensor]:
    """Move each patch once; the code above moves it twice or three times."""
    (height, width), (batch, _, channels) = grid, x.shape
    axes = (0, 3, 1, 2, 4, 5) if order == "column" else (0, 1, 3, 2, 4, 5)

    def run() -> Tensor:
        patches = x if input_scale == 1.0 else x * input_scale
        blocks = patches.view(batch, height // scale, scale, width // scale, scale, channels).permute(axes)
        return blocks.reshape(batch, -1, scale * scale * channels)

    return run


def norm_upstream(*args: Any) -> Callable[[], Tensor]:
    return _norm(shuffle_upstream, *args)


def _norm(shuffle: Callable[..., Callable[[], Tensor]], *args: Any) -> Callable[[], Tensor]:
    call = named(definition.pixel_shuffle_norm, args)
    layout = call.grid, call.scale, call.order

    def norm(rows: Tensor) -> Tensor:
        return F.layer_norm(rows, call.norm_weight.shape, call.norm_weight, call.norm_bias, call.norm_eps)

    def run() -> Tensor:
        if call.norm_weight.shape[0] == call.x.shape[2]:
            return shuffle(norm(call.x if call.input_scale == 1.0 else call.x * call.input_scale), *layout)()
        return norm(shuffle(call.x, *layout, call.input_scale)())

    return run


def linear_upstream(*args: Any) -> Callable[[], Tensor]:
    return _linear(shuffle_upstream, *args)


def linear_one_copy(*args: Any) -> Callable[[], Tensor]:
    return _linear(one_copy, *args)


def _linear(shuffle: Callable[..., Callable[[], Tensor]], *args: Any) -> Callable[[], Tensor]:
    call = named(connector.pixel_shuffle_linear, args)
    layout = square(call.x) if call.grid is None else call.grid, call.scale, call.order, call.input_scale
    if call.norm_weight is None:
        tokens = shuffle(call.x, *layout)
    else:
        bias = torch.zeros_like(call.norm_weight) if call.norm_bias is None else call.norm_bias
        tokens = _norm(shuffle, call.x, call.norm_weight, bias, *layout, call.norm_eps)
    act = Identity() if call.activation is None else GELU(ACTIVATIONS[call.activation])
    return lambda: act(F.linear(tokens(), call.weight, call.bias))


def bare_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> Callable[[], Tensor]:
    """Multiply rows that are already shuffled: the limit."""
    rows = torch.randn(x.numel() // weight.shape[1], weight.shape[1], device=x.device).to(x.dtype)
    return lambda: F.linear(rows, weight, bias)


# ---- calls to test, to refuse and to time ----

# (B, C), the grid, the scale
_MAPS = [
    ((1, 64), (8, 12), 2),
    ((2, 24), (2, 6), 2),
    ((3, 7), (6, 4), 2),
    ((1, 32), (9, 9), 3),
    ((2, 16), (8, 4), 4),
    ((1, 1000), (2, 2), 2),
    ((0, 16), (4, 4), 2),
    ((2, 12), (6, 2), 2),
    ((2, 16), (0, 4), 2),
    ((2, 0), (4, 4), 2),
    ((2, 5), (3, 2), 1),
    ((2, 272), (6, 10), 2),
    ((2, 528), (6, 10), 2),  # compiles to the same kernel as a real shape, with partial blocks
]


def shuffle_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, ((batch, channels), grid, scale) in enumerate(_MAPS):
        x = torch.randn(batch, grid[0] * grid[1] + 1, channels, device=device, dtype=dtype)[:, 1:]  # behind a CLS token
        yield x, grid, scale, ORDERS[index % 2], (1.0, 0.5, 0.3)[index % 3]


def _tokens(x: Tensor, scale: int) -> Tensor:
    """Make tokens of the shape that the patches ``x`` are joined into."""
    return x.new_empty(x.shape[0], x.shape[1] // scale**2, x.shape[2] * scale**2).normal_()


def norm_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (x, grid, scale, order, input_scale) in enumerate(shuffle_samples(device, dtype)):
        if x.shape[2] == 0:
            continue  # the mean of no elements
        size = x.shape[2] * (1 if index // 2 % 3 == 1 else scale**2)
        weight, bias = torch.randn(2, size, device=device, dtype=dtype)
        offset = 10.0 * (index % 2)  # ViT features have rows whose mean is far from zero
        yield x + offset, weight, bias, grid, scale, order, input_scale, (1e-5, 1e-6)[index % 2]


def linear_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (x, grid, scale, order, input_scale) in enumerate(shuffle_samples(device, dtype)):
        channels = x.shape[2] * scale**2
        if channels == 0:
            continue
        # The variance of a trained layer: larger tokens would show the activation's curvature, not the op's error.
        weight = torch.randn(24, channels, device=device, dtype=dtype) * channels**-0.5
        bias = torch.randn(24, device=device, dtype=dtype)
        normalised = (None, channels, x.shape[2])[index // 2 % 3]
        norm = [None, None] if normalised is None else list(torch.randn(2, normalised, device=device, dtype=dtype))
        activation = (None, "gelu", "gelu_tanh")[index % 3]
        layout = x, weight, (None, bias)[index % 2], grid, scale, order, input_scale
        yield *layout, *norm, 1e-6, activation


# Images, patches, channels, scale, width of the language model, LayerNorm, activation
_CONNECTORS = {
    "InternViT-300M to 896": (32, 1024, 2, 896, True, "gelu"),
    "InternViT-300M to 3584": (32, 1024, 2, 3584, True, "gelu"),
    "nanoVLM": (32, 768, 4, 960, False, None),
    "Idefics3": (26, 1152, 2, 4096, False, None),
}


def _connectors(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    for images in (1,) if device == "cpu" else (1, 16, 64):
        for label, (side, channels, *rest) in _CONNECTORS.items():
            x = torch.randn(images, side * side, channels, device=device, dtype=dtype)
            yield f"{images} x {label}", x, ((side, side), *rest)


def shuffle_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, x, (grid, scale, *_) in _connectors(device, dtype):
        if "896" not in label:  # the width behind the shuffle does not matter here
            yield label.split(" to ")[0], (x, grid, scale)


def norm_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, (x, grid, scale) in shuffle_workloads(device, dtype):
        if "InternViT" in label:
            weight, bias = torch.randn(2, x.shape[2] * scale**2, device=device, dtype=dtype)
            yield label, (x, weight, bias, grid, scale)


def linear_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, x, (grid, scale, out, norm, activation) in _connectors(device, dtype):
        channels = x.shape[2] * scale**2
        weight = torch.randn(out, channels, device=device, dtype=dtype) * channels**-0.5
        bias, *vectors = (torch.randn(size, device=device, dtype=dtype) for size in (out, channels, channels))
        layout = (x, weight, bias if norm else None, grid, scale, "row", 1.0)
        yield label, (*layout, *(vectors if norm else (None, None)), 1e-5, activation)


# ---- the bytes of calls ----


def norm_backward_bytes(grad_output: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    """Count two operands in and one out; the weight, and the gradients of two parameters with their partial sums."""
    channels = weight.shape[0]
    return 3 * x.nbytes + 3 * weight.nbytes + 2 * partial_sums_bytes(x, channels, x.numel() // max(channels, 1))


def linear_bytes(x: Tensor, weight: Tensor, *_: Any) -> int:
    """Count patches and weight in, tokens out; the shuffled rows in between do not count."""
    return x.nbytes + weight.nbytes + x.numel() // weight.shape[1] * weight.shape[0] * x.element_size()


# ---- the cases of each op ----

_X, _GRID = torch.ones(1, 16, 8), (4, 4)

_BAD_LAYOUTS = (
    ("grid", (4, 3), ValueError, r"grid must be divisible by scale, 2, got \(4, 3\)"),
    ("scale", 3, ValueError, r"grid must be divisible by scale, 3, got \(4, 4\)"),
    ("grid", (4,), ValueError, r"grid must be \(height, width\), got \(4,\)"),
    ("scale", 0, ValueError, "scale must be an int of at least 1, got 0"),
    ("order", "diagonal", ValueError, "order must be one of 'row', 'column', got 'diagonal'"),
    ("input_scale", float("inf"), ValueError, "input_scale must be a finite number, got inf"),
)

pixel_shuffle = Cases(
    samples=shuffle_samples,
    good_call={"x": _X, "grid": _GRID},
    bad_calls=(
        *_BAD_LAYOUTS,
        ("x", _X[0], ValueError, r"x must have shape \(B, 16, C\) .* got \(16, 8\)"),
        ("grid", (4, 6), ValueError, r"x must have shape \(B, 24, C\) for a grid of \(4, 6\), got \(1, 16, 8\)"),
    ),
    workloads=shuffle_workloads,
    bytes=lambda x, *_: 2 * x.nbytes,
    upstream=shuffle_upstream,
    peers={"one copy": one_copy},
    limits={"x.clone()": lambda x, *_: x.clone},
)

pixel_unshuffle = derived(
    pixel_shuffle,
    lambda x, grid, scale, *rest: (_tokens(x, scale), grid, scale, *rest),
    good_call={"x": torch.ones(1, 4, 32), "grid": _GRID},
    bad_calls=(
        *_BAD_LAYOUTS,
        ("grid", (4, 6), ValueError, r"x must have shape \(B, 6, C\) for a grid of \(4, 6\), got \(1, 4, 32\)"),
        ("x", torch.ones(1, 4, 30), ValueError, r"x must have a multiple of scale\*\*2 = 4 channels, got 30"),
    ),
    bytes=lambda x, *_: 2 * x.nbytes,
)

pixel_shuffle_norm = Cases(
    samples=norm_samples,
    good_call={"x": _X, "norm_weight": torch.ones(32), "norm_bias": torch.ones(32), "grid": _GRID},
    bad_calls=(
        *_BAD_LAYOUTS,
        ("norm_weight", torch.ones(16), ValueError, r"norm_weight must have shape \(32,\).* or \(8,\).* got \(16,\)"),
        ("norm_bias", torch.ones(8), ValueError, "norm_bias must have the shape of norm_weight"),
        ("norm_eps", float("nan"), ValueError, "norm_eps must be finite and not negative, got nan"),
    ),
    workloads=norm_workloads,
    bytes=lambda x, weight, bias, *_: 2 * x.nbytes + weight.nbytes + bias.nbytes,
    flops=lambda x, *_: 8 * x.numel(),
    upstream=norm_upstream,
    requested=2.05,  # each row of 4096 loads weight and bias
)

pixel_shuffle_norm_backward = derived(
    pixel_shuffle_norm,
    lambda x, weight, bias, grid, scale, *rest: (_tokens(x, scale), x, weight, grid, scale, *rest),
    good_call={"grad_output": torch.ones(1, 4, 32), "x": _X, "norm_weight": torch.ones(32), "grid": _GRID},
    bad_calls=(
        *_BAD_LAYOUTS,
        ("grad_output", _X, ValueError, r"grad_output must have shape \(1, 4, 32\), got \(1, 16, 8\)"),
    ),
    bytes=norm_backward_bytes,
    flops=lambda grad_output, x, *_: 16 * x.numel(),
    launches={"triton": 3, "emulated": 2},
    requested=2.05,  # each row loads the weight in both passes
)

pixel_shuffle_linear = Cases(
    samples=linear_samples,
    good_call={"x": _X, "weight": torch.ones(5, 32), "bias": torch.ones(5)},
    bad_calls=(
        *_BAD_LAYOUTS,
        ("x", _X[0], ValueError, r"x must have shape \(B, height \* width, C\), got \(16, 8\)"),
        ("x", _X[:, :15], ValueError, "grid must be given: the 15 patches of x are no square"),
        ("weight", torch.ones(5, 31), ValueError, r"weight must have shape \(out, 32\), got \(5, 31\)"),
        ("bias", torch.ones(6), ValueError, r"bias must have shape \(5,\), .* got \(6,\)"),
        ("norm_weight", torch.ones(31), ValueError, r"norm_weight must have shape \(32,\)"),
        ("norm_bias", torch.ones(32), ValueError, "norm_bias must be None where norm_weight"),
        ("activation", "relu", ValueError, "activation must be one of 'gelu', 'gelu_tanh', got 'relu'"),
    ),
    workloads=linear_workloads,
    bytes=linear_bytes,
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
    upstream=linear_upstream,
    peers={"PyTorch, one copy": linear_one_copy},
    limits={"F.linear alone": bare_linear},
    compute_bound="a matrix multiplication of torch's, whose traffic nobody counts",
)
