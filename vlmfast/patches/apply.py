"""`patch`, `unpatch` and `Patch`: put replacements into one model instance and take them out again."""

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
from vlmfast.reduce.spelling import spelled
from vlmfast.releases import KNOWN, newer_transformers

# Original class -> name of a method -> its replacement, or name of an attribute -> the property that replaces it.
Replacements = dict[type, dict[str, Any]]


class Reducing(Protocol):
    """Interface of an object that reduces visual tokens in a patched model, such as `Reduction` of `vlmfast.reduce`.

    Patches of projects outside transformers bring their own, such as `vlmfast.compat.mgm.Reduction`.
    """

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last call."""

    @property
    def videos(self) -> list[ReducedImage]:
        """The videos of the last call."""

    def replacements(self) -> Replacements:
        """Return the replacements of the methods of each class."""

    def report(self) -> str:
        """Describe the method and how it reduced the last images."""


@dataclass(repr=False)
class Patch:
    """What `patch` did to a model. As a context manager, it undoes the patch at the end of the block.

    Attributes:
        model_type: the model's ``config.model_type`` or, where it has none, the name of its class.
        replaced: site -> number of modules that got the replacement.
        skipped: site -> why it was not replaced.
        reduction: shortens prompts and remembers how it shortened the last one; None where ``reduce`` was not given.
    """

    model_type: str
    replaced: dict[str, int]
    skipped: dict[str, str]
    reduction: Reducing | None = None
    _placed: Placed | None = None
    _classes: dict[nn.Module, type] = field(default_factory=dict)  # module -> the patched class that it was given

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last prompt with reduced visual tokens, for `vlmfast.reduce.overlay`."""
        return [] if self.reduction is None else self.reduction.images

    @property
    def videos(self) -> list[ReducedImage]:
        """The videos of the last prompt with reduced visual tokens."""
        return [] if self.reduction is None else self.reduction.videos

    def report(self) -> str:
        """Write one line per site: how many modules run the replacement now, or why none does.

        The lines also count methods that were replaced again and modules that were added since the patch. Where visual
        tokens are reduced, the last line says how the last prompt was shortened. Once the patch is undone, the lines
        say what had been replaced.
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
        """Give every patched module its own class back, including copies that were put into the model since the patch.

        A second call does nothing. A bound method that was captured earlier, such as ``model.forward`` in a partial or
        in the result of ``Accelerator.prepare``, runs upstream's code from then on. The captured forward of a norm is
        an exception: it keeps calling the op with the weights of its module, because checking whether the patch is
        still in place would slow down every norm.

        Raises:
            RuntimeError: if the class of a module was changed again since the patch; nothing is undone then.
        """
        _restore(self._patched())
        self._placed, self._classes = None, {}

    def _patched(self) -> list[nn.Module]:
        """Return the modules that this patch patches at the moment."""
        inside = [] if self._placed is None else self._placed.model.modules()
        classes = tuple(set(self._classes.values()))
        return [module for module in dict.fromkeys((*self._classes, *inside)) if isinstance(module, classes)]

    def __copy__(self) -> Patch:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """Copy the patch together with its model, so that an object that holds both can be deep-copied."""
        # Reversed, because the copy of the reduction must find the copied model in `memo`.
        return replace(self, **{name: copy.deepcopy(value, memo) for name, value in reversed(vars(self).items())})

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, whose modules are pickled with their original classes."""
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
    reduce: Method | LayerMethod | Sequence[Method | LayerMethod] | str | None = None,
) -> Patch:
    """Replace the methods whose code vlmfast knows, on this instance only.

    A method is recognised by its body: its own source code and that of the functions and methods that it names. Neither
    the model type nor the class name decides. Each module gets a subclass of its own class with the same name, so
    ``isinstance``, ``state_dict``, hooks and gradient checkpointing work as before. A copy of a patched model is
    patched. A pickled model holds the original classes, and ``type(model)(config)`` and
    ``type(model).from_pretrained(path)`` make models that are not patched. An RMSNorm or a placeholder mask with an
    unknown body is skipped with a warning; `Patch.report` lists every skipped site. What ``torch.compile`` has traced
    in this process is traced again at its next call. A parametrization that a module had before the patch can be
    removed only after ``undo``.

    For the backward pass a norm saves its input, where upstream saves a float32 copy of a half-precision input. Code
    that changes the input in place after the norm has read it therefore fails in training, with torch's error about an
    inplace operation.

    With ``reduce`` the model also sees fewer visual tokens, which changes its answers. ``generate`` and ``forward``
    encode the images and videos, reduce their tokens and shorten the prompt once, before the language model sees it.
    Prompts without images or videos are left alone. With M-RoPE (Qwen-VL) each kept token keeps its position, and
    positions after the prompt continue as after the full prompt; other models number the kept tokens consecutively.

    * The result of ``generate`` begins with the caller's full ``input_ids``. ``max_length`` counts these ids, and your
      own streamers, logits processors and stopping criteria receive them.
    * ``forward`` returns the logits of the short prompt. Where ``labels``, ``num_items_in_batch`` or ``logits_to_keep``
      count columns, it returns those of the full prompt; a removed column has the logits of the column before it.
    * A cache remembers which columns of the prompt it holds: pass the full ids again in a second turn.

    Args:
        model: a Hugging Face model, a model with remote code, a sub-model of either, or any module around parts of
            them; also inside PEFT, ``torch.compile``, accelerate or DistributedDataParallel.
        only: a pattern or several, such as ``"*RMSNorm.forward"``: only sites that match one are replaced. A site of
            transformers is named "<model folder>.<Class>.<method>", any other "<full module name>.<Class>.<method>".
        exclude: a pattern or several: sites that match one are not replaced.
        reduce: how visual tokens are reduced: a method that runs before the language model, such as
            ``vlmfast.VisionZip(dominant=54, contextual=10)``, one that runs between its layers, such as
            ``vlmfast.FastV(layer=2, keep=0.5)``, or a list of the former and the latter; or their text, such as
            "scope:0.3+fastv:2:0.5". None keeps all visual tokens. Needs transformers 5.17 or later and a model with its
            language-modelling head.

    Returns:
        A `Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module, or ``reduce`` is not a method. ValueError: if no method of the model is
            known, a pattern matches no site, ``reduce`` is text that names no method, or the visual tokens of the model
            cannot be reduced. RuntimeError: if the model is patched already, or nothing in it could be replaced.
    """
    _check_unpatched(model)
    if version := newer_transformers():
        warnings.warn(
            f"transformers {version} is newer than {KNOWN[-1]}, the newest release that vlmfast was tested with: what "
            "changed since is left alone, and the report cannot name all of it",
            stacklevel=2,
        )
    label = next(filter(None, map(_model_type, model.modules())), type(model).__name__)
    sites = find_sites(model)
    reduction = None if reduce is None else shortening(hugging_face_model(model), spelled(reduce))
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
    """Replace only methods that are defined by these classes of a project outside transformers.

    Args:
        model: as `patch` takes it.
        label: the name of the project in messages.
        classes: names of the classes whose methods are replaced.
        reduction: checks the modules that have these methods and returns what reduces their visual tokens, or None.

    Raises:
        TypeError, ValueError, RuntimeError: as `patch` does.
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
    """Say that no method is known, and name the three unknown bodies that most modules have."""
    unknown = sorted((site for site in sites if site.body is None), key=lambda site: -len(site.modules))
    told = "; ".join(f"{site.name} of {count(len(site.modules), 'module')}: {site.reason}" for site in unknown[:3])
    return f"vlmfast knows no method of this {label} model ({told or 'it has no RMSNorm and no placeholder mask'})"


def unpatch(model: nn.Module) -> int:
    """Undo a patch without its `Patch`, such as on a copy of a patched model.

    Args:
        model: any module; modules in it that are not patched are left alone.

    Returns:
        The number of modules that got their own class back.

    Raises:
        TypeError: if ``model`` is not a module. RuntimeError: if the class of a module was changed again since the
            patch; nothing is undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patched: list[nn.Module] = [module for module in model.modules() if isinstance(module, PatchedModule)]
    _restore(patched)
    return len(patched)


def _restore(modules: list[nn.Module]) -> None:
    """Give patched modules their own classes back; none of them if one cannot be restored."""
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
    """Replace the chosen sites that can be replaced, and the methods that a reduction needs; undo all on a failure."""
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
