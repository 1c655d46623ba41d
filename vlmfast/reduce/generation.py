"""``forward`` and ``generate`` of a model whose prompts are shortened before the language model sees them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.modules import replaced_on_instances
from vlmfast.reduce.columns import Columns
from vlmfast.reduce.families import REDUCERS, Reducer
from vlmfast.reduce.images import ReducedImage
from vlmfast.reduce.methods import Method
from vlmfast.reduce.prompt import (
    Cached,
    ShortPrompt,
    base_of,
    features,
    named,
    parameters,
    shorten,
    takes_features,
)

MEMORY = "_vlmfast_cached"  # the attribute of a cache that holds a `Cached`
# In a transformers whose forward encodes images itself, what get_image_features of the base model gives in this call:
# a function of the pixel values, which generate may have repeated for beams.
_ready: ContextVar[Callable[[Tensor], Any] | None] = ContextVar("vlmfast_image_features", default=None)


@dataclass
class Reduction:
    """How the prompts of a patched model are shortened, and what became of the last one.

    Attributes:
        model_class: the class of the model with its head.
        base_class: the class of the model without it.
        reducer: of the model's type.
        method: how visual tokens are reduced.
        images: the images of the last prompt that had any, without gradients.
        before: columns of that prompt.
        after: columns of what the language model saw of it.
    """

    model_class: type[Any]
    base_class: type[Any]
    reducer: Reducer
    method: Method
    images: list[ReducedImage] = field(default_factory=list)
    before: int = 0
    after: int = 0

    def replacements(self) -> dict[type, dict[str, Callable[..., Any]]]:
        """Return the replacement of each method: class -> method -> function."""
        cls, base = self.model_class, self.base_class
        found = {cls: {"forward": _forward(self, cls), "generate": _generate(self, cls)}}
        if not takes_features(cls):
            found[base] = {"get_image_features": _get_image_features(base)}
        return found

    def report(self) -> str:
        """The method, and what it did to the last prompt."""
        if not self.images:
            return f"{self.method}: no prompt with images yet"
        sizes = [f"{image.total} -> {image.features.shape[0]}" for image in self.images]
        saved = 1 - self.after / self.before
        return (
            f"{self.method}: visual tokens of the last prompt {', '.join(sizes)}; prompt {self.before} -> {self.after} "
            f"({saved:.1%} saved)"
        )

    def shorten(self, model: nn.Module, arguments: Mapping[str, Any], cached: Cached | None) -> ShortPrompt:
        """`shorten`, noted for the report."""
        prompt = shorten(model, self.reducer, self.method, arguments, cached)
        if prompt.images:
            self.images = [
                replace(image, features=image.features.detach(), levels=tuple(level.detach() for level in image.levels))
                for image in prompt.images
            ]
            self.before, self.after = prompt.cached.columns.total, prompt.cached.columns.index.shape[1]
        return prompt

    @contextmanager
    def call(self, model: nn.Module, prompt: ShortPrompt) -> Iterator[dict[str, Any]]:
        """The arguments of the original method; in the block it gets the reduced features from them."""
        if not prompt.images:
            yield prompt.arguments
            return
        base = base_of(model)
        if takes_features(type(model)):
            yield with_features(base, self.reducer, prompt)
            return
        pixels = prompt.vision["pixel_values"]

        def ready(pixel_values: Tensor) -> Any:
            return features(base, self.reducer, prompt.samples, max(1, pixel_values.shape[0] // pixels.shape[0]))

        token = _ready.set(ready)
        try:
            yield {**prompt.arguments, **prompt.vision}
        finally:
            _ready.reset(token)


def shortening(model: nn.Module, method: object) -> Reduction:
    """Say how prompts of this model are shortened with this method: its `Reduction.replacements` do it.

    Args:
        model: a Hugging Face model with its head, perhaps in the wrapper of PEFT.
        method: how visual tokens are reduced.

    Raises:
        TypeError: if ``method`` is none. ValueError: if the visual tokens of the model cannot be reduced. RuntimeError:
            if a method to be replaced is hidden by one on the instance.
    """
    if not isinstance(method, Method):
        raise TypeError(f"reduce must be a method such as vlmfast.VisionZip(54, 10), got {type(method).__name__}")
    model, reducer = reducible(model)
    for name in ("forward", "generate"):
        if reason := replaced_on_instances([model], type(model), name):
            raise RuntimeError(f"prompts cannot be shortened: {reason}")
    return Reduction(type(model), type(base_of(model)), reducer, method)


def reducible(host: Any) -> tuple[nn.Module, Reducer]:
    """Return a model whose visual tokens can be reduced, out of the wrapper of PEFT if it is in one, and its reducer.

    Raises:
        ValueError: if they cannot.
    """
    from transformers import GenerationMixin

    model = host.get_base_model() if hasattr(host, "get_base_model") else host
    name = type(model).__name__
    base = getattr(model, "base_model", None)
    model_type: str = model.config.model_type
    if not model_type.startswith(tuple(REDUCERS)):  # "qwen3_vl_text" is a part of a model whose tokens can be
        known = ", ".join(REDUCERS)
        raise ValueError(f"the visual tokens of {name} cannot be reduced; those of these families can: {known}")
    if not hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):  # what decoding goes on from
        raise ValueError("reduce needs transformers 5.17 or later")
    is_whole = base not in (None, model) and hasattr(base, "get_image_features") and hasattr(model, "generate")
    if model_type not in REDUCERS or not is_whole:
        raise ValueError(f"reduce needs the model with its vision tower and its language head, got {name}")
    return model, REDUCERS[model_type]


def with_features(base: Any, reducer: Reducer, prompt: ShortPrompt) -> dict[str, Any]:
    """The arguments of a call, with the images, and videos beside them, as ``mm_encoder_outputs``."""
    arguments = dict(prompt.arguments)
    outputs = {"image": features(base, reducer, prompt.samples)}
    if arguments.get("pixel_values_videos") is not None:
        video = named({**prompt.vision, **arguments}, parameters(type(base).get_video_features))
        outputs["video"] = base.get_video_features(**video, return_dict=True)
        arguments = {name: value for name, value in arguments.items() if name not in video}
    return {**arguments, "mm_encoder_outputs": outputs}


# ---- forward ----


def _forward(reduction: Reduction, cls: type) -> Callable[..., Any]:
    original: Callable[..., Any] = cls.forward  # type: ignore[attr-defined]
    names = parameters(original)
    # Not traced: it waits for the device to learn the shape of the short prompt. A decorator of the function would
    # load torch's compiler wherever vlmfast is imported.
    short_forward = torch.compiler.disable(_short_forward, recursive=False)  # type: ignore[no-untyped-call]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        cached = getattr(arguments.get("past_key_values"), MEMORY, None)
        if arguments.get("pixel_values") is None and cached is None:
            return original(self, *args, **kwargs)
        return short_forward(reduction, original, self, arguments, cached)

    return forward


def _short_forward(
    reduction: Reduction,
    original: Callable[..., Any],
    model: nn.Module,
    arguments: dict[str, Any],
    cached: Cached | None,
) -> Any:
    if _ready.get() is not None:  # within generate, of a prompt that is short already
        return original(model, **arguments)
    cache = arguments.get("past_key_values")
    if cached is not None and arguments.get("pixel_values") is None:
        return original(model, **_continued(base_of(model), arguments, cached))
    if cache is not None and cache.get_seq_length():
        raise ValueError("images in a forward call after a cached prompt cannot be reduced: use generate")
    prompt = torch.compiler.disable(reduction.shorten)(model, arguments, None)  # type: ignore[no-untyped-call]
    with reduction.call(model, prompt) as short:
        output = original(model, **short)
    _remember(_cache_of(output) if cache is None else cache, prompt.cached)
    return output


def _continued(base: Any, arguments: dict[str, Any], cached: Cached) -> dict[str, Any]:
    """A step after a prompt that was shortened: its mask, which the caller counts on from the full prompt."""
    if cached.rope_deltas is not None:
        base.rope_deltas = cached.rope_deltas
    mask, columns = arguments.get("attention_mask"), cached.columns
    past = arguments["past_key_values"].get_seq_length()
    tokens = arguments["input_ids" if arguments.get("input_ids") is not None else "inputs_embeds"].shape[1]
    if mask is None and not bool(columns.valid.all()):
        mask = columns.valid.new_ones(columns.valid.shape[0], columns.dropped + past + tokens, dtype=torch.long)
    if mask is None or mask.dim() != 2 or mask.shape[1] != columns.dropped + past + tokens:
        return arguments
    short = torch.cat([columns.take(mask[:, : columns.total], 0), mask[:, columns.total :]], 1)
    return {**arguments, "attention_mask": short}


def _get_image_features(cls: type) -> Callable[..., Any]:
    original: Callable[..., Any] = cls.get_image_features  # type: ignore[attr-defined]

    @functools.wraps(original)
    def get_image_features(self: nn.Module, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        ready = _ready.get()
        return original(self, pixel_values, *args, **kwargs) if ready is None else ready(pixel_values)

    return get_image_features


# ---- generate ----


def _generate(reduction: Reduction, cls: type) -> Callable[..., Any]:
    original: Callable[..., Any] = cls.generate  # type: ignore[attr-defined]
    names = parameters(original)

    @functools.wraps(original)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        cache = arguments.get("past_key_values")
        if arguments.get("pixel_values") is None and not hasattr(cache, MEMORY):
            return original(self, **arguments)
        return _short_generate(reduction, original, self, arguments)

    return generate


def _short_generate(
    reduction: Reduction, original: Callable[..., Any], model: nn.Module, arguments: dict[str, Any]
) -> Any:
    if arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model cannot be given where visual tokens are reduced: it would see other prompts")
    if arguments.get("inputs") is not None:
        arguments["input_ids"] = arguments.pop("inputs")
    cache = arguments.get("past_key_values")
    if arguments.get("attention_mask") is None:
        arguments["attention_mask"] = _mask(model, arguments)
    elif arguments["attention_mask"].shape[1] > arguments["input_ids"].shape[1]:
        return _generate_after(original, model, arguments)
    prompt = reduction.shorten(model, arguments, _cached(cache, arguments["input_ids"]))
    ids, columns = prompt.cached.ids, prompt.cached.columns
    prompt.arguments.update(_lengths(model, arguments, columns.dropped))
    if (streamer := arguments.get("streamer")) is not None:
        prompt.arguments["streamer"] = _FullPrompt(streamer, ids)
    if cache is not None:
        vars(cache).pop(MEMORY, None)  # the steps of generate count on from the short prompt
    with reduction.call(model, prompt) as short:
        output = original(model, **short)
    sequences = output if isinstance(output, Tensor) else output.sequences
    times = sequences.shape[0] // ids.shape[0]
    full = ids.repeat_interleave(times, 0)
    sequences = torch.cat([full.to(sequences.device), sequences[:, columns.index.shape[1] :]], 1)
    deltas = prompt.cached.rope_deltas
    memory = Cached(full, columns.repeat(times), None if deltas is None else deltas.repeat_interleave(times, 0))
    _remember(cache if isinstance(output, Tensor) else _cache_of(output), memory)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _generate_after(original: Callable[..., Any], model: nn.Module, arguments: dict[str, Any]) -> Any:
    """After a prompt that was shortened, with the ids of what follows it alone."""
    cache = arguments.get("past_key_values")
    memory: Cached | None = getattr(cache, MEMORY, None)
    if memory is None or arguments.get("pixel_values") is not None:
        raise ValueError("input_ids must be those of the whole conversation where visual tokens are reduced")
    arguments = _continued(base_of(model), arguments, memory)
    delattr(cache, MEMORY)
    try:
        return original(model, **arguments)
    finally:
        _remember(cache, memory)


def _mask(model: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """The mask that ``generate`` takes where none is given: padding is told by its id, unless that also ends a text."""
    config = arguments.get("generation_config") or model.generation_config
    pad = arguments.get("pad_token_id", config.pad_token_id)
    end = arguments.get("eos_token_id", config.eos_token_id)
    if pad is None or pad in (end if isinstance(end, (list, tuple)) else [end]):
        return None
    ids: Tensor = arguments["input_ids"]
    return ids.ne(pad).long()


def _lengths(model: nn.Module, arguments: Mapping[str, Any], dropped: int) -> dict[str, Any]:
    """``max_length`` and ``min_length``, which count the full prompt."""
    given = arguments.get("generation_config")
    changed: dict[str, Any] = {}
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if arguments.get(name) is not None:
            changed[name] = max(0, arguments[name] - dropped)
            continue
        for config in (given, model.generation_config):
            if (value := getattr(config, name, None)) is None:
                continue
            if value > 0 and not any(getattr(source, instead, None) for source in (given, model.generation_config)):
                if config is given:
                    changed["generation_config"] = changed.get("generation_config") or copy.deepcopy(given)
                    setattr(changed["generation_config"], name, max(0, value - dropped))
                elif arguments.get(instead) is None:
                    changed[name] = max(0, value - dropped)
            break
    return changed


class _FullPrompt:
    """A streamer that is told the caller's prompt in place of the short one."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self.streamer, self.ids = streamer, ids
        self.started = False

    def put(self, value: Tensor) -> None:
        if not self.started:
            self.started, value = True, self.ids.repeat_interleave(value.shape[0] // self.ids.shape[0], 0).cpu()
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


# ---- what a cache remembers ----


def _cache_of(output: Any) -> Any:
    """The cache in what a model returned."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _remember(cache: Any, memory: Cached) -> None:
    if cache is not None:
        setattr(cache, MEMORY, memory)


def _cached(cache: Any, ids: Tensor) -> Cached | None:
    """What the cache holds of this prompt: a shortened one and what was generated after it, or all that is in it."""
    past = 0 if cache is None else cache.get_seq_length()
    if not past:
        return None
    memory: Cached | None = getattr(cache, MEMORY, None)
    if memory is None:
        return Cached(ids[:, :past], Columns.all(ids[:, :past]), None)
    known = memory.columns.total
    after = past - memory.columns.index.shape[1]
    if after < 0 or ids.shape[1] < known + after or not torch.equal(ids[:, :known], memory.ids):
        raise ValueError(
            "past_key_values must be the cache of this conversation: input_ids do not begin with the prompt that it "
            "was made for"
        )
    return replace(memory, columns=memory.columns.then(Columns.all(ids[:, known : known + after])))
