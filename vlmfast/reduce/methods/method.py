"""The bases of the methods to reduce visual tokens, and the register of methods by name."""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.functions import accepting
from vlmfast.host import to_device
from vlmfast.ops.token_merge import merge_slots, top_tokens
from vlmfast.reduce.tokens import Selection, VisualTokens

METHODS: dict[str, type[Named]] = {}  # by name


class Registering(abc.ABCMeta):
    """Take ``name="best"`` beside the bases of a class, which Python 3.10 confuses with the name of the class."""

    def __new__(
        mcs,
        class_name: str,
        bases: tuple[type, ...],
        members: dict[str, Any],
        /,
        name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make the class, and note it by its name."""
        made: Any = super().__new__(mcs, class_name, bases, members, **kwargs)
        if name is not None:
            METHODS[name] = made
        return made


class Named(metaclass=Registering):
    """The base of all methods, which have a name to type and arguments."""

    takes: ClassVar[tuple[str, ...]] = ("image", "video")  # the kinds that it reduces; others stay as they are
    reads_text: ClassVar[bool] = False  # whether it chooses by the question, so that it needs the prompt

    @classmethod
    def required(cls) -> list[str]:
        """Return the names of the arguments that have no default."""
        parameters = inspect.signature(cls).parameters.values()
        return [parameter.name for parameter in parameters if parameter.default is parameter.empty]

    def __repr__(self) -> str:
        return type(self).__name__


class Method(Named):
    """A method that reduces visual tokens before the language model, by `budget`, and `score` or `choose`.

    A file in this folder with ``class Best(PruningMethod, name="best")`` is all that it takes for ``vlmfast.Best``,
    ``python -m vlmfast demo --reduce best:64`` (a number or share for each argument without a default) and the tests.
    """

    keeps_cls: ClassVar[bool] = False  # whether a CLS token is kept as well, in front
    trusted: ClassVar[bool] = True  # whether the `choose` of this very class needs no check, which waits for a GPU

    @abc.abstractmethod
    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Return how many of ``count`` tokens are kept, and how many the others are merged into, without a CLS token.

        Where they are the tokens of several crops together, a number of tokens counts for each, see `share`. Of an
        image that has fewer tokens than this, all are kept.
        """

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N): how much each token is worth: the attention that it gets, unless the method says otherwise."""
        return tokens.scores()

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        """(B, k) int64, ascending: the tokens that are kept; here those with the highest scores.

        They are on the device of the tokens, or on the CPU, where a check does not wait for the device.
        """
        scores, shape = self.score(tokens), (tokens.batch, tokens.count)
        check_scores(self, scores)
        if scores.shape != shape:
            raise ValueError(f"score of {self} must be of the shape (B, N) = {shape}, got {tuple(scores.shape)}")
        return accepting(top_tokens, scores)(scores, k)

    def counts(self, count: int, has_cls: bool, total: int, crops: int = 1) -> tuple[int, int, bool]:
        """Return, before encoding, how many tokens of an image are kept and merged into, and whether a CLS token is.

        Args:
            count: N, its tokens without a CLS token.
            has_cls: whether there is a CLS token that may be kept.
            total: how many tokens the model itself makes of it, see `VisualTokens`.
            crops: the number of crops whose tokens these are.

        Raises:
            TypeError: if the budget is not two ints. ValueError: if it is below 0.
        """
        budget = self.budget(total, has_cls, crops)
        if not isinstance(budget, (tuple, list)) or len(budget) != 2 or not all(map(is_int, budget)):
            raise TypeError(f"budget of {self} must return two ints, kept and contextual, got {budget!r}")
        kept, contextual = budget
        if kept < 0 or contextual < 0:
            raise ValueError(f"budget of {self} must be of at least 0 + 0 visual tokens, got {kept} + {contextual}")
        keep_cls = self.keeps_cls and has_cls and total > 0
        room = min(count, total - 1 if keep_cls else total)
        kept = min(kept, room)
        return kept, min(contextual, room - kept), keep_cls

    def select(self, tokens: VisualTokens) -> Selection:
        """Decide for all images at once.

        Raises:
            ValueError: if the budget is below 0, or `score` or `choose` return something else than they have to.
        """
        budget = self.counts(tokens.count, tokens.has_cls, tokens.total, tokens.crops)
        return self._selection(tokens, self._chosen(tokens, budget[0]), budget)

    def select_videos(self, tokens: VisualTokens) -> Selection:
        """Decide for B videos at once: here frame by frame, each an image with a budget of its own.

        Raises:
            ValueError: as `select`.
        """
        return self.select(tokens.by_frame()).of_videos(tokens.crops)

    def select_each(self, groups: Sequence[VisualTokens], videos: bool = False) -> list[Selection]:
        """Decide for groups of images or videos, those of a group of one size: here group by group.

        Raises:
            ValueError: as `select`.
        """
        return [self.select_videos(tokens) if videos else self.select(tokens) for tokens in groups]

    def _selection(self, tokens: VisualTokens, chosen: Tensor, budget: tuple[int, int, bool]) -> Selection:
        """Return the selection of these tokens, by a budget as `counts` returns it."""
        _, contextual, keep_cls = budget
        metric = tokens.metric() if contextual else chosen.new_zeros(tokens.batch, tokens.count, 1).float()
        slots = accepting(merge_slots, metric)(metric, chosen, contextual)
        return Selection(chosen, slots, contextual, keep_cls=keep_cls)

    def _chosen(self, tokens: VisualTokens, k: int) -> Tensor:
        """Return the result of `choose` on the device of the tokens, checked unless its class is trusted."""
        chosen = self.choose(tokens, k)
        _check_tensor(f"choose of {self}", chosen)
        if chosen.shape != (tokens.batch, k):
            raise ValueError(f"choose of {self} must return ({tokens.batch}, {k}), got {tuple(chosen.shape)}")
        if chosen.dtype != torch.int64:
            raise ValueError(f"choose of {self} must return int64 positions, got {chosen.dtype}")
        writer = next(cls for cls in type(self).__mro__ if "choose" in vars(cls))
        if k and not vars(writer).get("trusted", False):
            ends = chosen.new_tensor([-1, tokens.count]).expand(len(chosen), 2)
            wrong = (torch.cat([ends[:, :1], chosen, ends[:, 1:]], 1).diff(dim=1) < 1).any(1)
            if bool(wrong.any()):
                raise ValueError(
                    f"choose of {self} must return ascending positions within 0 and {tokens.count - 1}, each once, "
                    f"got {chosen[wrong][0].tolist()}"
                )
        return to_device(tokens.device, chosen)[0]


@dataclass(frozen=True)
class PruningMethod(Method):
    """A method that keeps some of the tokens and drops the others, by `score` or `choose`.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither. TypeError: for a method with neither of the two.
    """

    keep: int | float

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        cls = type(self)
        if cls.score is Method.score and cls.choose is Method.choose:
            raise TypeError(f"{cls.__name__} must have score(tokens) or choose(tokens, k), and has neither")

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep at least one token of an image, unless none at all are asked for, and merge nothing."""
        return share(self.keep, count, crops, least=1), 0


