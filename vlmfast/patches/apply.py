"""`patch` and what it returns: the replacements of a family, put into one model instance and taken out again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vlmfast.checks import DTYPES
from vlmfast.modules import hugging_face_model, replaced_on_instances
from vlmfast.patches.family import families
from vlmfast.patches.swap import PatchedModule, patched_class, set_class, trace_anew
from vlmfast.patches.upstream import Site, mismatch
from vlmfast.reduce.generation import Reduction, shortening
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage

ABSENT = "no module with this method in the model"


@dataclass(repr=False)
class Patch:
    """What `patch` did to a model. As a context manager, it undoes that at the end of the block.

    Attributes:
        model_type: the model's ``config.model_type``.
        replaced: site -> how many modules got the replacement.
        skipped: site -> why it was left as it was.
        reduction: how prompts are shortened, and what became of the last one; None where ``reduce`` was not given.
    """

    model_type: str
    replaced: dict[str, int]
    skipped: dict[str, str]
    reduction: Reduction | None = None
    _modules: list[nn.Module] = field(default_factory=list)

    @property
    def images(self) -> list[ReducedImage]:
        """The images of the last prompt whose visual tokens were reduced, for `vlmfast.reduce.overlay`."""
        return [] if self.reduction is None else self.reduction.images

    def report(self) -> str:
        """One line for each site: how many modules, or why not; those without a module are counted in the last one.

        Then what became of the last prompt, where visual tokens are reduced.
        """
        rows = {site: _count(number, "module") for site, number in self.replaced.items()}
        rows |= {site: f"skipped: {reason}" for site, reason in self.skipped.items() if reason != ABSENT}
        width = max(map(len, rows), default=0)
        lines = [f"{self!r}:", *(f"  {site:{width}}  {text}" for site, text in rows.items())]
        if absent := list(self.skipped.values()).count(ABSENT):
            lines.append(f"  {_count(absent, 'other site')} of this family: {ABSENT}")
        if self.reduction is not None:
            lines.append(f"  {self.reduction.report()}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Give every module its own class back. A second call does nothing.

        Raises:
            RuntimeError: if the class of a module was changed again since; nothing is undone then.
        """
        changed = {type(m).__name__ for m in self._modules if "original_class" not in vars(type(m))}
        if changed:
            raise RuntimeError(
                f"cannot undo: modules of {self.model_type} were given another class after the patch "
                f"({', '.join(sorted(changed))}); undo that first"
            )
        while self._modules:
            module = self._modules[-1]
            set_class(module, vars(type(module))["original_class"])
            self._modules.pop()
        trace_anew()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = _count(len(self._modules), "module") if self._modules else "undone"
        return f"<Patch of {self.model_type}: {state}, {_count(len(self.replaced), 'site')}>"


def patch(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    reduce: Method | None = None,
) -> Patch:
    """Replace the methods that the model's family lists, on this instance only.

    Each module is given a subclass of its own class, of the same name; ``isinstance``, ``state_dict``, hooks, gradient
    checkpointing and ``copy.deepcopy`` work as before, and a pickled model holds the original classes. A site is
    replaced where transformers has it with the parameters and with a body that the replacement was written for. Any
    other site in the model is skipped with a warning; `Patch.report` lists all of them. What ``torch.compile`` has
    traced in this process is traced anew at its next call.

    With ``reduce`` the model also sees fewer visual tokens, which changes what it answers. ``generate`` and ``forward``
    encode and reduce the images and shorten the prompt once, before the language model sees it. Prompts without images
    are left alone. With M-RoPE (Qwen-VL) each token that is left stays at its position, and what follows goes on as
    after the full prompt; other models number the tokens anew.

    * What ``generate`` returns begins with the caller's full ``input_ids``; ``max_length`` counts these, and a streamer
      is told these. Logits processors and stopping criteria see the short ids.
    * ``forward`` returns the logits of the short prompt, and with ``labels`` its loss.
    * A cache remembers which columns of the prompt it has: a second turn is given the full ids again.

    Args:
        model: a Hugging Face model or one of its sub-models; also inside PEFT, ``torch.compile``, accelerate or
            DistributedDataParallel.
        only: replace only the sites that match this pattern, or one of these, such as ``"*RMSNorm.forward"``.
        exclude: leave out the sites that match.
        reduce: how visual tokens are reduced, such as ``vlmfast.VisionZip(dominant=54, contextual=10)``; None for all
            of them. Needs transformers 5.17 or later, and the model with its head.

    Returns:
        A `Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module, or ``reduce`` not a method. ValueError: for a model of an unknown
            family, a pattern that matches no site, or ``reduce`` with a model whose visual tokens cannot be reduced.
            RuntimeError: if the model is patched already, or nothing in it could be replaced.
    """
    host = hugging_face_model(model)
    model_type: str = host.config.model_type  # type: ignore[union-attr, assignment]
    if model_type not in families():
        raise ValueError(f"no patch for the model type {model_type!r}; known are {', '.join(sorted(families()))}")
    if any(isinstance(module, PatchedModule) for module in host.modules()):
        raise RuntimeError(
            "model is patched already (a copy of a patched model is as well): undo the patch, or vlmfast.unpatch(model)"
        )
    family = families()[model_type]
    replace = family.replace
    reduction = None if reduce is None else shortening(host, reduce)
    chosen = _choose(model_type, replace, only, exclude)
    methods, skipped = _plan(host, {site: replace[site] for site in chosen})
    skipped |= {site: "left out by only or exclude" for site in replace if site not in chosen}
    if not methods and reduction is None:
        telling = {site: reason for site, reason in skipped.items() if reason != ABSENT} or skipped
        reasons = "; ".join(f"{site}: {reason}" for site, reason in telling.items())
        raise RuntimeError(f"nothing was replaced in this {model_type} model ({reasons})")
    for site in chosen:
        if skipped.get(site, ABSENT) != ABSENT:
            warnings.warn(f"{site} is not patched: {skipped[site]}", stacklevel=2)
    return _swap(host, model_type, methods, skipped, reduction)


