"""``forward`` and ``generate`` of a model whose prompts are shortened before the language model sees them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.modules import replaced_on_instances
from vlmfast.reduce.caches import keep_new, kept_by, lent, refuse_rebuilt
from vlmfast.reduce.columns import Columns
from vlmfast.reduce.costs import Shape
from vlmfast.reduce.cuts.plan import Plan, cache_of, planned
from vlmfast.reduce.cuts.report import Cuts
from vlmfast.reduce.encoded_images import features_of, forward_with_features
from vlmfast.reduce.families import REDUCERS, Reducer
from vlmfast.reduce.full_prompt import fitted, padding_mask, setting
from vlmfast.reduce.kinds import KINDS, brought, check_takes, lacking
from vlmfast.reduce.methods import LayerMethod, Method, told
from vlmfast.reduce.passing_by import entered, refusing
from vlmfast.reduce.prompt import (
    ShortenedPrompt,
    asking,
    check,
    named,
    parameters,
    positions_after,
    shorten,
    takes_features,
)
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.text import MASK

# with these arguments the caller counts columns of the logits; `Trainer` passes the second to smooth labels
COUNTED = ("labels", "num_items_in_batch")


@dataclass
class Note:
    """The result of the last prompt with images of a model, without gradients."""

    prompt: ShortenedPrompt | None = None
    cuts: Cuts | None = None


NOTES: weakref.WeakKeyDictionary[Any, Note] = weakref.WeakKeyDictionary()  # the note of each patched model


@dataclass
class Reduction:
    """How the prompts of a patched model are shortened, and the result for the last one."""

    model_class: type[Any]  # of the model with its head
    base_class: type[Any]  # of the model without its head
    reducer: Reducer
    method: Method | None  # acts before the language model
    plan: Plan | None  # cuts between its layers
    shape: Shape  # of the language model
    note: Note  # of the patched model; its copies run this reduction too

    def __deepcopy__(self, memo: dict[int, Any]) -> Reduction:
        """Report about the copy of the model, if that is copied too."""
        twin = replace(self, note=replace(self.note))
        for model in [model for model, note in NOTES.items() if note is self.note and id(model) in memo]:
            NOTES[memo[id(model)]] = twin.note
        return twin

    @property
    def last(self) -> ShortenedPrompt | None:
        """The last prompt that had images or videos."""
        return self.note.prompt

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last prompt that had images or videos."""
        return [] if self.last is None else self.last.images

    @property
    def videos(self) -> list[ReducedImage]:
        """The videos of that prompt."""
        return [] if self.last is None else self.last.videos

    def replacements(self) -> dict[type, dict[str, Callable[..., Any]]]:
        """Return the replacement of each method: class -> method -> function."""
        cls, base = self.model_class, self.base_class
        forward: Callable[..., Any] = cls.forward
        generate: Callable[..., Any] = cls.generate
        found: dict[type, dict[str, Any]] = {}
        if self.plan is not None:
            found = self.plan.replacements()
            forward, generate = self.plan.forward(forward, self.note_cuts), self.plan.generate(generate)
        found.setdefault(base, {})["forward"] = refusing(
            base.forward, self.reducer, cls.__name__, self.method is not None
        )
        if self.method is None:
            return {**found, cls: {"forward": forward, "generate": generate}}
        if not takes_features(base):
            forward = forward_with_features(forward, self.reducer)
            kinds = [kind for kind in KINDS if kind.reduce(self.reducer) is not None]
            found[base] |= {f"get_{kind.name}_features": features_of(base, kind) for kind in kinds}
        found[cls] = {
            "forward": _forward(self, forward),
            "generate": _replacement(
                self.reducer, _with_images(generate), functools.partial(_short_generate, self, generate)
            ),
        }
        return found

    def report(self) -> str:
        """Return the methods, and their effect on the last prompt."""
        lines = [] if self.method is None else [f"{self.method}: {self._shortened()}"]
        if self.plan is not None:
            methods = ", ".join(map(str, self.plan.methods))
            done = "no prompt with images yet" if self.note.cuts is None else self.note.cuts.report()
            lines.append(f"{methods}: {done}")
        if self.last is not None or self.note.cuts is not None:
            lines.append(self._costs())
        return "\n  ".join(lines)

    def _costs(self) -> str:
        """Say what the last prompt costs the language model, before and after."""
        layers, cuts = len(self.shape.layers), self.note.cuts
        samples, total = (0, 0) if self.last is None else self.last.ids.shape
        after = [0 if self.last is None else self.last.columns.index.shape[1]] * layers
        if cuts is not None:
            samples, after = cuts.samples, cuts.columns_of_layers()
            total = total or after[0]
        return self.shape.compare(samples, [total] * layers, after)

    def _shortened(self) -> str:
        if self.last is None:
            kind = "images" if self.method is None or "image" in self.method.takes else "videos"
            return f"no prompt with {kind} yet"
        shown = self.last.images + self.last.videos
        sizes = [f"{image.total} -> {image.features.shape[0]}" for image in shown]
        before, after = self.last.columns.total, self.last.columns.index.shape[1]
        return (
            f"visual tokens of the last prompt {', '.join(sizes)}; prompt {before} -> {after} "
            f"({1 - after / before:.1%} saved)"
        )

    def note_cuts(self, model: Any, cuts: Cuts) -> None:
        """Note the cuts for the report."""
        if (note := self._note_of(model)) is not None:
            note.cuts = cuts

    def _note_of(self, model: Any) -> Note | None:
        return self.note if getattr(model, "_is_replica", False) else NOTES.get(model)

    def shorten(
        self, model: Any, arguments: Mapping[str, Any], cached: ShortenedPrompt | None
    ) -> tuple[ShortenedPrompt, dict[str, Any]]:
        """Shorten the prompt, and note it for the report.

        Returns:
            The prompt, without gradients, and the new arguments of the call.
        """
        method: Any = self.method
        reads_text = self.plan is not None and self.plan.reads_text
        text = asking(model, arguments) if reads_text else None
        prompt, short = shorten(model, self.reducer, method, arguments, cached)
        if text is not None:
            short[MASK] = prompt.columns.take(text.long(), 0)
        prompt, note = prompt.detach(), self._note_of(model)
        if any(prompt.samples) and note is not None:
            note.prompt, note.cuts = prompt, None
        return prompt, short


