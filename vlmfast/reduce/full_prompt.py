"""Arguments of ``generate`` that count columns of the caller's prompt, changed to fit a shortened one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vlmfast.reduce.prompt import ShortenedPrompt

# attributes of transformers' own processors and criteria that hold a number of columns from the beginning of the prompt
COUNTS = (
    "max_length",
    "min_length",
    "prompt_length_to_skip",
    "prompt_ignore_length",
    "begin_index",
    "regulation_start",
)


def fitted(model: Any, arguments: Mapping[str, Any], prompt: ShortenedPrompt) -> dict[str, Any]:
    """Return the arguments of ``generate`` that have to change: lengths, and callables that are given the ids.

    Args:
        model: the model, for its ``generation_config``.
        arguments: those of the call, by name.
        prompt: the shortened prompt.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    beams, sequences = (setting(model, arguments, name) or 1 for name in ("num_beams", "num_return_sequences"))
    rows = beams if beams > 1 else sequences  # of each sample
    changed = _lengths(model, arguments, prompt.columns.dropped)
    if (streamer := arguments.get("streamer")) is not None:
        changed["streamer"] = _Streamer(streamer, prompt)
    if (processors := arguments.get("logits_processor")) is not None:
        changed["logits_processor"] = LogitsProcessorList(_told(processors, prompt, rows))
    if (criteria := arguments.get("stopping_criteria")) is not None:
        changed["stopping_criteria"] = StoppingCriteriaList(_told(criteria, prompt, rows))
    if (allowed := arguments.get("prefix_allowed_tokens_fn")) is not None:
        changed["prefix_allowed_tokens_fn"] = _allowing(allowed, prompt, rows, beams)
    return changed


def _allowing(allowed: Callable[..., Any], prompt: ShortenedPrompt, rows: int, beams: int) -> Callable[..., Any]:
    """Wrap a ``prefix_allowed_tokens_fn``, so that it gets the full prompt."""
    return lambda number, ids: allowed(number, prompt.lengthen(ids[None], [number * beams // rows])[0])


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """Return the value in force: the argument, or else that of the first configuration that has one."""
    configs = (arguments.get("generation_config"), model.generation_config)
    values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def padding_mask(model: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Make the mask as ``generate`` does: padding is known by its id, unless the same id ends a text."""
    names = "pad_token_id", "eos_token_id"
    # None is a valid argument
    pad, end = (arguments[name] if name in arguments else setting(model, arguments, name) for name in names)
    if pad is None or pad in (end if isinstance(end, (list, tuple)) else [end]):
        return None
    ids: Tensor = arguments["input_ids"]
    return ids.ne(pad).long()


def _lengths(model: Any, arguments: Mapping[str, Any], dropped: int) -> dict[str, Any]:
    """Return ``max_length`` and ``min_length`` for the short prompt, unless only new tokens are counted."""
    config = arguments.get("generation_config")
    own = copy.deepcopy(config)
    changed: dict[str, Any] = {}
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        is_argument = arguments.get(name) is not None
        value = setting(model, arguments, name)
        if not value or (not is_argument and setting(model, arguments, instead)):
            continue
        if is_argument or getattr(config, name, None) is None:
            changed[name] = max(0, value - dropped)
        else:
            setattr(own, name, max(0, value - dropped))
            changed["generation_config"] = own
    return changed


def _told(functions: Iterable[Any], prompt: ShortenedPrompt, rows: int) -> list[Any]:
    """Return processors or criteria that get the full prompt; each sample has ``rows`` rows.

    ``generate`` recognises transformers' own by their classes. So these stay, with smaller numbers of columns, and a
    caller's function inside one of them gets the full prompt.
    """
    from transformers import PrefixConstrainedLogitsProcessor

    found: list[Any] = []
    for function in functions:
        if not type(function).__module__.startswith("transformers."):
            found.append(_Told(function, prompt))
            continue
        counting = copy.copy(function)
        for name in COUNTS:
            if getattr(counting, name, None) is not None:
                setattr(counting, name, getattr(counting, name) - prompt.columns.dropped)
        if isinstance(counting, PrefixConstrainedLogitsProcessor):
            allowed, beams = counting._prefix_allowed_tokens_fn, counting._num_beams
            counting._prefix_allowed_tokens_fn = _allowing(allowed, prompt, rows, beams)
        found.append(counting)
    return found


class _Told:
    """A caller's processor or criterion, which gets the full prompt instead of the short one."""

    def __init__(self, function: Callable[..., Any], prompt: ShortenedPrompt) -> None:
        self.function, self.prompt = function, prompt

    def __call__(self, ids: Tensor, scores: Any) -> Any:
        return self.function(self.prompt.lengthen(ids), scores)

    def __getattr__(self, name: str) -> Any:
        if name in ("function", "prompt"):  # while it is copied
            raise AttributeError(name)
        return getattr(self.function, name)


class _Streamer:
    """A streamer that gets the caller's prompt instead of the short one."""

    def __init__(self, streamer: Any, prompt: ShortenedPrompt) -> None:
        self.streamer, self.prompt = streamer, prompt
        self.started = False

    def put(self, value: Tensor) -> None:
        if not self.started:
            self.started, value = True, self.prompt.lengthen(value)
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