def share(value: float, count: int, crops: int, least: int = 0) -> int:
    """Return a number of tokens: an int for each crop, a float as a share of ``count``, rounded down as published.

    Any share above 0 of an image's tokens is at least ``least`` of them.
    """
    if isinstance(value, int):
        return value * crops
    return max(int(value * count), min(least, count) if value > 0 else 0)


def is_int(value: object) -> bool:
    """Tell whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_scores(method: object, scores: object) -> None:
    """Raise unless what the ``score`` of a method returned is a tensor of real numbers.

    Raises:
        TypeError: if it is not.
    """
    _check_tensor(f"score of {method}", scores)
    if scores.is_complex():  # type: ignore[attr-defined]
        raise TypeError(f"score of {method} must return real numbers, got {scores.dtype}")  # type: ignore[attr-defined]


def _check_tensor(what: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must return a tensor, got {type(value).__name__}")


def check_power(name: str, value: object) -> None:
    """Raise unless a value can be the power of something that is 0 or more.

    Raises:
        TypeError: for what is no number. ValueError: for a negative one, or one that is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_share(name: str, value: object) -> None:
    """Raise unless ``value`` is a number of tokens, or a share of them from 0.0 to 1.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of tokens (int) or a share of them (float), got {value!r}")
    if value < 0 or (isinstance(value, float) and not value <= 1.0):
        raise ValueError(f"{name} must be an int of at least 0 or a float within 0.0 and 1.0, got {value!r}")


def told(value: object) -> str:
    """Say what was given in the place of a method."""
    if isinstance(value, type) and issubclass(value, Named):
        return f"the class {value.__name__}, without its arguments ({', '.join(value.required())})"
    return type(value).__name__
