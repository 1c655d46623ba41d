"""The processing of a request before the engine: its method, its placeholders, and its keys in caches."""

from __future__ import annotations

import hashlib
import itertools
import operator
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

from vlmfast.reduce.kinds import method_for
from vlmfast.reduce.methods import Method
from vlmfast.reduce.spelling import spell_call
from vlmfast.vllm.naming import KEY, PREFIX, VIDEOS, by_frame, configured_method, requested_method
from vlmfast.vllm.registration import replaces

# of each image, and of each video: the text of its method, on its way to the model
FIELDS = {"image": "vlmfast_method", "video": "vlmfast_video_method"}
LONGEST = 128  # bytes of that text
_asked: ContextVar[str] = ContextVar("method of the request in hand")


class ReducedProcessor:
    """Mixin for vLLM's multimodal processors. A family computes in `rows` how many tokens are left.

    One that takes videos computes in `frame_tokens` how many tokens a frame has.
    """

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

    def video_rows(self, method: Method, count: int, video: Any) -> int:
        """Return how many tokens a method leaves of ``count`` in a row, those of a frame or of all frames.

        Args:
            method: the method of the request.
            count: the number of tokens that the model itself makes of them.
            video: what transformers' processor made of the video.
        """
        each = self.frame_tokens(video)
        frames = count // each
        if by_frame(method):
            return frames * sum(method.counts(each, False, each))
        return sum(method.counts(count, False, count, frames))

    def frame_tokens(self, video: Any) -> int:
        """Return the number of tokens that the model makes of a frame."""
        raise NotImplementedError

    @property
    def method(self) -> Method:
        """The method of the current request."""
        config = self.info.get_hf_config()
        return method_of(config, _asked.get(getattr(config, KEY)))

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request with its method, which transformers' processors do not take.

        Raises:
            ValueError: for a method that cannot be served, or an image or a video that is encoded already.
        """
        options = dict(inputs.hf_processor_mm_kwargs)
        text = options.pop(KEY, None)
        if text is not None and not isinstance(text, str):
            raise ValueError(f'{KEY} must be the text of a method, such as "visionzip:54+10", got {text!r}')
        for kind in FIELDS:
            if isinstance(inputs.mm_data_items.get(kind), (EmbeddingItems, DictEmbeddingItems)):
                raise ValueError(f"embeddings of {kind}s cannot be reduced: serve them by a model without {KEY}")
        with _asking(text):
            self.method  # noqa: B018  # refuse it before any work
            return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Add the method to the identity of an image or a video.

        Identities are keys of the processor cache, the encoder cache, prefix-cache blocks, and of whatever engines
        share (KV connectors, disaggregated encoders).
        """
        spelled = spell_call(self.method)
        return {
            modality: [_digest(value, spelled) for value in values] if modality in FIELDS else values
            for modality, values in super()._get_mm_hashes(inputs).items()  # type: ignore[misc]
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        text = encode_text(_asked.get(getattr(self.info.get_hf_config(), KEY)))
        for kind, count in mm_items.get_all_counts().items():
            if count:
                data[FIELDS[kind]] = text.repeat(count, 1)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        own = {field: MultiModalFieldConfig.batched(kind, keep_on_cpu=True) for kind, field in FIELDS.items()}
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        images, asked = mm_items.get("image"), self.method

        def shorter(update: Any) -> PromptReplacement:
            kind = reduced_as(self.info.get_hf_config(), update.modality)
            method = method_for(kind, asked)

            def replacement(item: int) -> Any:
                content = update.replacement(item) if callable(update.replacement) else update.replacement

                def rows(count: int) -> int:
                    if kind == "video":
                        left = self.video_rows(method, count, out_mm_kwargs["video"][item])
                    else:
                        given = update.modality == "image" and hasattr(images, "get_image_size")
                        left = self.rows(method, count, images.get_image_size(item) if given else None)
                    if not left:
                        raise ValueError(
                            f"{method} leaves none of the {count} tokens of an image, a video or a frame, and vLLM "
                            f"needs at least one"
                        )
                    return left

                return shortened(content, rows)

            return PromptReplacement(update.modality, update.target, replacement)

        return [shorter(update) if update.modality in FIELDS else update for update in updates]


def shortened(content: Any, rows: Callable[[int], int]) -> Any:
    """Leave out the last placeholders of each run, which are all alike, so that ``rows`` of their number are left.

    An image is one run, and so is a video, or each of its frames where text stands between them.

    Args:
        content: what vLLM replaces it by: ids, or `PromptUpdateDetails` that tell placeholders from text around.
        rows: gives the number of placeholders of a run that are left.
    """
    if not isinstance(content, PromptUpdateDetails):
        return content[: rows(len(content))]
    left: list[int] = []
    marked = zip(content.is_embed(content.full).tolist(), content.full, strict=True)
    for is_placeholder, run in itertools.groupby(marked, key=operator.itemgetter(0)):
        ids = [token for _, token in run]
        left += ids[: rows(len(ids))] if is_placeholder else ids
    return replace(content, full=left)


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


def reduced_as(config: Any, kind: str) -> str:
    """Return "image" or "video": what a model's images, or videos, are reduced as."""
    (architecture,) = config.architectures
    return "image" if VIDEOS.get(architecture.removeprefix(PREFIX)) == "tiles" else kind


def encode_text(text: str) -> Tensor:
    """(LONGEST,) uint8: text as vLLM carries it beside an image or a video, in batches and between processes.

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
