"""The code of docs/training.md runs, block after block, on a tiny LLaVA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import transformers
from PIL import Image

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.patches_models import llava_processor, patched
from tests.helpers.reduce_models import Talk
from tests.training.processes import on_two_processes
from tests.training.steps import PROMPTS, samples

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
pytestmark = pytest.mark.skipif(not shortens_prompts(), reason="the page is about transformers 5.17 or later")


def names(folder: str) -> dict[str, Any]:
    """Return what the page takes for granted."""
    talk = Talk.of("llava")
    settings = {"max_steps": 1, "remove_unused_columns": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    found = {name: getattr(transformers, name) for name in ("Trainer", "TrainingArguments")}
    found |= {"model": talk.model, "inputs": samples(talk, 0), "data": list(range(len(PROMPTS))), "vlmfast": vlmfast}
    found |= {"arguments": transformers.TrainingArguments(folder, **settings), "folder": folder}
    return found | {"collate": lambda numbers: samples(talk, *numbers), "processor": llava_processor()}


def run(rank: int, block: str, folder: str) -> bool:
    found = names(folder)
    exec(block, found)
    assert any(parameter.grad is not None for parameter in found["model"].parameters())
    return bool(patched(found["model"]))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"(import|reduce) ?=?(\S+)", block)[2])
def test_block(block: str, tmp_path: Path):
    for module in re.findall(r"^(?:import|from) ([\w.]+)", block, re.MULTILINE):
        pytest.importorskip(module)
    found = names(str(tmp_path))
    if "distributed" in block:
        found["model"].save_pretrained(tmp_path)
        assert on_two_processes(run, block, str(tmp_path)) == [True, True]
        return
    if "trl" in block:
        from datasets import Dataset
        from trl import SFTConfig

        settings = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None}
        picture = Image.new("RGB", (40, 30), (80, 90, 20))
        row = {"images": [picture], "prompt": "<image> describe this", "completion": " word3"}
        found["conversations"] = Dataset.from_list([row] * 2)
        found["sft_arguments"] = SFTConfig(str(tmp_path), **settings)
    exec(block, found)
    assert bool(patched(found["model"])) == ("unpatch" not in block)


def test_there_is_one_block_for_each_way():
    assert len(BLOCKS) == 6
