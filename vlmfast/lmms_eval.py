"""lmms-eval with fewer visual tokens: ``reduce=scope:64`` as one more argument of its Hugging Face models.

Once vlmfast is installed, lmms-eval 0.7 finds this module by its entry point. The models of `MODELS` keep their names,
and are what they were until they are given the argument::

    lmms-eval --model qwen2_5_vl --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,reduce=scope:0.1 --tasks mme
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import vlmfast
from vlmfast.reduce.spelling import parse

MODELS = ("huggingface", "internvl_hf", "llava_hf", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl")
TABLES = {"simple": "AVAILABLE_SIMPLE_MODELS", "chat": "AVAILABLE_CHAT_TEMPLATE_MODELS"}


class Reducing:
    """What a model of lmms-eval inherits from first, so that it takes ``reduce``."""

    def __init__(self, *args: Any, reduce: str | None = None, **kwargs: Any) -> None:
        """Load the model as lmms-eval does, then patch it.

        Args:
            args: what its own class takes.
            reduce: a method as `vlmfast.reduce.spelling.parse` reads it; without one the model stays as it is. In
                ``--model_args`` one with commas stands in quotes, which lmms-eval leaves in the text.
            kwargs: what its own class takes.

        Raises:
            ValueError: for a method that is not known, before the model is loaded, or one that does not fit the model.
        """
        method = parse(reduce.strip("'\""), kind=None) if reduce is not None else None
        super().__init__(*args, **kwargs)
        if method is not None:
            self.patch = vlmfast.patch(self.model, reduce=method)  # type: ignore[attr-defined]
            print(self.patch.report())


def manifests() -> list[Any]:
    """Say which classes lmms-eval loads for the models of `MODELS`: what its entry points ask for."""
    models = importlib.import_module("lmms_eval.models")
    manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest

    def path(kind: str, name: str) -> str | None:
        return f"{__name__}.{kind}__{name}" if name in getattr(models, TABLES[kind]) else None

    return [
        manifest(name, simple_class_path=path("simple", name), chat_class_path=path("chat", name))
        for name in MODELS
        if path("simple", name) or path("chat", name)
    ]


@functools.cache
def __getattr__(attribute: str) -> type:
    """Make the class of ``simple__llava_hf`` and the like when lmms-eval imports it."""
    kind, _, name = attribute.partition("__")
    if name not in MODELS or kind not in TABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    table = getattr(importlib.import_module("lmms_eval.models"), TABLES[kind])
    theirs = getattr(importlib.import_module(f"lmms_eval.models.{kind}.{name}"), table[name])
    return type(theirs.__name__, (Reducing, theirs), {"__module__": __name__, "__doc__": theirs.__doc__})
