"""The lifetime of a patch: captured methods, copies, pickles, and modules made by the class of a patched module."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import vlmfast
from tests.helpers.patches_models import COMMON, assert_same, logits, patched, rms_norms, tiny
from vlmfast.modules import made_around
from vlmfast.patches import rms_norm
from vlmfast.patches.swap import patched_class, set_class


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


# ---- captured methods ----


@pytest.mark.parametrize("model_type", [*COMMON, "qwen2_5_omni"])
def test_a_method_that_is_kept_is_upstreams_after_the_patch(model_type: str, monkeypatch: pytest.MonkeyPatch):
    model, _ = tiny(model_type)
    patch = vlmfast.patch(model)
    kept = [
        (type(module).original_class, name, functools.partial(getattr(module, name)))
        for module in patched(model)
        for name, function in type(module).replacements.items()
        if function.__module__ != rms_norm.__name__
    ]
    assert kept
    for cls, name, _ in kept:
        monkeypatch.setattr(cls, name, lambda self, *args: (self, args))
    for _, _, method in kept:
        assert method != (method.func.__self__, (1, 2))
    patch.undo()
    for _, _, method in kept:
        assert method(1, 2) == (method.func.__self__, (1, 2))


def test_a_method_that_is_kept_is_that_of_the_next_patch():
    class Base(nn.Module):
        def size(self) -> str:
            return "upstream"

    class Override(Base):
        def size(self) -> str:
            return f"override of {super().size()}"

    module = Base()
    first, second = (patched_class(Base, {"size": lambda self, name=name: name}) for name in ("first", "second"))
    set_class(module, first)
    kept = module.size
    assert kept() == "first"
    module.__class__ = type("FSDPBase", (first,), {"size": lambda self: f"sharded {super(type(self), self).size()}"})
    assert (module.size(), kept()) == ("sharded first", "first"), "a class on top leaves the patch on"
    set_class(module, second)
    assert kept() == "second"
    set_class(module, Base)
    assert kept() == "upstream"
    assert first.size(Override()) == "override of upstream"


@pytest.mark.parametrize("model_type", ["llama", "llava", "qwen3_vl"])
def test_a_norm_that_is_kept_computes_the_same(model_type: str):
    model, _ = tiny(model_type)
    norm = next(norm for norm in rms_norms(model) if norm.weight.shape)
    x = torch.randn(3, norm.weight.shape[0])
    with vlmfast.patch(model):
        kept = norm.forward
    assert_same(kept(x), norm(x))


@pytest.mark.parametrize("function", [rms_norm.t5_rms_norm, rms_norm.grouped_rms_norm])
def test_a_norm_that_is_kept_falls_back_on_upstream(function: Callable):
    class Norm(nn.Module):
        weight, group_size = torch.ones(4, dtype=torch.bfloat16), 2

        def forward(self, x):
            return "upstream"

    module = Norm()
    set_class(module, patched_class(Norm, {"forward": function}))
    kept = module.forward
    assert kept(torch.ones(4)) == "upstream"
    set_class(module, Norm)
    assert kept(torch.ones(4)) == "upstream"


def test_the_signature_is_that_of_the_replacement():
    model, _ = tiny("qwen3_vl")
    module = model.model.language_model
    want = list(inspect.signature(module._deepstack_process).parameters)
    with vlmfast.patch(model):
        assert list(inspect.signature(module._deepstack_process).parameters) == want
        assert not hasattr(module._deepstack_process, "__wrapped__"), "accelerate would go on to what it wraps"


# ---- wrappers that are rebuilt ----


class Doubled:
    """Like accelerate's ConvertOutputsToFp32: a wrapper that is an object and cannot be copied by `copy`."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return 2 * self.function(*args)

    def __getstate__(self):
        raise pickle.PicklingError


def plus(number: int, function: Callable) -> Callable:
    @functools.wraps(function)
    def added(*args, to: int = number):
        return to + function(*args)

    return added


def one(self):
    return 1


def ten(self):
    return 10


def elsewhere(function: Callable) -> Callable:
    """A wrapper whose ``__wrapped__`` is not the function that it calls."""
    name = function.__name__

    @functools.wraps(function)
    def found(self):
        return globals()[name](self)

    return found


@pytest.mark.parametrize(
    ("wrapper", "want"),
    [
        (one, 10),
        (plus(3, one), 13),
        (plus(3, plus(4, one)), 17),
        (plus(3, Doubled(plus(4, one))), 31),
        (ten, None),
        (plus(3, ten), None),
        (elsewhere(one), None),
        (plus(3, elsewhere(one)), None),
        (functools.update_wrapper(functools.partial(ten), one), None),
        (None, None),
    ],
    ids=range(10),
)
def test_made_around(wrapper: Callable | None, want: int | None):
    bound = wrapper and MethodType(wrapper, nn.Module())
    before = bound and bound()
    anew = made_around(bound, one, ten)
    assert (anew and anew()) == want
    assert bound is None or bound() == before, "others may have it"
    if want is not None:
        assert anew.__self__ is bound.__self__
        assert made_around(anew, ten, one)() == before
        assert anew.__name__ == bound.__name__ or wrapper is one


# ---- copies ----


def test_a_copy_has_the_state_that_the_class_gives():
    torch._dynamo.reset()
    model, inputs = tiny("qwen3_vl")
    vlmfast.patch(model)
    model.model.language_model.compile(backend="eager")
    logits(model, inputs)
    for copied in (copy.copy, copy.deepcopy):
        twin = copied(model.model.language_model)
        assert type(twin) is type(model.model.language_model)
        assert twin._compiled_call_impl is None, "it is bound to the original"
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    fresh, _ = tiny("qwen3_vl")
    fresh.load_state_dict(twin.state_dict())
    assert_same(logits(twin, inputs), logits(fresh, inputs))
    torch._dynamo.reset()


