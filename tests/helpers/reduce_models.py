"""Prompts with images for every model family that can reduce visual tokens, and an oracle for reduced prompts.

The oracle never edits a batch: a prompt is a list of ids without padding, and the language model runs on embeddings,
without a cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.patches_models import cast, tiny
from tests.helpers.tiny_models import IMAGE, VISION_END, VISION_START, pixels
from vlmfast.reduce import EvenTokens, Method, ReducedImage, SmallerImage, VisionZip
from vlmfast.reduce.families import REDUCERS
from vlmfast.reduce.methods import CLASSES
from vlmfast.reduce.text import Text

WORD = 7  # token ids from here on are text
EACH_TYPE = tuple(REDUCERS)
METHODS = (VisionZip(dominant=0.5, contextual=0.25), EvenTokens(0.25))
EACH_METHOD = [  # for images, except those that draw other numbers in another batch, and what is no choice of tokens
    pytest.param(cls(*[0.5, 0.25][-len(cls.required()) :]), id=cls.__name__)
    for cls in CLASSES.values()
    if issubclass(cls, Method) and "image" in cls.takes and not hasattr(cls, "seed") and cls is not SmallerImage
]


@dataclass
class Talk:
    """A model, and how to make prompts for it.

    Attributes:
        model_type: the type of the model.
        model: the tiny random model.
        wants_types: whether its inputs include ``mm_token_type_ids``.
        pictures: the vision inputs of each image, of several sizes where the model takes them.
        counts: the number of placeholders of each image.
    """

    model_type: str
    model: Any
    wants_types: bool
    pictures: list[dict[str, Tensor]]
    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, model_type: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Talk:
        model, inputs = tiny(model_type, dtype, layers)
        talk = cls(model_type, model, "mm_token_type_ids" in inputs, [])
        for number in range(3):
            picture = _picture(model, inputs, number)
            talk.pictures.append({name: cast(value, dtype) for name, value in picture.items()})
        with torch.no_grad():
            for picture in talk.pictures:
                rows = model.base_model.get_image_features(**picture, return_dict=True).pooler_output
                talk.counts.append(sum(row.shape[0] for row in rows))
        return talk

    @property
    def compressible(self) -> bool:
        """Tell whether `vlmfast.compress_inputs` takes it: not if it has DeepStack but no mm_encoder_outputs."""
        takes_features = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        return takes_features or not hasattr(self.model.base_model.language_model, "_deepstack_process")

    def ids(self, *parts: int) -> list[int]:
        """Make the ids of a prompt: numbers below 3 stand for the image of that index, others are ids of text."""
        found = []
        for part in parts:
            found += [VISION_START, *[IMAGE] * self.counts[part], VISION_END] if part < 3 else [part]
        return found

    def vision(self, *numbers: int) -> dict[str, Tensor]:
        """Make the vision inputs of these images, in this order."""
        chosen = [self.pictures[number] for number in numbers]
        return {name: torch.cat([picture[name] for picture in chosen]) for name in chosen[0]} if chosen else {}

    def batch(self, *prompts: tuple[int, ...], side: str = "left") -> dict[str, Tensor]:
        """Make the inputs of a batch of prompts, each as `ids` takes it."""
        rows = [self.ids(*prompt) for prompt in prompts]
        longest = max(map(len, rows))
        padding = [[0] * (longest - len(row)) for row in rows]
        ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)])
        ones = [[1] * len(row) for row in rows]
        mask = [pad + one if side == "left" else one + pad for pad, one in zip(padding, ones, strict=True)]
        images = self.vision(*(part for prompt in prompts for part in prompt if part < 3))
        return self.with_types({"input_ids": ids, "attention_mask": torch.tensor(mask), **images})

    def with_types(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the token types of the ids to the inputs, where the model wants them."""
        if self.wants_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs


