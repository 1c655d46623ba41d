"""Where visual tokens are cut between layers, which cuts are impossible, and the replaced methods that make them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.caches import held_by, hold
from vlmfast.reduce.cuts.masks import At, valid_columns
from vlmfast.reduce.cuts.report import Cuts
from vlmfast.reduce.cuts.run import Cut, Held, Prompt, Run
from vlmfast.reduce.cuts.tap import CONFIG, RUN, register
from vlmfast.reduce.kinds import KINDS, is_placeholder
from vlmfast.reduce.methods import LayerMethod
from vlmfast.reduce.methods.layer_method import check_layers
from vlmfast.reduce.passing_by import entered
from vlmfast.reduce.prompt import named, parameters
from vlmfast.reduce.text import MASK, check_lengths, special_ids, text_columns
from vlmfast.releases import KNOWN, newer_transformers
from vlmfast.torch_internals import is_compiling

IMAGES = (*(kind.pixels for kind in KINDS), "mm_encoder_outputs")
# of `generate`: these take columns off a cache again, or give it the prompt in pieces
TEXT: ContextVar[Tensor | None] = ContextVar("vlmfast_text", default=None)  # what a running `generate` was given
REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass(frozen=True)
class Plan:
    """Where visual tokens are cut in the language model of one type of model.

    Attributes:
        methods: the methods, in the order of their layers.
        layers: the classes of its layers.
        attentions: the classes of their attention.
    """

    methods: tuple[LayerMethod, ...]
    layers: frozenset[type]
    attentions: frozenset[type]

    @property
    def cuts(self) -> list[tuple[int, LayerMethod, int]]:
        """All cuts: the layer, the method, and the number of the cut within the method."""
        return [(layer, method, cut) for method in self.methods for cut, layer in enumerate(method.cut_before)]

    @property
    def reads_text(self) -> bool:
        """Whether one of the methods chooses by the text."""
        return any(method.reads_text for method in self.methods)

    def replacements(self) -> dict[type, dict[str, Any]]:
        """Return the replacements in the classes of layers and attention: class -> name -> method or property."""
        register()
        found: dict[type, dict[str, Any]] = {cls: {"__call__": _calling(cls.__call__)} for cls in self.layers}
        return found | {cls: {"config": CONFIG} for cls in self.attentions}

    def forward(self, original: Callable[..., Any], note: Callable[[Any, Cuts], None]) -> Callable[..., Any]:
        """Make the ``forward`` of the model with its head, which gives ``note`` the cuts of prompts with images."""
        names = parameters(original)
        # Compiled layers would be traced without a run, so a call that cuts runs uncompiled.
        whole = torch.compiler.disable(original)  # type: ignore[no-untyped-call]

        @entered()
        def run(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]) -> Any:
            if arguments.get(MASK) is None and (text := TEXT.get()) is not None:
                ids = arguments.get("input_ids")
                # without a cache, each step has the generated words too
                more = 0 if ids is None else max(ids.shape[1] - text.shape[1], 0)
                arguments[MASK] = nn.functional.pad(text, (0, more))
            started = self._start(model, arguments, note)
            if started is None:
                return original(model, *args, **kwargs)
            token = RUN.set(started)
            try:
                output = whole(model, *args, **kwargs)
            finally:
                RUN.reset(token)
            if started.made:
                cache = arguments.get("past_key_values")
                hold(cache_of(output) if cache is None else cache, started.made)
            return output

        apart: Any = torch.compiler.disable(run, recursive=False)  # type: ignore[no-untyped-call]

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            text = kwargs.pop(MASK, None)
            arguments = {**dict(zip(names, args)), **kwargs, MASK: text}  # noqa: B905
            if not _images(arguments) and held_by(arguments.get("past_key_values")) is None:
                if not is_compiling():
                    _warn_of_embeddings(arguments)
                return original(self, *args, **kwargs)
            return apart(self, args, kwargs, arguments)

        return forward

    def generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Make a ``generate`` that refuses arguments which do not work with cuts."""
        names = parameters(original)

        @functools.wraps(original)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
            for name in REFUSED:
                configs = (arguments.get("generation_config"), self.generation_config)
                if any(
                    value is not None for value in (arguments.get(name), *(getattr(c, name, None) for c in configs))
                ):
                    raise ValueError(f"{name} cannot be given where visual tokens are cut between layers")
            token = TEXT.set(kwargs.pop(MASK, None))
            try:
                return original(self, *args, **kwargs)
            finally:
                TEXT.reset(token)

        return generate

    def _start(self, model: Any, arguments: Mapping[str, Any], note: Callable[[Any, Cuts], None]) -> Run | None:
        """Return the run of a call, or None if it neither cuts nor continues from a prompt that was cut."""
        cache = arguments.get("past_key_values")
        held: Held = held_by(cache) or {}
        prompt, cuts = self._prompt(model, arguments)
        if prompt is not None:
            before = 0 if cache is None else int(cache.get_seq_length())
            note(model, Cuts.of(prompt, cuts, before, len(layers_of(model))))
        if not cuts and not held:
            return None
        config = model.config.get_text_config()
        implementation: str = config._attn_implementation
        if implementation == "flex_attention" or implementation.startswith("paged|"):
            raise ValueError(
                f"attn_implementation must be sdpa, eager or flash attention where visual tokens are cut between "
                f"layers, got {implementation}"
            )
        width = getattr(cache.layers[-1], "max_cache_len", None) if cache is not None and cache.layers else None
        # a step with a static cache must not wait for the device to learn how much it holds
        past = 0 if cache is None or (width is not None and not cuts) else int(cache.get_seq_length())
        if held and width is None:
            _check_held(cache, held, past)
        ids = next(iter(named(arguments, ("input_ids", "inputs_embeds")).values()))
        at = At(past, ids.shape[1], width, implementation)
        return Run(layers_of(model), held, at, cuts, prompt if cuts else None)

    def _prompt(self, model: Any, arguments: Mapping[str, Any]) -> tuple[Prompt | None, dict[int, Cut]]:
        """Find the visual tokens of a call, and how many are left after each cut that leaves any out."""
        ids = arguments.get("input_ids")
        if not _images(arguments) or (ids is not None and ids.shape[1] == 1):
            return None, {}
        if not isinstance(ids, Tensor):
            raise ValueError("input_ids must be given beside images where visual tokens are cut between layers")
        visual = is_placeholder(ids, model.config)
        valid = valid_columns(arguments.get("attention_mask"))
        cached = arguments.get("past_key_values")
        past = 0 if cached is None or valid is None else int(cached.get_seq_length())
        if valid is None:
            own = torch.ones_like(visual)
        else:
            valid = valid[:, : past + ids.shape[1]].to(ids.device).expand(len(ids), -1)
            own = valid[:, past:]
            if own.shape != ids.shape:
                raise ValueError(
                    f"attention_mask must be as long as the {past} columns of past_key_values and input_ids, "
                    f"{tuple(ids.shape)}, got {tuple(arguments['attention_mask'].shape)}"
                )
        visual &= own
        inside = (own.cumsum(1) > 0) & (own.flip(1).cumsum(1).flip(1) > 0)
        right = ~own[:, -1].all() & own[:, 0].all()
        text = self._text(model, arguments, ids, own, visual)
        # the one wait for the device
        asked = torch.cat([visual.sum(1), inside.sum(1), text.sum(1), right[None]]).tolist()
        counts, lengths, words = (asked[part * len(ids) : (part + 1) * len(ids)] for part in range(3))
        if self.reads_text:
            check_lengths(words, [sample for sample, count in enumerate(counts) if count])
        last = (own * torch.arange(1, own.shape[1] + 1, device=own.device)).argmax(1)
        left, cuts = counts, {}
        for layer, method, cut in self.cuts:
            kept = [min(before, method.counts(cut, count)) for before, count in zip(left, counts, strict=True)]
            if kept != left:
                left, cuts[layer] = kept, Cut(method, kept)
        return Prompt(visual, inside, valid, last, text, lengths, counts, words, bool(asked[-1])), cuts

    def _text(self, model: Any, arguments: Mapping[str, Any], ids: Tensor, own: Tensor, visual: Tensor) -> Tensor:
        """(B, T) bool: the text that the visual tokens are chosen by; all false if no method reads it."""
        if not self.reads_text:
            return torch.zeros_like(visual)
        given = arguments.get(MASK)
        if given is not None:
            if given.dim() != 2 or given.shape[1] < ids.shape[1] or len(ids) % max(len(given), 1):
                raise ValueError(
                    f"{MASK} must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(given.shape)}"
                )
            # of the whole prompt, where a part of it is in the cache, and of each sample, where it has several beams
            given = given[:, -ids.shape[1] :].repeat_interleave(len(ids) // len(given), 0)
        return text_columns(ids, own, visual, special_ids(model), given)


def planned(model: Any, methods: Sequence[LayerMethod]) -> Plan:
    """Say how visual tokens of this model are cut by these methods, one after the other.

    Raises:
        ValueError: for layers that the model does not have, that cannot continue with fewer tokens, or that are not in
            order, for a cut that would never leave anything out, and for a transformers that is too new.
    """
    if version := newer_transformers():
        raise ValueError(
            f"visual tokens are cut between layers under transformers up to {KNOWN[-1]}, got {version}, whose layers "
            "may take their caches otherwise"
        )
    name, config = type(model).__name__, model.config.get_text_config()
    found = getattr(getattr(model.base_model, "language_model", None), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"the language model of {name} must have layers to cut visual tokens between them")
    for method in methods:
        check_layers(method)
    attentions = [layer.self_attn for layer in found if hasattr(layer, "self_attn")]
    plan = Plan(tuple(methods), frozenset(map(type, found)), frozenset(map(type, attentions)))
    layers = [layer for layer, _, _ in plan.cuts]
    if layers != sorted(set(layers)):
        raise ValueError(f"layers of the cuts must ascend from one method to the next, got {layers}")
    if not layers[-1] < len(found):
        raise ValueError(f"layer must be below {len(found)}, the number of layers of {name}, got {layers[-1]}")
    levels = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if layers[0] < levels:
        raise ValueError(
            f"layer must be at least {levels}, as {name} adds visual features after each of its first {levels} layers "
            f"(DeepStack), got {layers[0]}"
        )
    _check_kinds(config, layers[0] - 1, name)
    _check_budgets(plan)
    return plan


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers of the language model."""
    layers: nn.ModuleList = model.base_model.language_model.layers
    return layers


def _images(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that bring images or videos; for text, `generate` passes empty ``mm_encoder_outputs``."""
    given = named(arguments, IMAGES)
    return {name: value for name, value in given.items() if not isinstance(value, Mapping) or value}


def _warn_of_embeddings(arguments: Mapping[str, Any]) -> None:
    """Warn that nothing is cut of ``inputs_embeds``, in which visual tokens cannot be told from words."""
    embeddings = arguments.get("inputs_embeds")
    if arguments.get("input_ids") is None and isinstance(embeddings, Tensor) and embeddings.shape[1] > 1:
        warnings.warn(
            "no visual tokens are cut between layers of a prompt that is given as inputs_embeds, as by compress_inputs "
            "under transformers 5.17: give input_ids, and the method of compress_inputs to vlmfast.patch",
            stacklevel=3,
        )


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output."""
    values: Iterable[Any] = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    )
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _calling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the ``__call__`` of a layer, which is outside its hooks and of what gradient checkpointing runs again."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = None if is_compiling() else RUN.get()
        return original(self, *args, **kwargs) if run is None else run.call(self, original, args, kwargs)

    return call


def _check_held(cache: Any, held: Held, past: int) -> None:
    """Refuse a cache that was cropped: its layers do not know which columns were removed."""
    layer = min(held)
    columns = held[layer]
    if past < columns.total or cache.get_seq_length(layer) != columns.index.shape[1] + past - columns.total:
        raise ValueError(
            "past_key_values holds a prompt whose visual tokens were cut between layers, and was cropped since"
        )


def _check_kinds(config: Any, first: int, name: str) -> None:
    """Refuse layers whose attention does not see everything before a token."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    for layer, kind in enumerate(kinds):
        if layer >= first and kind != "full_attention":
            why = "drops keys by their number" if "sliding" in kind else "takes a step for each token, seen or not"
            raise ValueError(
                f"layer must be such that all layers from the one before it on have full attention; layer {layer} of "
                f"{name} has {kind}, which {why}"
            )


def _check_budgets(plan: Plan) -> None:
    """Refuse a cut that keeps at least as many tokens as the cut before it."""
    for (_, method, cut), (_, after, last) in zip(plan.cuts, plan.cuts[1:], strict=False):
        if method is not after and all(after.counts(last, count) >= method.counts(cut, count) for count in (64, 4096)):
            raise ValueError(
                f"{after} must keep fewer visual tokens than {method} before it, of which it has what is left"
            )
