"""The base of methods that reduce visual tokens between the layers of the language model."""

from __future__ import annotations

import abc

from torch import Tensor

from vlmfast.reduce.methods.method import Named, check_scores, is_int


class LayerMethod(Named):
    """A method that cuts visual tokens between two layers of the language model, by `cut_before` and `budget`.

    The layers before a cut see every token, those behind it only what is kept, at the positions that the tokens had.
    What is kept is chosen in each sample by the attention that its last token pays in the layer before the cut, or, of
    a method that sets ``reads_text``, by that of the words of its text which say most about its visual tokens. A file
    in this folder with ``class Late(LayerMethod, name="late")`` is all that it takes for ``vlmfast.Late``.
    """

    @property
    @abc.abstractmethod
    def cut_before(self) -> tuple[int, ...]:
        """The layers at whose input tokens are cut, counted from 0, ascending."""

    @abc.abstractmethod
    def budget(self, cut: int, count: int) -> int:
        """Return how many of the ``count`` visual tokens that a sample began with are left after that cut."""

    def score(self, attention: Tensor) -> Tensor:
        """Say what each token is worth, given the attention (B, N) that it gets: that, as it is.

        Float32, the mean over the heads. The columns of text are among the N; their worth is not asked for.
        """
        return attention

    def counts(self, cut: int, count: int) -> int:
        """Return the `budget`, checked.

        Raises:
            TypeError: if it is not an int. ValueError: if it is below 0.
        """
        kept = self.budget(cut, count)
        if not is_int(kept):
            raise TypeError(f"budget of {self} must return an int, got {kept!r}")
        if kept < 0:
            raise ValueError(f"budget of {self} must be of at least 0 visual tokens, got {kept}")
        return kept

    def scores(self, attention: Tensor) -> Tensor:
        """(B, N): the result of `score`, checked; float32 if it is of integers.

        Raises:
            TypeError: if it is not a tensor of numbers. ValueError: if it is of another shape.
        """
        scores = self.score(attention)
        check_scores(self, scores)
        if scores.shape != attention.shape:
            raise ValueError(f"score of {self} must return {tuple(attention.shape)}, got {tuple(scores.shape)}")
        return scores if scores.is_floating_point() else scores.float()


def check_layers(method: LayerMethod) -> None:
    """Raise unless a method says before which layers it cuts.

    Raises:
        TypeError: if `cut_before` is not a tuple of ints. ValueError: for a layer without one before it.
    """
    if not isinstance(method.cut_before, tuple):
        raise TypeError(f"cut_before of {method} must be a tuple of layers, got {method.cut_before!r}")
    for layer in method.cut_before:
        check_layer(f"cut_before of {method}", layer)


def check_layer(name: str, value: object) -> None:
    """Raise unless ``value`` is a layer that has one before it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a layer (int), got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, as the layer before it gives the scores, got {value}")
