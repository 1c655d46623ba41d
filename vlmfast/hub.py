"""Hugging Face's own ways of putting kernels into models: the package `kernels`, and classes replaced as models load.

`vlmfast.patch` does more: it also fuses additions with norms and replaces attention, MLPs and connectors. This module
is for programs that offer ``use_kernels=True``, or that load a model where nobody can call `vlmfast.patch`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.torch_version import TorchVersion

from vlmfast.ops.rope import qk_norm_rope
from vlmfast.patches.apply import patch, unpatch
from vlmfast.patches.plan import KNOWN
from vlmfast.patches.upstream import function_behind, source
from vlmfast.torch_internals import is_compiling

ROTARY = "cb929295b09eeb97"  # the digest of Llama's apply_rotary_pos_emb, which most models have


# ---- layers of `kernels`: it binds their forward to a module, and accepts no other members ----


class _Layer(nn.Module):
    can_torch_compile = has_backward = True


class RMSNorm(_Layer):
    """Stands for the classes named "RMSNorm" and "RMSNormZeroCentered", which have several orders of rounding.

    The body of the module's own class decides, as in a patch; one that vlmfast does not know runs itself.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise rows, (..., D) to (..., D)."""
        return _norm_of(type(self))(self, hidden_states)  # type: ignore[no-any-return]


class RMSNormGated(_Layer):
    """Stands for the classes named "RMSNormGated", likewise."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise rows and multiply them by the gate, (..., D) to (..., D)."""
        return _norm_of(type(self))(self, hidden_states, gate)  # type: ignore[no-any-return]


class Rotary(_Layer):
    """Stands for the functions named "rotary_pos_emb"; one that is not Llama's runs itself."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys (B, H, T, head_dim) by angles (B, T, head_dim)."""
        own: Any = type(self)
        like_op = unsqueeze_dim == 1 and q.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]
        if like_op and not is_compiling() and _is_rotary(own):
            with contextlib.suppress(TypeError, ValueError):  # float64, or shapes that only the function broadcasts
                query, key = qk_norm_rope(q.transpose(1, 2), k.transpose(1, 2), None, None, cos, sin)
                return query.transpose(1, 2), key.transpose(1, 2)
        return own.forward(self, q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]


def _norm_of(cls: Any) -> Callable[..., Any]:
    """Return what runs in the place of a norm: the replacement of a patch, or the forward of its class."""
    return cls.forward if is_compiling() else _replacement(cls)  # type: ignore[no-any-return]


@functools.cache
def _replacement(cls: Any) -> Callable[..., Any]:
    body = KNOWN.get(("forward", _digest(cls, "forward")))
    return cls.forward if body is None or body.function is None else body.function


@functools.cache
def _is_rotary(cls: type) -> bool:
    function = function_behind(object.__new__(cls))
    if not isinstance(function, FunctionType):
        return False
    return _digest(type("", (), {function.__name__: function}), function.__name__) == ROTARY


def _digest(cls: type, method: str) -> str:
    try:
        return source(cls, method).digest
    except (OSError, TypeError, SyntaxError):  # its source cannot be read
        return ""


