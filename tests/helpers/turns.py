"""Turns of a conversation with a tiny model: its answer, the cache of a prompt, and the inputs of the next turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.reduce_models import WORD, Talk

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list(range(WORD))}
OPTIONS |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}


def answer(talk: Talk, inputs: dict[str, Any], **more: Any) -> tuple[Any, Tensor]:
    """Return the output of ``generate`` and its logits (B, steps, V)."""
    output = talk.model.generate(**inputs, **{**OPTIONS, **more})
    return output, torch.stack(output.logits, 1)


def prefilled(talk: Talk, inputs: dict[str, Any]) -> Any:
    """Return the cache of a prompt that `forward` has seen."""
    cache = DynamicCache(config=talk.model.config.get_text_config(decoder=True))
    with torch.no_grad():
        return talk.model(**inputs, use_cache=True, past_key_values=cache).past_key_values


def second_turn(talk: Talk, output: Any) -> dict[str, Any]:
    """Return the inputs of the turn after an answer: all ids so far and two more."""
    ids = torch.cat([output.sequences, torch.full((len(output.sequences), 2), 12)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
