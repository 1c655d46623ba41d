"""The processing of a request before the engine: its method, its placeholders, and its keys in caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.processor import PromptUpdate

from vlmfast.reduce.methods import Method
from vlmfast.reduce.spelling import spell_call
from vlmfast.vllm.naming import KEY, configured_method, requested_method
from vlmfast.vllm.registration import replaces

FIELD = "vlmfast_method"  # of each image: the text of its method, on its way to the model
LONGEST = 128  # bytes of that text
_asked: ContextVar[str] = ContextVar("method of the request in hand")


class ReducedProcessor:
    """Mixin for vLLM's multimodal processors. A family computes in `rows` how many tokens are left."""

    info: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in (
            "apply",
            "_get_mm_hashes",
            "_apply_hf_processor_main",
            "_get_mm_fields_config",
            "_get_prompt_updates",
        ):
            replaces(name, BaseMultiModalProcessor)

    def rows(self, method: Method, count: int, size: Any) -> int:
        """Return how many tokens a method leaves of an image of ``count`` tokens.

        Args:
            method: the method of the request.
            count: the number of tokens that the model itself makes of it.
            size: width and height of the image, if the processor was given the image.
        """
        return sum(method.counts(count, False, count))

    @property
    def method(self) -> Method:
        """The method of the current request."""
        config = self.info.get_hf_config()
        return method_of(config, _asked.get(getattr(config, KEY)))

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request with its method, which transformers' processors do not take.

        Raises:
            ValueError: for a method that cannot be served, or an image that is encoded already.
        """
        options = dict(inputs.hf_processor_mm_kwargs)
        text = options.pop(KEY, None)
        if text is not None and not isinstance(text, str):
            raise ValueError(f'{KEY} must be the text of a method, such as "visionzip:54+10", got {text!r}')
        if isinstance(inputs.mm_data_items.get("image"), (EmbeddingItems, DictEmbeddingItems)):
            raise ValueError(f"embeddings of images cannot be reduced: serve them by a model without {KEY}")
        with _asking(text):
            self.method  # noqa: B018  # refuse it before any work
            return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Add the method to the identity of an image.

        Identities are keys of the processor cache, the encoder cache, prefix-cache blocks, and of whatever engines
        share (KV connectors, disaggregated encoders).
        """
        spelled = spell_call(self.method)
        return {
            modality: [_digest(value, spelled) for value in values] if modality == "image" else values
            for modality, values in super()._get_mm_hashes(inputs).items()  # type: ignore[misc]
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        images = mm_items.get_all_counts().get("image", 0)
        if images:
            config = self.info.get_hf_config()
            data[FIELD] = encode_text(_asked.get(getattr(config, KEY))).repeat(images, 1)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        images, method = mm_items.get("image"), self.method

        def shorter(update: Any) -> PromptReplacement:
            def replacement(item: int) -> Any:
                content = update.replacement(item) if callable(update.replacement) else update.replacement
                size = images.get_image_size(item) if hasattr(images, "get_image_size") else None
                return shortened(content, lambda count: self.rows(method, count, size))

            return PromptReplacement("image", update.target, replacement)

        return [shorter(update) if update.modality == "image" else update for update in updates]


def shortened(content: Any, rows: Callable[[int], int]) -> Any:
    """Leave out the last of an image's placeholders, which are all alike, so that ``rows`` of their number are left.

    Args:
        content: what vLLM replaces an image by: ids, or `PromptUpdateDetails` that tell placeholders from text around.
        rows: gives the number of placeholders that are left.
    """
    if not isinstance(content, PromptUpdateDetails):
        return content[: rows(len(content))]
    is_placeholder = content.is_embed(content.full)
    number = is_placeholder.cumsum(0)
    stays = ~is_placeholder | (number <= rows(int(number[-1])))
    return replace(content, full=[token for token, kept in zip(content.full, stays.tolist(), strict=True) if kept])


class FullBudget:
    """Mixin for vLLM's processing info, which plans memory for full images: a request may ask for all tokens."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens of the largest image, and of the largest video where the model takes videos."""
        tokens: dict[str, int] = {"image": self.get_max_image_tokens()}  # type: ignore[attr-defined]
        if mm_counts.get("video"):
            tokens["video"] = self.get_max_video_tokens(seq_len, mm_counts)  # type: ignore[attr-defined]
        return tokens


def method_of(config: Any, text: str) -> Method:
    """Return the method of a text, which is that of the configuration, perhaps a user's own, or of a request."""
    (architecture,) = config.architectures
    own = text == getattr(config, KEY)
    return configured_method(architecture, text) if own else requested_method(architecture, text)


def encode_text(text: str) -> Tensor:
    """(LONGEST,) uint8: text as vLLM carries it beside an image, in batches and between processes.

    Raises:
        ValueError: if it is too long.
    """
    data = text.encode()
    if len(data) > LONGEST:
        raise ValueError(f"{KEY} must be of at most {LONGEST} bytes, got {len(data)}")
    return torch.tensor(list(data.ljust(LONGEST)), dtype=torch.uint8)


def decode_text(data: Tensor) -> str:
    """Return the text that `encode_text` was given."""
    return bytes(data.tolist()).decode().rstrip(" ")


@contextmanager
def _asking(text: str | None) -> Iterator[None]:
    if text is None:
        yield
        return
    token = _asked.set(text)
    try:
        yield
    finally:
        _asked.reset(token)


def _digest(value: str, spelled: str) -> str:
    return hashlib.blake2b(f"{value} {spelled}".encode(), digest_size=32).hexdigest()
