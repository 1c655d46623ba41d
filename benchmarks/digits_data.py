"""Pictures and videos composed of scikit-learn's digits, which are scans of handwriting, and questions about them."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, DIGIT = 8, 16  # pixels
NOTHING = 10  # the answer for a place without a digit
PAD, BOS, EOS, IMAGE, VIDEO, START, END = range(7)
QUESTION = 7  # + quarter, or + ordinal number
ANSWER = QUESTION + 4  # + digit; + 10 for nothing
VOCABULARY = ANSWER + NOTHING + 1
OCCUPIED = 0.75  # the chance that a quarter holds a digit


@dataclass(frozen=True)
class Batch:
    """Pictures, or videos, and what they show.

    Attributes:
        pixels: (B, T, side, side), grey.
        contents: (B, questions), the answer to each question: a digit or NOTHING.
        places: (B, T * patches), what each patch of each frame shows: a digit or NOTHING.
    """

    pixels: Tensor
    contents: Tensor
    places: Tensor


class Drawer(abc.ABC):
    """Draws pictures from a part of the scans, so that training and test can use different ones."""

    side: int  # pixels
    frames: int
    questions: int

    def __init__(self, train: bool, seed: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        split = train_test_split(data.images, data.target, test_size=0.25, random_state=0, stratify=data.target)
        images, labels = split[0::2] if train else split[1::2]
        scans = torch.tensor(images, dtype=torch.float32)[:, None] / 16
        self.scans = F.interpolate(scans, size=(DIGIT, DIGIT), mode="bilinear")[:, 0]
        self.labels = torch.tensor(labels)
        self.generator = torch.Generator().manual_seed(seed)

    @abc.abstractmethod
    def draw(self, batch: int) -> Batch:
        """Draw a batch."""

    def _canvas(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return a noisy background, the same in all frames, and what its patches show: nothing."""
        ground = 0.15 * torch.rand(batch, 1, self.side, self.side, generator=self.generator)
        per_side = self.side // PATCH
        nothing = torch.full((batch, self.frames, per_side, per_side), NOTHING)
        return ground.repeat(1, self.frames, 1, 1), nothing

    def _put(self, canvas: Tensor, shown: Tensor, scan: int, at: tuple[int, int, int, int]) -> None:
        """Add a scan to a frame of a picture, at a row and column of patches: (picture, frame, row, column)."""
        picture, frame, row, column = at
        y, x, patches = row * PATCH, column * PATCH, DIGIT // PATCH
        canvas[picture, frame, y : y + DIGIT, x : x + DIGIT] += self.scans[scan]
        shown[picture, frame, row : row + patches, column : column + patches] = self.labels[scan]

    def _finish(self, canvas: Tensor, contents: Tensor, shown: Tensor) -> Batch:
        return Batch((canvas - 0.2) / 0.4, contents, shown.flatten(1))


class Pictures(Drawer):
    """Pictures of which some quarters hold a digit, somewhere on the grid of the patches."""

    side, frames, questions = 64, 1, 4

    def draw(self, batch: int) -> Batch:
        """Draw pictures, whose contents are those of their quarters."""
        half, generator = self.side // PATCH // 2, self.generator
        canvas, shown = self._canvas(batch)
        chosen = torch.randint(len(self.labels), (batch, self.questions), generator=generator)
        occupied = torch.rand(batch, self.questions, generator=generator) < OCCUPIED
        places = torch.randint(half - DIGIT // PATCH + 1, (batch, self.questions, 2), generator=generator)
        for picture, quarter in occupied.nonzero().tolist():
            row, column = places[picture, quarter].tolist()
            at = picture, 0, row + half * (quarter // 2), column + half * (quarter % 2)
            self._put(canvas, shown, int(chosen[picture, quarter]), at)
        return self._finish(canvas, torch.where(occupied, self.labels[chosen], NOTHING), shown)


class Videos(Drawer):
    """Videos of three digits, one after the other, each for two to four frames, that move by a patch a frame."""

    side, frames, questions = 32, 8, 3

    def draw(self, batch: int) -> Batch:
        """Draw videos; their contents are the digits in the order in which they come."""
        generator, room = self.generator, self.side // PATCH - DIGIT // PATCH
        canvas, shown = self._canvas(batch)
        chosen = torch.randint(len(self.labels), (batch, self.questions), generator=generator)
        spare = self.frames - 2 * self.questions
        longer = torch.randint(self.questions, (batch, spare), generator=generator)
        lengths = 2 + F.one_hot(longer, self.questions).sum(1)
        places = torch.randint(room + 1, (batch, self.questions, 2), generator=generator)
        ways = torch.randint(4, (batch, self.frames), generator=generator).tolist()
        for picture, durations in enumerate(lengths.tolist()):
            frame = 0
            for number, duration in enumerate(durations):
                row, column = places[picture, number].tolist()
                for _ in range(duration):
                    self._put(canvas, shown, int(chosen[picture, number]), (picture, frame, row, column))
                    down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[ways[picture][frame]]
                    row, column = (min(max(place, 0), room) for place in (row + down, column + right))
                    frame += 1
        return self._finish(canvas, self.labels[chosen], shown)
