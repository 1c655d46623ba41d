"""Conversations with images for every family that can reduce visual tokens, and its language model run by hand on them.

Nothing here rewrites a batch: a prompt is a list of ids without padding, and the language model gets embeddings and
has no cache.
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

WORD = 7  # ids from here on are words
EACH_TYPE = tuple(REDUCERS)
METHODS = (VisionZip(dominant=0.5, contextual=0.25), EvenTokens(0.25))
EACH_METHOD = [  # for images, without those that draw other numbers for another batch, and what is no choice of tokens
    pytest.param(cls(*[0.5, 0.25][-len(cls.required()) :]), id=cls.__name__)
    for cls in CLASSES.values()
    if issubclass(cls, Method) and "image" in cls.takes and not hasattr(cls, "seed") and cls is not SmallerImage
]


@dataclass
class Talk:
    """A model, and how to write prompts for it.

    Attributes:
        model_type: its type.
        model: tiny and random.
        wants_types: whether its inputs have ``mm_token_type_ids``.
        pictures: the vision inputs of single images, of several sizes where the model takes them.
        counts: how many placeholders each has.
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
        """Whether `vlmfast.compress_inputs` takes it: not with DeepStack and without mm_encoder_outputs."""
        takes_features = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        return takes_features or not hasattr(self.model.base_model.language_model, "_deepstack_process")

    def ids(self, *parts: int) -> list[int]:
        """Make a prompt: the image of that number for numbers below 3, and other numbers as ids of text."""
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
        """Make the inputs, with the token types that belong to the ids where the model wants them."""
        if self.wants_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs


def _picture(model: nn.Module, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One image; the second one of another shape, the third of other pixels."""
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


# ---- by hand ----


@dataclass
class ByHand:
    """One prompt, unpadded, whose visual tokens were reduced.

    Attributes:
        embeddings: (1, N, D).
        positions: (3, 1, N) with M-RoPE, else None.
        after: the position that follows with M-RoPE.
        visual: (1, N) bool, true at visual tokens.
        levels: DeepStack's, (V, D) each.
        columns: (N,) the columns of the full prompt that are left.
        full: the positions (3, 1, L) of the full prompt with M-RoPE.
        prompt: as `Talk.ids` takes it.
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
        images: list[ReducedImage] = reduce(base, talk.vision(*numbers), method) if numbers else []
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
        """(1, N, D): what the language model makes of it."""
        return run(self.talk, self.embeddings, self.positions, self.visual, self.levels)

    def logits(self) -> Tensor:
        """(N, V)."""
        return self.talk.model.lm_head(self.hidden())[0]

    def full_logits(self) -> Tensor:
        """(L, V): of each token of the full prompt its own, or those of the last one before it that is left."""
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
        """Return the next words (none that a second turn would read as padding or images) and their logits."""
        found, logits = [], []
        for _ in range(steps):
            logits.append(self.logits()[-1])
            found.append(WORD + int(logits[-1][WORD:].argmax()))
            self.then(found[-1])
        return found, torch.stack(logits)


def rope(talk: Talk, ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
    """(3, 1, L): the positions of M-RoPE of one whole prompt."""
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
