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

ORDERS = ("prompts swapped", "prompts one by one", "neurons permuted")

pytestmark = pytest.mark.skipif(not shortens_prompts(), reason="this transformers is too old")


def test_a_step_of_each_variant():
    found = training.measure(little("llava-1.5-7b"), "small", torch.float32, "cpu", 3, Console(quiet=True))
    by_name = {record["variant"]: record for record in found}
    full, compressed = by_name["full"], by_name["compressed"]
    assert compressed["saved_mb"] < 0.6 * full["saved_mb"]
    assert compressed["speedup"] == 1
    assert compressed["losses_apart"] == 0
    assert abs(full["first_loss"] - compressed["first_loss"]) > 1e-6  # it saw other tokens
    for name in ("reduced", *ORDERS):
        record = by_name[name]
        assert record["losses_apart"] < 1e-5
        assert record["last_loss"] < record["first_loss"]  # it has learnt
    assert by_name["reduced"]["saved_mb"] <= 1.001 * compressed["saved_mb"]


@pytest.mark.parametrize("fault", [1.0, 1.01], ids=["right", "a gradient that is a hundredth too large"])
def test_gradients_are_compared_with_those_of_float32(fault: float, monkeypatch: pytest.MonkeyPatch):
    take = training.Trained._compare_gradients

    def faulty(self: training.Trained) -> None:
        if hasattr(type(self.model.model.language_model.norm), "original_class"):
            for parameter in self.model.parameters():
                parameter.grad = None if parameter.grad is None else fault * parameter.grad
        take(self)

    monkeypatch.setattr(training.Trained, "_compare_gradients", faulty)
    found = training.measure(
        little("llava-1.5-7b"), "small", torch.bfloat16, "cpu", 2, Console(quiet=True), all_tokens=True
    )
    by_name = {record["variant"]: record for record in found}
    assert list(by_name) == ["unpatched", "patched", *ORDERS, "float32"]
    error = by_name["unpatched"]["gradient_error"]
    assert 1e-4 < error < 0.05
    assert (by_name["patched"]["gradient_error"] <= 1.3 * error) == (fault == 1)
    for name in ORDERS:
        assert (by_name[name]["gradient_error"] is None) == (name == "neurons permuted")
    assert by_name["float32"]["losses_apart"] < 0.01


def test_neurons_are_permuted_and_the_model_is_not():
    model, _ = little("qwen3-vl-8b").build("small", torch.float32, "cpu")
    before, other = model.model.language_model.layers[0].mlp, training.permuted(model)
    after = other.model.language_model.layers[0].mlp
    assert not torch.equal(before.down_proj.weight, after.down_proj.weight)
    x = torch.randn(3, before.gate_proj.in_features)
    torch.testing.assert_close(after(x), before(x))


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
    assert [record["variant"] for record in records] == ["full", "compressed", "reduced", *ORDERS]
    assert "llava-1.5-7b" in capsys.readouterr().out
    monkeypatch.setattr(training, "measure", lambda *args: 1 / 0)
    assert cli.main([*command, "--steps", "2"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
