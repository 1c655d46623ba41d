"""The ground under every test: kernels run without a GPU, and memory nobody wrote is NaN."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: before any kernel is

pytest.register_assert_rewrite("tests.helpers", "tests.emulation.harness")  # their messages are tests' own

from tests.emulation.backend import loader as emulated  # noqa: E402
from tests.helpers import interpreter  # noqa: E402
from tests.helpers.thorough import is_thorough  # noqa: E402
from tests.ptx.backend import LOADERS as AS_COMPILED  # noqa: E402
from vlmfast import backends, registry  # noqa: E402

if not GPU:
    interpreter.repair()
# csrc/*.cu, compiled for the CPU, and Triton kernels as compiled for GPUs; last, so that only `use` chooses them
backends.LOADERS |= {"emulated": emulated, **AS_COMPILED}


def shortens_prompts() -> bool:
    """Whether the installed transformers is one whose prompts `vlmfast.patch(model, reduce=...)` can shorten."""
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
        if item.get_closest_marker("gpu") and not GPU:  # not its keywords, which are the names of its folders too
            item.add_marker(no_gpu)
        if is_thorough(item):
            item.add_marker("thorough")
    if reducing and not shortens_prompts():
        for item in reducing:
            item.add_marker(too_old)


def pytest_collection_finish() -> None:
    """Have the garbage collector walk what tests make, not torch, transformers and the tests themselves as well."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries that count what is left at the end complain of leaks


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every tensor of torch.empty with NaN (integers with their maximum), so that an unwritten element shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch):
    """Have commands write as to a pipe whose width nobody tells: pytest-xdist tells its workers that of a terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def own_accelerator():
    """Forget the settings of accelerate, which are those of the first `Accelerator` of a process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def override():
    """Put a backend in the place of an op's own until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda op, name, backend: stack.enter_context(registry.override(op, name, backend))


@pytest.fixture
def four_threads():
    """More than some machines have cores: what each of them does must be right all the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