def shortening(model: Any, methods: object) -> Reduction:
    """Make the `Reduction` of this model by these methods, whose `replacements` shorten prompts.

    Args:
        model: a Hugging Face model with its head, perhaps inside PEFT.
        methods: how visual tokens are reduced: a method, or a list of which the first may act before the language
            model and the others between its layers.

    Raises:
        TypeError: if one of ``methods`` is not a method. ValueError: if the visual tokens of the model cannot be
            reduced, or not by these methods together. RuntimeError: if an attribute of the instance hides a Python
            method that must be replaced.
    """
    given = list(methods) if isinstance(methods, (list, tuple)) else [methods]
    for method in given:
        if not isinstance(method, (Method, LayerMethod)):
            raise TypeError(
                f"reduce must be a method such as vlmfast.SCOPE(64) or vlmfast.FastV(2, 0.5), or a list of them, got "
                f"{told(method)}"
            )
    first = given[0] if given and isinstance(given[0], Method) else None
    between = [method for method in (given if first is None else given[1:]) if isinstance(method, LayerMethod)]
    if not given or len(given) != len(between) + (first is not None):
        raise ValueError(
            f"reduce must be a method or a list of some: first at most one method that acts before the language model, "
            f"then those that cut between its layers, got {given}"
        )
    model, reducer = reducible(model)
    if first is not None:
        check_takes(reducer, first, type(model).__name__)
    for name in ("forward", "generate"):
        if reason := replaced_on_instances([model], type(model), name):
            raise RuntimeError(f"prompts cannot be shortened: {reason}")
    plan = planned(model, between) if between else None
    NOTES[model] = Note()
    return Reduction(type(model), type(model.base_model), reducer, first, plan, Shape.of(model), NOTES[model])