def unpatch(model: nn.Module) -> int:
    """Take the patch out of a model whose `Patch` is out of reach: a deep copy of a patched model, a lost return value.

    Args:
        model: any module; what is not patched in it is left as it is.

    Returns:
        The number of modules that got their own class back.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patched = [module for module in model.modules() if "original_class" in vars(type(module))]
    for module in patched:
        set_class(module, vars(type(module))["original_class"])
    trace_anew()
    return len(patched)


def _choose(
    model_type: str, sites: Iterable[str], only: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[str]:
    def matching(name: str, patterns: str | Iterable[str]) -> set[str]:
        matched: set[str] = set()
        if not isinstance(patterns, Iterable):
            raise TypeError(f"{name} must be a pattern or patterns of site names, got {patterns!r}")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{name} must be a pattern or patterns of site names, got {pattern!r}")
            hits = {site for site in sites if fnmatchcase(site, pattern)}
            if not hits:
                known = ", ".join(sites)
                raise ValueError(f"{name}: {pattern!r} matches no site of {model_type}; its sites are {known}")
            matched |= hits
        return matched

    kept = set(sites) if only is None else matching("only", only)
    dropped = set() if exclude is None else matching("exclude", exclude)
    return [site for site in sites if site in kept - dropped]


Methods = dict[type, dict[str, tuple[str, Callable[..., Any]]]]  # class -> method -> (site, replacement)


def _plan(host: nn.Module, replace: Mapping[str, Callable[..., Any]]) -> tuple[Methods, dict[str, str]]:
    """What to replace, and what not and why. Changes nothing."""
    modules_of: dict[type, list[nn.Module]] = {}
    for module in host.modules():
        modules_of.setdefault(type(module), []).append(module)
    methods: Methods = {}
    skipped = {}
    for text, function in replace.items():
        site = Site.parse(text)
        classes = [c for c in modules_of if any(site.names(b) for b in c.__mro__) and hasattr(c, site.method)]
        derived = [cls.__name__ for cls in classes if not site.names(cls)]
        reasons = (_obstacle(site, modules_of[cls], function) for cls in classes)
        if not classes:
            skipped[text] = ABSENT
        elif derived:
            skipped[text] = f"modules are of a subclass ({', '.join(derived)})"
        elif reason := next(filter(None, reasons), None):
            skipped[text] = reason
        else:
            for cls in classes:
                methods.setdefault(cls, {})[site.method] = text, function
    return methods, skipped


def _obstacle(site: Site, modules: list[nn.Module], function: Callable[..., Any]) -> str | None:
    """Why the method of these modules, all of one class, must not be replaced, or None."""
    cls = type(modules[0])
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters(recurse=False)}
    if unsupported := ", ".join(str(dtype) for dtype in dtypes - DTYPES):
        return f"its weights are {unsupported}, and the ops take float32, float16 and bfloat16"
    return mismatch(site, cls, function) or replaced_on_instances(modules, cls, site.method)


def _swap(
    host: nn.Module,
    model_type: str,
    methods: Methods,
    skipped: dict[str, str],
    reduction: Reduction | None = None,
) -> Patch:
    """Carry out the plan, and replace other methods that are no sites; what was done before a failure is undone."""
    functions = {cls: {name: f for name, (_, f) in entries.items()} for cls, entries in methods.items()}
    for cls, entries in (reduction.replacements() if reduction else {}).items():
        functions[cls] = functions.get(cls, {}) | entries
    swapped = {cls: patched_class(cls, entries) for cls, entries in functions.items()}
    modules = [module for module in host.modules() if type(module) in swapped]
    counts = Counter(site for module in modules for site, _ in methods.get(type(module), {}).values())
    result = Patch(model_type, dict(counts), skipped, reduction)
    try:
        for module in modules:
            set_class(module, swapped[type(module)])
            result._modules.append(module)
    except BaseException:
        result.undo()
        raise
    trace_anew()
    return result


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
