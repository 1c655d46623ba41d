"""One prompt answered by calls of ``forward``: a prefill, then steps of greedy decoding."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import vlmfast
from vlmfast.benchmarks.published import Published
from vlmfast.reduce.caches import release

STEPS = 8  # of decoding, after each prefill


def patches_of(recipe: Published) -> dict[str, dict[str, Any] | None]:
    """Map each variant to its arguments of ``vlmfast.patch``, or to None for the unpatched model."""
    found: dict[str, dict[str, Any] | None] = {"original": None, "patched": {}}
    if recipe.method is not None:
        found["reduced"] = {"reduce": recipe.method}
    return found


def twin(model: nn.Module, patch: dict[str, Any] | None) -> nn.Module:
    """Copy the model so that both share their weights in memory, and patch the copy unless ``patch`` is None."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    if patch is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warnings repeat what `Patch.report` says of skipped sites
            vlmfast.patch(result, **patch)
    return result


class Decoding:
    """Decode greedily after one unpadded prompt, any number of times; each answer begins with `prefill`.

    ``length`` is the number of columns of a static cache; None makes a dynamic cache.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], length: int | None = None) -> None:
        self.model: Any = model
        self.inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        self.length = length
        self.cache: Any = None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self.settings: dict[str, Any] = {"use_cache": True, **last}
        self.token = torch.zeros(1, 1, dtype=torch.long, device=inputs["input_ids"].device)
        planes = (3,) if hasattr(self.model.base_model, "rope_deltas") else ()  # M-RoPE has three axes of positions
        self.position = self.token.new_zeros(*planes, 1, 1)

    def prefill(self) -> Tensor:
        """Run the prompt and return the logits of the first new token, (1, 1, vocabulary). `step` may follow."""
        return self.begin(self.prompt())

    def prompt(self) -> Tensor:
        """Run the forward of the prefill alone."""
        self._empty_cache()
        logits: Tensor = self.model(**self.inputs, past_key_values=self.cache, **self.settings).logits
        return logits

    def begin(self, logits: Tensor) -> Tensor:
        """Set token and position for the steps that follow the prompt."""
        # As `generate` does: positions of the steps continue from the short prompt.
        prompt = release(self.cache)
        length = self.cache.get_seq_length()
        deltas = getattr(self.model.base_model if prompt is None else prompt, "rope_deltas", None)
        self.position.fill_(length)  # fill_ takes a host number without a copy for which the host would wait
        if deltas is not None:
            self.position.add_(deltas)
        return self._choose(logits)

    def forward(self) -> Tensor:
        """Run only the forward of one step; returns the logits of the token after ``token``."""
        output = self.model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, **self.settings
        )
        logits: Tensor = output.logits
        return logits

    def step(self) -> Tensor:
        """Decode one token. The host never waits in it, so that a CUDA graph can capture it."""
        logits = self.forward()
        self.position.add_(1)
        return self._choose(logits)

    def cache_bytes(self) -> int:
        """Return the bytes of the keys and values of all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def cached(self) -> int:
        """Return how many columns the cache holds."""
        return int(self.cache.get_seq_length())

    def _choose(self, logits: Tensor) -> Tensor:
        logits = logits[:, -1:]
        self.token.copy_(logits.argmax(-1))
        return logits

    def _empty_cache(self) -> None:
        from transformers import DynamicCache, StaticCache

        if self.length is None:
            self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        elif self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        else:
            self.cache.reset()
