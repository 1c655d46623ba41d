"""The examples of the README run and do what their comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def examples(heading: str) -> list[str]:
    """Return the Python blocks of one section."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_examples_of_ops_run(capsys) -> None:
    names: dict[str, Any] = {}
    for example in examples("Call an op"):
        exec(example, names)
    assert "runs" in capsys.readouterr().out
    assert names["x"].grad.shape == names["x"].shape
    assert torch.equal(names["prompt"][:, 20:276], names["image"][None])
    assert torch.equal(names["deeper"][:, 20:276], names["image"][None] * 2)
    assert torch.equal(names["packed"][0], names["image"])
    assert names["tokens"].shape == (4, 256, 896)
    assert names["scores"].shape == (4, 1024)
    assert names["fewer"].shape == (4, 64, 1024)
