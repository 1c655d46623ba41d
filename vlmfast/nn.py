"""Modules made of vlmfast's ops, whose parameters match existing checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlmfast import checks
from vlmfast.functions import accepting
from vlmfast.modules import is_plain
from vlmfast.ops.pixel_shuffle import pixel_shuffle, pixel_shuffle_linear
from vlmfast.ops.pixel_shuffle.connector import ACTIVATIONS
from vlmfast.ops.pixel_shuffle.definition import ORDERS, square

# The parts of a connector under the names that transformers and nanoVLM give them
_NORM = ("layer_norm.",)
_FIRST = ("linear_1.", "modality_projection.proj.", "proj.")
_LAST = ("linear_2.",)

M = TypeVar("M", bound=nn.Module)
_ACTIVATION_OF = {approximation: name for name, approximation in ACTIVATIONS.items()}


class PixelShuffleConnector(nn.Sequential):
    """The connector between a vision tower and a language model: pixel shuffle, LayerNorm, Linear, GELU, Linear.

    It is the ``nn.Sequential`` of what follows the shuffle, and its ``state_dict`` is that of InternVL's ``mlp1``
    (``0.weight``, ``0.bias``, ``1.weight``, ``1.bias``, ``3.weight``, ``3.bias``) or, without the LayerNorm, of the
    ``mlp2x_gelu`` of LLaVA and VITA. ``load_state_dict`` also takes the names of transformers'
    ``InternVLMultiModalProjector`` (``layer_norm``, ``linear_1``, ``linear_2``), ``Idefics3Connector`` and
    ``SmolVLMConnector`` (``modality_projection.proj``) and of nanoVLM's ``ModalityProjector`` (``proj``).

    Which arguments make which connector:

    * InternVL: ``PixelShuffleConnector(C, out)``; with ``order="column"`` for version v1 of its shuffle.
    * VITA: ``PixelShuffleConnector(C, out, norm=False, input_scale=0.5)``.
    * Idefics3, SmolVLM, nanoVLM: ``PixelShuffleConnector(C, out, scale, norm=False, activation=None, linears=1,
      bias=False)``.

    A part that was replaced by another module (LoRA, a quantised Linear) or has hooks runs as the module that it is;
    the parts in front of it are joined.

    Args:
        channels: C, those of one patch.
        out: the width of the language model.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row", or "column" (InternVL v1).
        input_scale: multiplies the features before the shuffle.
        norm: whether a LayerNorm over the ``scale**2 * C`` channels of a token follows the shuffle.
        norm_eps: added to its variance.
        activation: what follows the first Linear: "gelu" (exact), "gelu_tanh" or None.
        linears: 1 or 2; the second one is ``out`` wide on both sides.
        bias: whether the Linears have one.
        drop_cls: whether the first row of the features is a CLS token, which is left out without a copy of the others.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError or ValueError: for an argument out of range.

    Source:
        InternVLModel.pixel_shuffle with InternVLMultiModalProjector, and Idefics3Connector, of transformers 5.23.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        scale: int = 2,
        order: str = "row",
        input_scale: float = 1.0,
        *,
        norm: bool = True,
        norm_eps: float = 1e-5,
        activation: str | None = "gelu",
        linears: int = 2,
        bias: bool = True,
        drop_cls: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("channels", channels), ("out", out), ("scale", scale)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        checks.one_of("order", order, ORDERS)
        checks.epsilon("norm_eps", norm_eps)
        if activation is not None:
            checks.one_of("activation", activation, tuple(ACTIVATIONS))
        if linears not in (1, 2):
            raise ValueError(f"linears must be 1 or 2, got {linears!r}")
        width = scale**2 * channels
        parts: list[nn.Module] = [nn.LayerNorm(width, norm_eps, device=device, dtype=dtype)] if norm else []
        parts.append(nn.Linear(width, out, bias, device, dtype))
        if activation is not None:
            parts.append(nn.GELU(ACTIVATIONS[activation]))
        if linears == 2:
            parts.append(nn.Linear(out, out, bias, device, dtype))
        super().__init__(*parts)
        self.scale, self.order, self.input_scale, self.drop_cls = scale, order, input_scale, drop_cls

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:  # type: ignore[override]
        """Make the tower's features into tokens of the language model.

        Args:
            x: (B, height * width, C) of the dtype of the weights, row-major patches, behind a CLS token with
                ``drop_cls``; any strides.
            grid: (height, width) of the patches, both divisible by the scale; None for a square.

        Returns:
            (B, height * width / scale**2, out).

        Raises:
            TypeError: for what is no tensor. ValueError: for a shape or a grid that does not fit.
        """
        patches = x[:, 1:] if self.drop_cls else x
        return apply_shuffled(list(self), patches, grid, self.scale, self.order, self.input_scale)

    def extra_repr(self) -> str:
        """Describe the layout, in front of the parts."""
        cls = ", drop_cls=True" if self.drop_cls else ""
        return f"scale={self.scale}, order={self.order!r}, input_scale={self.input_scale}{cls}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        places = [name for name, part in self.named_children() if not isinstance(part, nn.GELU)]
        roles = ([_NORM] if isinstance(self[0], nn.LayerNorm) else []) + [_FIRST, _LAST]
        for place, names in zip(places, roles, strict=False):  # there may be no last Linear
            for name in names:
                for key in [key for key in state_dict if key.startswith(prefix + name)]:
                    state_dict[f"{prefix}{place}.{key.removeprefix(prefix + name)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def apply_shuffled(
    modules: Sequence[nn.Module],
    x: Tensor,
    grid: Sequence[int] | None = None,
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
) -> Tensor:
    """Apply modules, one after the other, to ``pixel_shuffle(x, ...)``.

    A leading LayerNorm, Linear and GELU are computed by one `vlmfast.pixel_shuffle_linear`, unless one of them is of
    another class, even a derived one, or has hooks, like modules of PEFT, of quantisers and of accelerate, or ``x`` has
    a dtype that the ops do not take.

    Args:
        modules: the modules that follow the shuffle.
        x: (B, height * width, C) of the dtype of the modules, row-major patches; any strides.
        grid: (height, width) of the patches, both divisible by ``scale``; None for a square.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row" or "column".
        input_scale: multiplies ``x``, rounded to its dtype.

    Returns:
        What the last module returns.

    Raises:
        TypeError: for what is no tensor. ValueError: for a shape, a grid or an order that does not fit.
    """
    norm = _first(modules, nn.LayerNorm)
    rest = modules if norm is None else modules[1:]
    linear = _first(rest, nn.Linear)
    # a norm may have no weight, or be for another width
    unfit = norm is not None and linear is not None and getattr(norm.weight, "shape", None) != linear.weight.shape[1:]
    shuffle = accepting(pixel_shuffle, x)
    if linear is None or unfit or shuffle is not pixel_shuffle:
        tokens, rest = shuffle(x, square(x) if grid is None else grid, scale, order, input_scale), modules
    else:
        gelu = _first(rest[1:], nn.GELU)
        rest = rest[1:] if gelu is None else rest[2:]
        activation = None if gelu is None else _ACTIVATION_OF[gelu.approximate]
        weight, bias, eps = (None, None, 1e-5) if norm is None else (norm.weight, norm.bias, norm.eps)
        layout = grid, scale, order, input_scale
        tokens = pixel_shuffle_linear(x, linear.weight, linear.bias, *layout, weight, bias, eps, activation)
    for module in rest:
        tokens = module(tokens)
    return tokens


def _first(modules: Sequence[nn.Module], cls: type[M]) -> M | None:
    return modules[0] if modules and is_plain(modules[0], cls) else None