class OwnState(nn.Module):
    def __getstate__(self):
        return {**super().__getstate__(), "told": "by the class"}


class OwnCopies(nn.Module):
    def __copy__(self):
        return self._made("shallow")

    def __deepcopy__(self, memo):
        return self._made("deep")

    def _made(self, told: str) -> nn.Module:
        made = type(self)()
        made.told = told
        return made


@pytest.mark.parametrize("cls", [OwnState, OwnCopies])
def test_copies_are_made_as_the_class_makes_them(cls: type[nn.Module]):
    module = cls()
    want = [copied(module).told for copied in (copy.copy, copy.deepcopy)]
    set_class(module, patched_class(cls, {}))
    copies = [copied(module) for copied in (copy.copy, copy.deepcopy)]
    assert [twin.told for twin in copies] == want
    assert {type(twin) for twin in copies} == {type(module)}
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is cls


class OwnReduce(nn.Module):
    def __reduce__(self):
        return type(self), ()


def test_pickled_as_the_class_says():
    module = OwnReduce()
    set_class(module, patched_class(OwnReduce, {}))
    assert type(pickle.loads(pickle.dumps(module))) is OwnReduce


def test_a_copy_of_a_parametrised_module():
    """torch gives it a subclass that refuses to be pickled and leaves copying to the class below."""
    model, inputs = tiny("llama")
    vlmfast.patch(model)
    register_parametrization(rms_norms(model)[0], "weight", nn.Identity())
    assert_same(logits(copy.deepcopy(model), inputs), logits(model, inputs))


def test_a_shallow_copy_is_as_patched_as_the_module():
    model, inputs = tiny("llama4")  # the class of the model itself is swapped too
    patch = vlmfast.patch(model)
    twin = copy.copy(model)
    assert type(twin) is type(model)
    assert twin.language_model is model.language_model
    assert_same(logits(twin, inputs), logits(model, inputs))
    patch.undo()
    assert patched(twin) == [twin]
    assert vlmfast.unpatch(twin) == 1
    assert type(twin) is type(model)


def test_undo_reaches_the_copies_within_the_model():
    """PEFT makes such copies for ``modules_to_save``, and depth up-scaling copies layers."""
    model, inputs = tiny("llama")
    want = logits(model, inputs)
    with vlmfast.patch(model):
        model.model.layers.append(copy.deepcopy(model.model.layers[0]))
        logits(model, inputs)
    assert not patched(model)
    del model.model.layers[-1]
    assert torch.equal(logits(model, inputs), want)


def test_a_replica_of_data_parallel_is_patched():
    model, _ = tiny("llama4")
    vlmfast.patch(model)
    for module in patched(model):
        assert type(module._replicate_for_data_parallel()) is type(module)


# ---- modules made by the class of a patched one ----


@pytest.mark.parametrize("model_type", ["llama4", "llava"])
def test_another_model_of_the_same_class_is_not_patched(model_type: str, tmp_path):
    model, inputs = tiny(model_type)
    classes = [type(module) for module in model.modules()]
    want = logits(model, inputs)
    patch = vlmfast.patch(model)
    model.save_pretrained(tmp_path)
    others = [type(model)(model.config), type(model)._from_config(model.config), type(model).from_pretrained(tmp_path)]
    for other in others:
        assert [type(module) for module in other.modules()] == classes
        other.load_state_dict(model.state_dict())
        if model_type == "llava":  # not Llama 4: `tiny` casts its complex buffer, which is not in the checkpoint
            assert torch.equal(logits(other.eval(), inputs), want)
        vlmfast.patch(other).undo()
    inner = rms_norms(model)[0]
    assert type(type(inner)(8)) is type(inner).original_class
    assert patched(model)
    patch.undo()


def test_a_class_derived_from_that_of_a_patched_module_makes_nothing():
    model, _ = tiny("llama")
    norm = model.model.norm
    cls = type(norm)
    vlmfast.patch(model)
    derived = type("StudentNorm", (type(norm),), {})
    message = rf"StudentNorm must be derived from {cls.__module__}\.LlamaRMSNorm, got one derived from the class of a"
    with pytest.raises(TypeError, match=message):
        derived(8)


class AbstractNorm(abc.ABC):
    @abc.abstractmethod
    def forward(self, hidden_states): ...


def test_a_class_with_a_metaclass_of_its_own():
    plain = type(rms_norms(tiny("llama")[0])[0])
    cls = abc.ABCMeta("Norm", (plain, AbstractNorm), {"__module__": __name__})
    module = cls(4)
    with vlmfast.patch(module):
        assert isinstance(module, AbstractNorm)
        assert type(copy.deepcopy(module)) is type(module)
        assert type(type(module)(4)) is cls
    assert type(module) is cls


def test_a_class_goes_by_its_name_wherever_it_was_defined():
    """Transformers finds the modules whose hidden states it records by ``str`` of their class."""
    model, _ = tiny("qwen3_vl")
    text = model.model.language_model

    class Text(type(text)):
        pass

    text.__class__ = Text
    names = [str(type(module)) for module in model.modules()]
    with vlmfast.patch(model):
        assert Text is not type(text)
        assert [str(type(module)) for module in model.modules()] == names
