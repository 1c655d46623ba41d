"""The effect of cuts between layers on a prompt, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmfast.reduce.cuts.run import Cut, Prompt


@dataclass(frozen=True)
class Cuts:
    """The cuts of the last prompt with images.

    Attributes:
        samples: the number of samples of the batch.
        visual: layer -> the number of visual tokens of all samples in it and in the layers up to the next key.
        columns: layer -> the number of columns of a sample, with padding and the cache before the prompt.
        layers: the number of layers.
    """

    samples: int
    visual: dict[int, int]
    columns: dict[int, int]
    layers: int

    @classmethod
    def of(cls, prompt: Prompt, cuts: Mapping[int, Cut], past: int, layers: int) -> Cuts:
        """Describe the cuts of a call."""
        visual, columns = {0: sum(prompt.counts)}, {0: past + prompt.visual.shape[1]}
        for layer, cut in sorted(cuts.items()):
            visual[layer] = sum(cut.kept)
            columns[layer] = past + max(prompt.left(cut.kept))
        return cls(len(prompt.counts), visual, columns, layers)

    def columns_of_layers(self) -> list[int]:
        """Return the number of columns in each layer."""
        found: list[int] = []
        for layer in range(self.layers):
            found.append(self.columns.get(layer, found[-1] if found else 0))
        return found

    def report(self) -> str:
        """Say how many visual tokens each layer has."""
        first = list(self.visual)
        parts = []
        for layer, after in zip(first, [*first[1:], self.layers], strict=True):
            layers = f"layer {layer}" if after == layer + 1 else f"layers {layer}-{after - 1}"
            parts.append(f"{self.visual[layer]} in {layers}")
        return f"visual tokens of the last prompt {', '.join(parts)}"
