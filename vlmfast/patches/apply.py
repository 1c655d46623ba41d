"""`patch` and what it returns: replacements put into one model instance and taken out again."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn

from vlmfast.modules import hugging_face_model
from vlmfast.patches import layers
from vlmfast.patches.plan import Site, find_sites
from vlmfast.patches.projects import Named
from vlmfast.patches.report import Placed, count
from vlmfast.patches.swap import PatchedModule, is_swapped, patched_class, set_class, trace_anew
from vlmfast.reduce.generation import shortening
from vlmfast.reduce.methods import LayerMethod, Method
from vlmfast.reduce.reduced_image import ReducedImage

# class -> method -> replacement; or attribute -> property
Replacements = dict[type, dict[str, Any]]


class Reducing(Protocol):
    """What reduces visual tokens in a patched model: `Reduction`, or what a project outside transformers has."""

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last call."""

    @property
    def videos(self) -> list[ReducedImage]:
        """The videos of the last call."""

    def replacements(self) -> Replacements:
        """Return the replacement of each method."""

    def report(self) -> str:
        """Return the method, and what it did to the last images."""


@dataclass(repr=False)
class Patch:
    """What `patch` did to a model. As a context manager, it undoes that at the end of the block.

    Attributes:
        model_type: the model's ``config.model_type`` or, where it has none, the name of its class.
        replaced: site -> how many modules got the replacement.
        skipped: site -> why it was left as it was.
        reduction: how prompts are shortened, and what became of the last one; None where ``reduce`` was not given.
    """

    model_type: str
    replaced: dict[str, int]
    skipped: dict[str, str]
    reduction: Reducing | None = None
    _placed: Placed | None = None
    _classes: dict[nn.Module, type] = field(default_factory=dict)  # that the modules were given

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last prompt whose visual tokens were reduced, for `vlmfast.reduce.overlay`."""
        return [] if self.reduction is None else self.reduction.images

    @property
    def videos(self) -> list[ReducedImage]:
        """The videos of that prompt."""
        return [] if self.reduction is None else self.reduction.videos

    def report(self) -> str:
        """Write a line for each site: how many modules run the replacement now, or why not.

        Methods that somebody replaced again, and modules that came after the patch, are told too. Then what became of
        the last prompt, where visual tokens are reduced. Once the patch is undone, the lines say what was replaced.
        """
        rows = {site: count(number, "module") for site, number in self.replaced.items()}
        rows |= {site: f"skipped: {reason}" for site, reason in self.skipped.items()}
        if self._placed is not None and self._patched():
            rows |= self._placed.rows()
        width = max(map(len, rows), default=0)
        lines = [f"{self!r}:", *(f"  {site:{width}}  {text}" for site, text in rows.items())]
        if self.reduction is not None:
            lines.append(f"  {self.reduction.report()}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Give every module its own class back, also the copies that were put into the model since.

        A second call does nothing. A method that was captured before, such as ``model.forward`` in a partial or in what
        ``Accelerator.prepare`` returned, runs upstream's code from then on. That of a norm, such as ``norm.forward``,
        goes on calling the op, with the weights of its module: to ask would make every norm slower.

        Raises:
            RuntimeError: if the class of a module was changed again since; nothing is undone then.
        """
        _restore(self._patched())
        self._placed, self._classes = None, {}

    def _patched(self) -> list[nn.Module]:
        """Return the modules that are patched by this patch now."""
        inside = [] if self._placed is None else self._placed.model.modules()
        classes = tuple(set(self._classes.values()))
        return [module for module in dict.fromkeys((*self._classes, *inside)) if isinstance(module, classes)]

    def __copy__(self) -> Patch:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """Be the patch of the copy of the model: what holds both may be copied."""
        # the reduction comes after the model, whose copy it has to know
        return replace(self, **{name: copy.deepcopy(value, memo) for name, value in reversed(vars(self).items())})

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model: its modules are pickled as not patched."""
        return {**vars(self), "_placed": None, "_classes": {}}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        patched = self._patched()
        state = count(len(patched), "module") if patched else "undone"
        return f"<Patch of {self.model_type}: {state}, {count(len(self.replaced), 'site')}>"


def patch(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    reduce: Method | LayerMethod | Sequence[Method | LayerMethod] | None = None,
) -> Patch:
    """Replace the methods whose code vlmfast knows, on this instance only.

    A method is known by its body, the code that it runs with all that this names: neither the type of the model nor the
    name of the class decides. Each module is given a subclass of its own class, of the same name; ``isinstance``,
    ``state_dict``, hooks and gradient checkpointing work as before. A copy is as patched as what was copied; a pickled
    model holds the original classes, and ``type(model)(config)`` or ``type(model).from_pretrained(path)`` makes a model
    that is not patched. A norm or a placeholder mask whose body is not known is skipped with a warning; `Patch.report`
    lists all of them. For the backward a norm keeps its input, where upstream keeps a float32 copy of one in half
    precision: in training, code that changes the input in place after the norm has read it ends in torch's error about
    an inplace operation. What ``torch.compile`` has traced in this process is traced anew at its next call. A
    parametrization that a module had before the patch can be removed after ``undo`` only.

    With ``reduce`` the model also sees fewer visual tokens, which changes what it answers. ``generate`` and ``forward``
    encode and reduce images and videos and shorten the prompt once, before the language model sees it. Prompts without
    any are left alone. With M-RoPE (Qwen-VL) each token that is left stays at its position, and what follows goes on as
    after the full prompt; other models number the tokens anew.

    * What ``generate`` returns begins with the caller's full ``input_ids``; ``max_length`` counts these, and streamers,
      logits processors and stopping criteria of your own are shown these.
    * ``forward`` returns the logits of the short prompt. Where ``labels``, ``num_items_in_batch`` or ``logits_to_keep``
      count columns, it returns those of the full prompt; a column that was left out has those of the one before.
    * A cache remembers which columns of the prompt it has: a second turn is given the full ids again.

    Args:
        model: a Hugging Face model, one with remote code, one of their sub-models, or any module around parts of them;
            also inside PEFT, ``torch.compile``, accelerate or DistributedDataParallel.
        only: replace only the sites that match this pattern, or one of these, such as ``"*RMSNorm.forward"``. A site of
            transformers is called "<model folder>.<Class>.<method>", another has the whole name of its module in front.
        exclude: leave out the sites that match.
        reduce: how visual tokens are reduced, such as ``vlmfast.VisionZip(dominant=54, contextual=10)`` before the
            language model or ``vlmfast.FastV(layer=2, keep=0.5)`` between its layers, or a list of the one and then the
            other; None for all of them. Needs transformers 5.17 or later, and the model with its head.

    Returns:
        A `Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module, or ``reduce`` not a method. ValueError: for a model in which nothing is
            known, a pattern that matches no site, or ``reduce`` with a model whose visual tokens cannot be reduced.
            RuntimeError: if the model is patched already, or nothing in it could be replaced.
    """
    _check_unpatched(model)
    label = next(filter(None, map(_model_type, model.modules())), type(model).__name__)
    sites = find_sites(model)
    reduction = None if reduce is None else shortening(hugging_face_model(model), reduce)
    if reduction is None and all(site.body is None or site.body.function is None for site in sites):
        raise ValueError(_nothing_known(label, sites))
    chosen = _choose(label, list(dict.fromkeys(site.name for site in sites)), only, exclude)
    return _swap(model, label, sites, chosen, reduction)


def patch_projects(
    model: nn.Module,
    label: str,
    classes: tuple[str, ...],
    reduction: Callable[[list[nn.Module]], Reducing | None] | None = None,
) -> Patch:
    """Replace only the methods of projects outside transformers that classes of these names define.

    Where ``reduction`` is given, it checks the modules that have these methods, and says what reduces visual tokens.

    Raises:
        As `patch`.
    """
    _check_unpatched(model)
    named = [(site, site.body.key) for site in find_sites(model) if site.body is not None]
    sites = [site for site, key in named if isinstance(key, Named) and key.class_name in classes]
    if not sites:
        raise ValueError(
            f"model must be or hold a {' or '.join(classes)} with the methods of {label}, got a {type(model).__name__} "
            "with none"
        )
    if all(site.reason for site in sites):
        reasons = "; ".join(f"{site.name}: {site.reason}" for site in sites)
        raise ValueError(f"there is nothing to replace in this {label} model ({reasons})")
    modules = list(dict.fromkeys(module for site in sites for module in site.modules))
    reducing = None if reduction is None else reduction(modules)
    return _swap(model, label, sites, {site.name for site in sites}, reducing, stacklevel=4)


def _check_unpatched(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, PatchedModule) for module in model.modules()):
        raise RuntimeError(
            "model is patched already (a copy of a patched model is as well): undo the patch, or vlmfast.unpatch(model)"
        )


def _model_type(module: nn.Module) -> str | None:
    found = getattr(getattr(module, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def _nothing_known(label: str, sites: list[Site]) -> str:
    """Name the bodies that are most worth to be known."""
    unknown = sorted((site for site in sites if site.body is None), key=lambda site: -len(site.modules))
    told = "; ".join(f"{site.name} of {count(len(site.modules), 'module')}: {site.reason}" for site in unknown[:3])
    return f"vlmfast knows no method of this {label} model ({told or 'it has no RMSNorm and no placeholder mask'})"


def unpatch(model: nn.Module) -> int:
    """Take the patch out of a model whose `Patch` is out of reach: a copy of a patched model, a lost return value.

    Args:
        model: any module; what is not patched in it is left as it is.

    Returns:
        The number of modules that got their own class back.

    Raises:
        TypeError: if ``model`` is not a module. RuntimeError: if the class of a module was changed again since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patched: list[nn.Module] = [module for module in model.modules() if isinstance(module, PatchedModule)]
    _restore(patched)
    return len(patched)


def _restore(modules: list[nn.Module]) -> None:
    """Give patched modules their own classes back: all, or none where one cannot be."""
    if changed := {type(module).__name__ for module in modules if not is_swapped(type(module))}:
        raise RuntimeError(
            f"cannot undo: modules were given another class after the patch ({', '.join(sorted(changed))}); undo that "
            "first"
        )
    for module in reversed(modules):
        set_class(module, vars(type(module))["original_class"])
    if modules:
        trace_anew()


def _choose(
    label: str, names: list[str], only: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> set[str]:
    def matching(argument: str, patterns: str | Iterable[str]) -> set[str]:
        matched: set[str] = set()
        if not isinstance(patterns, Iterable):
            raise TypeError(f"{argument} must be a pattern or patterns of site names, got {patterns!r}")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} must be a pattern or patterns of site names, got {pattern!r}")
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                known = ", ".join(names)
                raise ValueError(f"{argument}: {pattern!r} matches no site of {label}; its sites are {known}")
            matched |= hits
        return matched

    kept = set(names) if only is None else matching("only", only)
    return kept if exclude is None else kept - matching("exclude", exclude)


def _swap(
    model: nn.Module,
    label: str,
    sites: list[Site],
    chosen: set[str],
    reduction: Reducing | None = None,
    stacklevel: int = 3,
) -> Patch:
    """Replace what is chosen and can be, and what a reduction replaces; what was done before a failure is undone."""
    skipped = {site.name: "left out by only or exclude" for site in sites if site.name not in chosen}
    skipped |= {site.name: site.reason for site in sites if site.name in chosen and site.reason is not None}
    acting = [
        (site, site.body.function)
        for site in sites
        if site.name in chosen and site.reason is None and site.body is not None and site.body.function is not None
    ]
    if not acting and reduction is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise RuntimeError(f"nothing was replaced in this {label} model ({reasons})")
    for site in sites:
        if site.name in chosen and site.reason is not None and (site.body is None or site.body.function is not None):
            warnings.warn(f"{site.name} is not patched: {site.reason}", stacklevel=stacklevel)
    replacements: Replacements = {} if reduction is None else dict(reduction.replacements())
    names: dict[type, dict[str, str]] = {}
    for site, function in acting:
        cls = type(site.modules[0])
        names.setdefault(cls, {})[site.method] = site.name
        replacements[cls] = {site.method: function, **replacements.get(cls, {})}
    classes = {cls: patched_class(cls, functions) for cls, functions in replacements.items()}
    counts: Counter[str] = Counter()
    for site, _ in acting:
        counts[site.name] += len(site.modules)
    placed = Placed(model, names, frozenset(map(type, model.modules())))
    result = Patch(label, dict(counts), skipped, reduction, placed)
    try:
        for module in [module for module in model.modules() if type(module) in classes]:
            cls = classes[type(module)]
            set_class(module, cls)
            result._classes[module] = cls
        of_layers = [site for site, function in acting if function.__module__ == layers.__name__]
        layers.follow(model, [module for site in of_layers for module in site.modules])
    except BaseException:
        result.undo()
        raise
    trace_anew()
    return result
