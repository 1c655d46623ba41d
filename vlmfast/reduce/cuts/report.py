"""What cuts between layers did to a prompt, for the report."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.reduce.cuts.run import Run


@dataclass(frozen=True)
class Cuts:
    """What was cut of the last prompt that had images.

    Attributes:
        visual: the visual tokens of all samples, by the first layer that has so many.
        layers: how many layers there are.
    """

    visual: dict[int, int]
    layers: int

    @classmethod
    def of(cls, run: Run) -> Cuts:
        """Take what a call did."""
        counts = [] if run.prompt is None else run.prompt.counts
        visual = {0: sum(counts), **{layer: sum(cut.kept) for layer, cut in sorted(run.cuts.items())}}
        return cls(visual, len(run.layers))

    def report(self) -> str:
        """Say how many visual tokens each layer has."""
        first = list(self.visual)
        parts = []
        for layer, after in zip(first, [*first[1:], self.layers], strict=True):
            layers = f"layer {layer}" if after == layer + 1 else f"layers {layer}-{after - 1}"
            parts.append(f"{self.visual[layer]} in {layers}")
        return f"visual tokens of the last prompt {', '.join(parts)}"
