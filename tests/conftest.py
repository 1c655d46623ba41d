"""Setup of all tests: kernels run without a GPU, and uninitialised memory is NaN."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it on import, so it is set before any kernel is imported

pytest.register_assert_rewrite("tests.helpers", "tests.emulation.harness")  # their asserts report values, as in tests

from tests.emulation.backend import loader as emulated  # noqa: E402
from tests.helpers import interpreter  # noqa: E402
from tests.helpers.thorough import is_thorough  # noqa: E402
from tests.ptx.backend import LOADERS as AS_COMPILED  # noqa: E402
from tests.ptx.backend import forget  # noqa: E402
from tests.ptx.nvcc import loader as as_compiled_by_nvcc  # noqa: E402
from vlmfast import backends, registry  # noqa: E402

if not GPU:
    interpreter.repair()
# csrc/*.cu compiled for the CPU, and kernels as compiled for GPUs. They come last in the order of backends, so that
# only `vlmfast.use` chooses them.
backends.LOADERS |= {"emulated": emulated, **AS_COMPILED, "ptx_nvcc": as_compiled_by_nvcc}


def shortens_prompts() -> bool:
    """Tell whether `vlmfast.patch(model, reduce=...)` supports the installed transformers."""
    try:
        from transformers import GenerationMixin
    except ImportError:
        return False
    return hasattr(GenerationMixin, "_prepare_position_ids_for_generation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU, and torch sees none")
    too_old = pytest.mark.skip(reason="prompts can be shortened from transformers 5.17 on")
    reducing = [item for item in items if item.path.parent.name == "reduce"]
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:  # item.keywords would match the names of folders too
            item.add_marker(no_gpu)
        if is_thorough(item):
            item.add_marker("thorough")
    if reducing and not shortens_prompts():
        for item in reducing:
            item.add_marker(too_old)


def pytest_configure() -> None:
    """Look for no garbage while modules are imported: there is little, and to look for it took a fifth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Freeze the objects of torch, transformers and the tests, so that the garbage collector skips them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    forget()  # otherwise libraries that count objects at exit report leaks


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill tensors of torch.empty with NaN (integers with their maximum), so that unwritten elements are noticed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch):
    """Make commands write as to a pipe of unknown width: pytest-xdist sets COLUMNS to that of a terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def own_accelerator():
    """Reset the settings of accelerate, which the first `Accelerator` of a process fixes for all later ones."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def override():
    """Return a function that replaces an op's backend until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda op, name, backend: stack.enter_context(registry.override(op, name, backend))


@pytest.fixture
def four_threads():
    """Use four threads, which is more than the cores of some machines: results must be right all the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
