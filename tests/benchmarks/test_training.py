"""The benchmark of training steps: its variants compute the same, and what it counts is what a forward keeps."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.conftest import shortens_prompts
from tests.helpers.published_models import little
from vlmfast import cli
from vlmfast.benchmarks import published, training

pytestmark = pytest.mark.skipif(not shortens_prompts(), reason="this transformers is too old")


def test_a_step_of_each_variant():
    found = training.measure(little("llava-1.5-7b"), "small", torch.float32, "cpu", 3, Console(quiet=True))
    by_name = {record["variant"]: record for record in found}
    full, compressed = by_name["full"], by_name["compressed"]
    assert compressed["saved_mb"] < 0.6 * full["saved_mb"]
    assert compressed["over_compressed"] == 1
    assert compressed["losses_apart"] == 0
    assert abs(full["first_loss"] - compressed["first_loss"]) > 1e-6  # it saw other tokens
    for name in ("other order", "reduced"):
        record = by_name[name]
        assert record["losses_apart"] < 1e-5
        assert record["saved_mb"] <= 1.001 * compressed["saved_mb"]
        assert record["last_loss"] < record["first_loss"]  # it has learnt


def test_both_orders_hold_the_same_prompts():
    inputs = {"input_ids": torch.tensor([[1, 3, 3, 10]]), "pixel_values": torch.arange(4.0).view(1, 4)}
    batch, swapped = training.batch_of(inputs), training.batch_of(inputs, (1, 0))
    assert batch["labels"].tolist() == [[1, -100, -100, 10], [1, -100, -100, 11]]
    assert batch["pixel_values"].tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(swapped[name], batch[name].flip(0))


def test_saved_bytes_are_those_kept_for_the_backward():
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, input_ids: torch.Tensor) -> object:
            scaled = input_ids * self.weight  # keeps input_ids
            return type("Output", (), {"loss": (scaled * self.weight).sum()})  # keeps ``scaled``; the weight is none

    trained = training.Trained(Squares(), {"input_ids": torch.ones(1000)})
    trained.step()
    trained.step()
    assert trained.saved_bytes == 2 * 4000
    assert trained.losses[1] < trained.losses[0] == 1000


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(published.MODELS, "llava-1.5-7b", little("llava-1.5-7b"))
    command = ["bench", "training", "llava-1.5-7b", "--device", "cpu", "--dtype", "float32"]
    assert cli.main([*command, "--steps", "1"]) == 2
    assert "--steps must be at least 2" in capsys.readouterr().err
    assert cli.main([*command, "--steps", "2", "--json", str(tmp_path / "found.json")]) == 0
    records = json.loads((tmp_path / "found.json").read_text())["records"]
    assert [record["variant"] for record in records] == ["full", "compressed", "other order", "reduced"]
    assert "llava-1.5-7b" in capsys.readouterr().out
    monkeypatch.setattr(training, "measure", lambda *args: 1 / 0)
    assert cli.main([*command, "--steps", "2"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