def reducible(host: Any) -> tuple[Any, Reducer]:
    """Return the model whose visual tokens can be reduced, without PEFT's wrapper, and its reducer.

    Raises:
        ValueError: if they cannot.
    """
    from transformers import GenerationMixin

    model = host.get_base_model() if hasattr(host, "get_base_model") else host
    name = type(model).__name__
    base = getattr(model, "base_model", None)
    model_type: str = model.config.model_type
    if not model_type.startswith(tuple(REDUCERS)):  # such as "qwen3_vl_text", the language model alone
        known = ", ".join(REDUCERS)
        raise ValueError(f"the visual tokens of {name} cannot be reduced; those of these families can: {known}")
    if not hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):  # which decoding needs
        raise ValueError("reduce needs transformers 5.17 or later")
    is_whole = base not in (None, model) and hasattr(base, "get_image_features") and hasattr(model, "generate")
    if model_type not in REDUCERS or not is_whole:
        raise ValueError(f"reduce needs the model with its vision tower and its language head, got {name}")
    return model, REDUCERS[model_type]


def _replacement(reducer: Reducer, original: Callable[..., Any], short: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``short`` take the calls with images and those after a shortened prompt, with arguments by name."""
    names = parameters(original)

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        text = kwargs.pop(MASK, None)
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        cache = arguments.get("past_key_values")
        if kept_by(cache) is None:
            refuse_rebuilt(cache)
            if not brought(reducer, arguments):
                return original(self, *args, **kwargs)
        if text is not None and brought(reducer, arguments):
            arguments[MASK] = text
        return short(self, arguments)

    return method


# ---- forward ----


def _forward(reduction: Reduction, original: Callable[..., Any]) -> Callable[..., Any]:
    # Not traced: shortening waits for the device to learn the shape of the short prompt. A decorator of these functions
    # would load torch's compiler wherever vlmfast is imported.
    shorten = torch.compiler.disable(reduction.shorten)  # type: ignore[no-untyped-call]

    def short_forward(model: Any, arguments: dict[str, Any]) -> Any:
        cache = arguments.get("past_key_values")
        with lent(cache) as cached, entered():
            if not brought(reduction.reducer, arguments) and cached is not None:
                return original(model, **_continued(arguments, cached))
            if cache is not None and cache.get_seq_length():
                raise ValueError("images in a forward call after a cached prompt cannot be reduced: use generate")
            prompt, short = shorten(model, arguments, None)
            output = _lengthened(model, original, arguments, short, prompt.columns)
            if not getattr(model, "_is_replica", False):  # DataParallel makes another cache of its replicas' layers
                keep_new(cache_of(output) if cache is None else cache, prompt.without_images())
            return output

    short = torch.compiler.disable(short_forward, recursive=False)  # type: ignore[no-untyped-call]
    return _replacement(reduction.reducer, original, short)


def _lengthened(
    model: Any, original: Callable[..., Any], arguments: Mapping[str, Any], short: dict[str, Any], columns: Columns
) -> Any:
    """Run the short prompt; if the caller counts columns, return logits for every column of the full prompt.

    A column that was left out gets the logits of the last column before it, which predict the same next token. So
    labels, metrics and log probabilities of the full prompt stay aligned.
    """
    last = arguments.get("logits_to_keep")
    if not last and not named(arguments, COUNTED):
        return original(model, **short)
    rows = columns.latest()
    if last:
        rows, seen = rows[:, -last:], columns.index.shape[1]
        # a single sample has no padding behind it, so there is no need to wait for the device
        first = max(0, seen - last) if len(rows) == 1 else int(rows.min())
        short["logits_to_keep"], rows = seen - first, rows - first

    def lengthen(logits: Tensor) -> Tensor:
        samples = torch.arange(rows.shape[0], device=logits.device)[:, None]
        return logits[samples, rows.to(logits.device)]

    output = original(model, **short)
    if isinstance(output, tuple):
        at = int(arguments.get("labels") is not None)  # behind the loss
        return (*output[:at], lengthen(output[at]), *output[at + 1 :])
    if isinstance(output.logits, Tensor):
        output.logits = lengthen(output.logits)
    return output


def _continued(arguments: dict[str, Any], cached: ShortenedPrompt) -> dict[str, Any]:
    """Return the arguments of a step after a shortened prompt, with a mask for the short prompt.

    With M-RoPE also with positions, which transformers would count from the last prompt that the model ran.
    """
    given, columns = arguments.get("attention_mask"), cached.columns
    tokens = arguments["input_ids" if arguments.get("input_ids") is not None else "inputs_embeds"].shape[1]
    after = int(arguments["past_key_values"].get_seq_length()) + tokens - columns.index.shape[1]
    changed: dict[str, Any] = {}
    if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == columns.total + after:
        mask = torch.cat([columns.take(given[:, : columns.total], 0), given[:, columns.total :]], 1)
        changed["attention_mask"] = mask
    else:
        mask = torch.cat([columns.valid, columns.valid.new_ones(len(columns.valid), after)], 1).long()
        if given is None and columns.padded:
            changed["attention_mask"] = mask
    if cached.rope_deltas is not None and arguments.get("position_ids") is None:
        changed["position_ids"] = positions_after(mask, cached.rope_deltas)[..., -tokens:]
    return {**arguments, **changed}


# ---- generate ----


def _with_images(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``generate`` refuse placeholders without images after a cache, which may hold a shortened prompt."""
    names = parameters(original)

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        cache, ids = arguments.get("past_key_values"), arguments.get("input_ids", arguments.get("inputs"))
        past = 0 if cache is None or arguments.get("mm_encoder_outputs") is not None else int(cache.get_seq_length())
        if past and isinstance(ids, Tensor) and bool(lacking(ids[:, past:], self.config, arguments).any()):
            raise ValueError(
                f"pixel_values must be given with images after the {past} columns that past_key_values holds; if it "
                f"was made of the layers of a cache whose visual tokens were reduced, copy that with copy.deepcopy"
            )
        return original(self, *args, **kwargs)

    return generate


def _short_generate(reduction: Reduction, original: Callable[..., Any], model: Any, arguments: dict[str, Any]) -> Any:
    if arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model cannot be given where visual tokens are reduced: it would see other prompts")
    if arguments.get("inputs") is not None:
        arguments["input_ids"] = arguments.pop("inputs")
    cache = arguments.get("past_key_values")
    with lent(cache) as cached:  # the steps continue from the short prompt
        ids, given = arguments.get("input_ids"), arguments.get("attention_mask")
        longer = isinstance(given, Tensor) and given.dim() == 2 and ids is not None and given.shape[1] > ids.shape[1]
        if longer:  # only the ids of what follows
            if cached is None or brought(reduction.reducer, arguments):
                raise ValueError("input_ids must be those of the whole conversation where visual tokens are reduced")
            return original(model, **_continued(arguments, cached))
        check(arguments)
        if given is None:
            arguments["attention_mask"] = padding_mask(model, arguments)
        with torch.no_grad():
            prompt, short = reduction.shorten(model, arguments, _known(cache, cached, arguments["input_ids"]))
        short |= fitted(model, arguments, prompt)
        output = original(model, **short)
        sequences = prompt.lengthen(output if isinstance(output, Tensor) else output.sequences)
        # a cache has a row for each beam, even if it is not returned
        rows = max(setting(model, arguments, "num_beams") or 1, sequences.shape[0] // prompt.ids.shape[0])
        prompt = prompt.without_images().repeat(rows)
        keep_new(cache if isinstance(output, Tensor) else cache_of(output), prompt)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output


def _known(cache: Any, cached: ShortenedPrompt | None, ids: Tensor) -> ShortenedPrompt | None:
    """Return what the cache holds of these ids: a shortened prompt and its answer, or everything in the cache."""
    past = 0 if cache is None else cache.get_seq_length()
    if not past:
        return None
    if cached is None:
        return ShortenedPrompt(ids[:, :past], Columns.all(ids[:, :past]), None, [])
    start = cached.columns.total
    after = past - cached.columns.index.shape[1]
    if after < 0 or ids.shape[1] < start + after or not torch.equal(ids[:, :start], cached.ids):
        raise ValueError(
            "past_key_values must be the cache of this conversation: input_ids do not begin with the prompt that it "
            "was made for"
        )
    return replace(cached, columns=cached.columns.then(Columns.all(ids[:, start : start + after])))
