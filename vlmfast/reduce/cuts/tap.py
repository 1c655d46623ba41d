"""Queries and keys of one attention as its attention function gets them, after the rotary embedding and the cache.

The attention reads the name of its function from its ``config``. A patch makes that a property of its class. While a
run taps the attention, the property returns a configuration with another name, under which a function is registered
that looks at queries and keys and then calls the configured function. Nothing is stored on the module, and masks are
made for the configured function.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from vlmfast.torch_internals import is_compiling

NAME = "vlmfast_tap"


class Watching(Protocol):
    """An object that runs a language model and cuts its tokens."""

    tapped: nn.Module | None  # the attention to look at

    def see(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Look at (B, H, T, D) queries and (B, K, N, D) keys."""

    def call(self, layer: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call a layer."""


# the run of this thread, and not of threads that it starts
RUN: ContextVar[Watching | None] = ContextVar("vlmfast_run", default=None)


class _Tapped:
    """A configuration that names the function which looks at queries and keys."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _config(self: nn.Module) -> Any:
    config = vars(self)["config"]
    if is_compiling():
        return config
    run = RUN.get()
    return config if run is None or run.tapped is not self else _Tapped(config)


def _set_config(self: nn.Module, value: Any) -> None:
    vars(self)["config"] = value


CONFIG = property(_config, _set_config)


@functools.cache
def register() -> None:
    """Register the function with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _look)


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    run: Any = RUN.get()
    run.tapped = None  # from here on the module shows its own configuration
    run.see(query, key, kwargs.get("scaling"))
    return _configured(module)(module, query, key, value, attention_mask, *args, **kwargs)


def _configured(module: nn.Module) -> Callable[..., Any]:
    """Find the attention function as upstream does."""
    from transformers import AttentionInterface

    name = vars(module)["config"]._attn_implementation
    files = (vars(sys.modules[cls.__module__]) for cls in type(module).__mro__)
    eager = next((file["eager_attention_forward"] for file in files if "eager_attention_forward" in file), None)
    found: Callable[..., Any] | None = AttentionInterface().get_interface(name, eager)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no attention function {name}, which visual tokens are cut by")
    return found