def _picture(model: nn.Module, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Make the vision inputs of one image; image 1 has another shape, image 2 other pixels."""
    if "image_grid_thw" in inputs:
        grid = [(1, 4, 4), (1, 4, 8), (1, 8, 6)][number]
        rows = pixels(48, inputs["pixel_values"].shape[1])[: grid[1] * grid[2]]
        return {"pixel_values": rows * (1 + number), "image_grid_thw": torch.tensor([grid])}
    picture = {"pixel_values": inputs["pixel_values"][:1] * (1 - number)}
    if number == 1:
        picture["pixel_values"] = inputs["pixel_values"][1:2]
    if "image_sizes" in inputs:
        picture["image_sizes"] = torch.tensor([[(28, 56), (56, 28), (28, 56)][number]])
    return picture


# ---- the oracle ----


@dataclass
class ByHand:
    """One reduced prompt without padding, built and run by hand.

    Attributes:
        embeddings: (1, N, D) embeddings of the kept columns.
        positions: (3, 1, N) with M-RoPE, else None.
        after: the position that follows the prompt, with M-RoPE.
        visual: (1, N) bool, true at visual tokens.
        levels: the levels of DeepStack, (V, D) each.
        columns: (N,) indexes of the kept columns in the full prompt.
        full: (3, 1, L) positions of the full prompt, with M-RoPE.
        prompt: the prompt as `Talk.ids` takes it.
    """

    talk: Talk
    embeddings: Tensor
    positions: Tensor | None
    after: int
    visual: Tensor
    levels: list[Tensor]
    columns: Tensor
    full: Tensor | None
    prompt: tuple[int, ...]

    @classmethod
    def of(cls, talk: Talk, method: Method, prompt: tuple[int, ...], tail: list[int] | None = None) -> ByHand:
        base, ids = talk.model.base_model, talk.ids(*prompt) + (tail or [])
        numbers = [part for part in prompt if part < 3]
        reduce = REDUCERS[talk.model_type].reduce
        texts = by_hand(talk, ids)
        images: list[ReducedImage] = reduce(base, talk.vision(*numbers), method, texts) if numbers else []
        columns, rows, at = [], [], 0
        levels: list[list[Tensor]] = [[] for _ in (images[0].levels if images else ())]
        embed = base.get_input_embeddings()
        waiting = list(images)
        while at < len(ids):
            if ids[at] != IMAGE:
                columns.append(at)
                rows.append(embed(torch.tensor([ids[at]])))
                at += 1
                continue
            image = waiting.pop(0)
            columns += [at + int(column) for column in image.columns]
            rows.append(image.features)
            for level, more in zip(levels, image.levels, strict=True):
                level.append(more)
            at += image.total
        left = torch.tensor(columns)
        visual = (torch.tensor(ids)[left] == IMAGE)[None]
        positions = full = None
        if hasattr(base, "get_rope_index"):
            full = rope(talk, torch.tensor([ids]), talk.vision(*numbers))
            positions = full[:, :, left]
        after = int(full.max()) + 1 if full is not None else len(columns)
        own = [torch.cat(level) for level in levels]
        return cls(talk, torch.cat(rows)[None], positions, after, visual, own, left, full, prompt)

    def hidden(self) -> Tensor:
        """Return the (1, N, D) output of the language model."""
        return run(self.talk, self.embeddings, self.positions, self.visual, self.levels)

    def logits(self) -> Tensor:
        """Return the (N, V) logits of the short prompt."""
        return self.talk.model.lm_head(self.hidden())[0]

    def full_logits(self) -> Tensor:
        """Return (L, V) logits for the full prompt; a removed column has those of the last kept column before it."""
        left = torch.arange(len(self.talk.ids(*self.prompt)))[:, None] >= self.columns
        return self.logits()[left.sum(1) - 1]

    def then(self, token: int) -> None:
        """Append one token."""
        row = self.talk.model.base_model.get_input_embeddings()(torch.tensor([[token]]))
        self.embeddings = torch.cat([self.embeddings, row], 1)
        self.visual = torch.cat([self.visual, torch.zeros(1, 1, dtype=torch.bool)], 1)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, torch.full((3, 1, 1), self.after)], 2)
        self.after += 1

    def greedy(self, steps: int) -> tuple[list[int], Tensor]:
        """Return the next tokens and their logits; none of them is padding or a placeholder, for a second turn."""
        found, logits = [], []
        for _ in range(steps):
            logits.append(self.logits()[-1])
            found.append(WORD + int(logits[-1][WORD:].argmax()))
            self.then(found[-1])
        return found, torch.stack(logits)


def question(talk: Talk, ids: list[int]) -> list[int]:
    """Return the words behind the last image of a prompt: neither the configuration's marks nor padding."""
    marks = {0, 1, 2, *([VISION_START, VISION_END] if talk.model_type.startswith("qwen") else [])}
    last = max(at for at, token in enumerate(ids) if token == IMAGE)
    return [token for token in ids[last + 1 :] if token not in marks]


def by_hand(talk: Talk, ids: list[int]) -> Any:
    """Make what gives a reducer the text of each image of one prompt."""

    def text(totals: list[int]) -> Any:
        def of() -> Text:
            words = torch.tensor([question(talk, ids)] * len(totals))
            return Text(talk.model.base_model.get_input_embeddings()(words).detach(), torch.ones_like(words).bool())

        return of

    return text


def rope(talk: Talk, ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
    """Return the (3, 1, L) M-RoPE positions of one full prompt."""
    base = talk.model.base_model
    names = inspect.signature(type(base).get_rope_index).parameters
    extra = {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in names else {}
    grids = {"image_grid_thw": vision["image_grid_thw"]} if vision else {}
    return base.get_rope_index(input_ids=ids, attention_mask=torch.ones_like(ids), **grids, **extra)[0]


@torch.no_grad()
def run(
    talk: Talk,
    embeddings: Tensor,
    positions: Tensor | None,
    visual: Tensor,
    levels: list[Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """Run the language model on embeddings, without a cache."""
    extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": levels} if levels else {}
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long) if mask is None else mask
    return talk.model.base_model.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False, **extra
    ).last_hidden_state


def clone(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inputs.items()}