@dataclass(frozen=True)
class Layer:
    """What `kernels` loads a layer from: this file, so that nothing is downloaded."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """Return the class."""
        return self.layer


LAYERS = {"RMSNorm": RMSNorm, "RMSNormZeroCentered": RMSNorm, "RMSNormGated": RMSNormGated, "rotary_pos_emb": Rotary}
DEVICES = ("cpu", "cuda", "rocm")


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """Map layers of transformers to ops of vlmfast, for ``kernels.use_kernel_mapping`` and ``kernels.kernelize``.

    It is for every mode. `kernels` has no way back, and a rotary function belongs to all models of its modelling file.

    Returns:
        Name of a layer -> device type ("cpu", "cuda" or "rocm") -> what `kernels` loads the layer from.

    Raises:
        ImportError: if `kernels` is not installed.
    """
    _check_kernels()
    return {name: dict.fromkeys(DEVICES, Layer(layer)) for name, layer in LAYERS.items()}


def kernel_config() -> Any:
    """Make the ``kernel_config`` of ``from_pretrained(..., use_kernels=True, kernel_config=kernel_config())``.

    It replaces transformers' own mapping, so that nothing is downloaded. `kernel_mapping` alone would not do there:
    ``use_kernels=True`` registers transformers' mapping over it.

    Raises:
        ImportError: if `kernels` is not installed in a version that transformers takes, or transformers is older than
            5.17.
    """
    _check_kernels()
    try:
        from transformers.integrations.hub_kernels import get_kernel_mapping_transformers as upstream_mapping
        from transformers.utils.kernel_config import KernelConfig
    except ImportError as error:
        raise ImportError(
            "vlmfast.hub.kernel_config needs transformers 5.17 or later, and the version of kernels that it takes "
            f"(use_kernels=True says which): {error}"
        ) from error

    class VlmfastKernels(KernelConfig):  # type: ignore[misc]
        """Empty until the model is built: transformers accepts repositories on the Hub or on disk only.

        Of a name that stands for nothing `kernels` warns at each layer; an empty entry leaves the layer as it is.
        """

        def create_compatible_mapping(self, model: nn.Module, compile: bool = False) -> None:
            self.kernel_mapping: Any = {name: {} for name in upstream_mapping()} | kernel_mapping()

    return VlmfastKernels(inherit_mapping=False)


def _check_kernels() -> None:
    try:
        found = TorchVersion(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("vlmfast.hub needs the package kernels of Hugging Face: pip install kernels") from None
    if found < "0.16":
        raise ImportError(f"vlmfast.hub needs kernels 0.16 or later, which has kernels for CPUs too, got {found}")


# ---- models that are patched as they are built ----


class _Patching(type):
    """Metaclass of the classes that stand for models: calling one makes the model, and patches it."""

    model: type[nn.Module]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        built = cls.model(*args, **kwargs)
        unpatch(built)  # a language model in it that was registered too
        try:
            patch(built)
        except (RuntimeError, ValueError) as error:  # raised, it would leave transformers half replaced
            warnings.warn(f"{cls.__name__} is not patched: {error}", stacklevel=2)
        return built


def register(*model_types: str) -> None:
    """Let ``from_pretrained`` build models of these types as `vlmfast.patch` leaves them, until `unregister`.

    For programs that load the model themselves. Models with a head, as of ``AutoModelForImageTextToText``, get a
    patched model inside, such as ``LlavaModel``; ``AutoModel`` makes that one directly, and unpatched. What cannot be
    patched is built as before, with a warning. Every load takes seconds longer, for transformers then looks for the
    class in all of its modules.

    Args:
        *model_types: one or several ``config.model_type``, such as ``"llava"`` or ``"qwen3_vl"``.

    Raises:
        ImportError: if transformers is older than 5.17. TypeError, ValueError: if no type is given, or one is not a
            string that ``AutoModel`` knows, or is registered already.
    """
    classes = _model_classes(model_types)
    _monkey_patching().register_patch_mapping(
        {cls.__name__: _Patching(cls.__name__, (cls,), {"model": cls}) for cls in classes}
    )


def unregister(*model_types: str) -> None:
    """Undo `register`: new models are built unpatched, and those that are built already stay as they are.

    Raises:
        ImportError, TypeError, ValueError: as `register` does, and for a type that is not registered.
    """
    classes = _model_classes(model_types)
    _monkey_patching().unregister_patch_mapping([cls.__name__ for cls in classes])


def _monkey_patching() -> Any:
    try:
        return importlib.import_module("transformers.monkey_patching")
    except ImportError as error:
        raise ImportError("vlmfast.hub.register needs transformers 5.17 or later, with monkey_patching") from error


def _model_classes(model_types: tuple[str, ...]) -> list[type[nn.Module]]:
    """Return the classes that ``AutoModel`` makes of types of models."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    if not model_types:
        raise ValueError("model_types must be one type of model or several, such as 'llava', got none")
    for name in model_types:
        if not isinstance(name, str):
            raise TypeError(f"model_types must be strings, got {type(name).__name__}")
        if name not in CONFIG_MAPPING or CONFIG_MAPPING[name] not in MODEL_MAPPING:
            raise ValueError(f"model_types must be types of models that AutoModel knows, got {name!r}")
    found = [MODEL_MAPPING[CONFIG_MAPPING[name]] for name in dict.fromkeys(model_types)]
    return [cls[0] if isinstance(cls, tuple) else cls for cls in found]
