"""Runs a vision tower once, and records by hooks what a method needs: the queries and keys of one layer.

Layers run with their configured attention. Towers must have separate projections for queries and keys: CLIP, SigLIP,
InternVL. The scores are the attention of the CLS token, the first one; without it, the attention that a token gets from
all tokens of its image.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmfast.functions import accepting
from vlmfast.ops.attention_scores import cls_attention, received_attention
from vlmfast.reduce.text import Text, unknown
from vlmfast.reduce.tokens import Selection, VisualTokens


def sizes_in(inputs: Mapping[str, Any], name: str, pixels: str) -> Tensor:
    """Return the sizes of images or videos, which a processor gives with their pixels.

    Raises:
        ValueError: if they are not there.
    """
    if inputs.get(name) is None:
        raise ValueError(f"{name} must be given with {pixels}, as the processor makes it, got none")
    return torch.as_tensor(inputs[name])


@dataclass(frozen=True)
class EncodedImages:
    """The output of a tower for B images, or crops of images, of T tokens each, including a CLS token."""

    pixels: Tensor  # (B, ...), the input of the tower
    output: Any  # the output of the tower
    hidden: Tensor  # (B, T, C), the wanted hidden states; those of several layers side by side
    query: Tensor  # (B, T, H, head_dim), the queries of the scored layer, without a gradient
    key: Tensor  # (B, T, H, head_dim), its keys, without a gradient
    scale: float  # of its logits
    has_cls: bool  # whether the first token is a CLS token

    @property
    def patches(self) -> Tensor:
        """(B, N, C): the hidden states without a CLS token."""
        return self.hidden[:, int(self.has_cls) :]

    def scores(self) -> Tensor:
        """(B, N) float32, of a float64 model float64: the attention that each patch gets."""
        batch, tokens, heads, size = self.key.shape
        if self.has_cls:
            return accepting(cls_attention, self.key)(self.query[:, 0], self.key.transpose(1, 2), self.scale)
        query, key = (rows.reshape(batch * tokens, heads, size).transpose(0, 1) for rows in (self.query, self.key))
        bounds = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=key.device)
        return accepting(received_attention, key)(query, key, bounds, 1, self.scale).view(batch, tokens)

    def metric(self) -> Tensor:
        """(B, N, head_dim): the keys of the patches, averaged over the heads."""
        return self.key[:, int(self.has_cls) :].mean(2)

    @property
    def side(self) -> int:
        """The number of patches along a side of an image, which is square."""
        return math.isqrt(self.patches.shape[1])

    def visual_tokens(
        self, features: Callable[[], Tensor], has_cls: bool, total: int, text: Callable[[], Text] = unknown
    ) -> VisualTokens:
        """Make the `VisualTokens` of towers whose patches are the visual tokens.

        Args:
            features: gives the projected patches.
            has_cls: whether the method may keep the CLS token.
            total: the number of tokens that the model makes of each image.
            text: gives the text about each.
        """
        return VisualTokens(
            hidden=self.patches,
            grid=(1, self.side, self.side),
            scores=self.scores,
            metric=self.metric,
            features=lambda: features().detach(),
            pixels=lambda: self.pixels,
            text=text,
            has_cls=has_cls,
            total=total,
        )

    def reduce(self, selection: Selection, images: list[int] | None = None) -> Tensor:
        """(B, n, C): the rows of a selection, with the CLS token in front if it is kept.

        Args:
            selection: for all images, or for some of them.
            images: the numbers of these images, ascending.
        """
        hidden = self.hidden if images is None or len(images) == len(self.hidden) else self.hidden[images]
        rows = selection.apply(hidden[:, int(self.has_cls) :])
        # a linear layer rounds differently if its input is not contiguous, so rows are laid out as upstream's
        if not self.has_cls:
            return rows if self.hidden.is_contiguous() else rows.mT.contiguous().mT
        rows = torch.cat([hidden[:, :1], rows], 1)
        return rows if selection.keep_cls else rows[:, 1:]


def encode(tower: nn.Module, pixel_values: Tensor, feature_layer: int | Sequence[int], **inputs: Any) -> EncodedImages:
    """Run the tower once.

    Args:
        tower: the vision tower.
        pixel_values: the images, or crops of images.
        feature_layer: which of ``hidden_states`` the model takes its features from, one or several, as in its
            ``config.vision_feature_layer``. The scored layer is the one that they come out of; of several the last one.
        inputs: the tower's other arguments.

    Raises:
        ValueError: for a layer that the tower does not have, the input of the first one, or a tower with another kind
            of attention. RuntimeError: as `recorded`.
    """
    wanted = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    attention: Any = _attention(tower, wanted)

    def projection(letter: str) -> Any:
        # InternVL can normalise queries and keys; otherwise these modules are identities
        return getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_proj")

    # older releases of transformers do not take a list
    capturing = sys.modules.get("transformers.utils.output_capturing")
    states = wanted if hasattr(capturing, "select_hidden_states") else True
    takes = inspect.signature(type(tower).forward).parameters.values()
    if any(parameter.name == "return_dict" or parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        inputs["return_dict"] = True  # some towers return nothing else
    with recorded(query=projection("q"), key=projection("k")) as calls:
        output = tower(pixel_values, output_hidden_states=states, **inputs)
    query, key = (calls[name].output.detach().unflatten(-1, (attention.num_heads, -1)) for name in ("query", "key"))
    features = [output.hidden_states[index] for index in wanted]
    hidden = features[0] if len(features) == 1 else torch.cat(features, -1)
    return EncodedImages(pixel_values, output, hidden, query, key, attention.scale, has_cls(tower))


class Call(NamedTuple):
    """The arguments and the output of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, Call]]:
    """Record the call of each module, which this thread must call once within the block.

    Raises:
        RuntimeError: if the hooks did not run once each. Layers that are compiled by themselves or with their encoder
            share one trace, with or without hooks.
    """
    thread = threading.get_ident()
    calls: dict[str, Call] = {}
    seen: list[str] = []

    def record(name: str, _: nn.Module, *call: Any) -> None:
        # torch reads its hooks and which of them take keyword arguments one after the other: another thread, caught
        # while this one adds or removes a hook, calls it without them
        if threading.get_ident() == thread:
            calls[name] = Call(*call)
            seen.append(name)

    hooks = [
        module.register_forward_hook(functools.partial(record, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
    if sorted(seen) != sorted(modules):
        raise RuntimeError(
            "the vision tower passed its hooks by, as it does where it or its layers are compiled by themselves: "
            "compile the whole model, or not the tower"
        )


def vision_setting(model: nn.Module, inputs: Mapping[str, Any], name: str) -> Any:
    """Return an argument of the model's ``get_image_features`` if it is given, or else the configuration's value."""
    value = inputs.get(name)
    return getattr(model.config, name) if value is None else value


def has_cls(tower: nn.Module) -> bool:
    """Tell whether the tower puts a CLS token in front of the patches."""
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


def _attention(tower: nn.Module, wanted: list[int]) -> nn.Module:
    """Find the attention of the last layer that one of these hidden states comes out of."""
    encoder = getattr(tower, "encoder", None)
    layers = getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"the vision tower must be of the kind of CLIP, SigLIP or InternVL, got {type(tower).__name__}"
        )
    states = len(layers) + 1  # the input of the first layer, then the output of each
    if any(not -states <= index < states or index % states == 0 for index in wanted):
        raise ValueError(
            f"vision_feature_layer must name outputs of the {len(layers)} layers of the vision tower, got {wanted}"
        )
    layer = layers[max(index % states for index in wanted) - 1]
    attention: nn.Module | None = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
    if attention is None or not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "num_heads", "scale")):
        raise ValueError(
            f"the attention of the vision tower must project queries and keys by themselves, got "
            f"{type(attention).__name__}"
        )
    return attention
