"""The study on digits, without the scans: what is drawn is what is asked, and what is measured is joined and shown."""

from __future__ import annotations

import itertools

import pytest
import torch
from rich.console import Console

import vlmfast
from tests.conftest import shortens_prompts
from vlmfast.benchmarks import digits
from vlmfast.benchmarks.digits_data import ANSWER, DIGIT, NOTHING, PATCH
from vlmfast.benchmarks.digits_models import PICTURES, TASKS, VIDEOS, Training, train


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    """In place of scans: a digit is a bright square, the brighter the larger it is."""

    def start(self, train: bool, seed: int) -> None:
        self.scans = (1 + torch.arange(10.0))[:, None, None].expand(10, DIGIT, DIGIT)
        self.labels = torch.arange(10)
        self.generator = torch.Generator().manual_seed(seed)

    monkeypatch.setattr("vlmfast.benchmarks.digits_data.Drawer.__init__", start)


def brightest(pixels: torch.Tensor) -> torch.Tensor:
    """(..., side, side) -> the digit that is to be seen, of one at most."""
    found = (pixels * 0.4 + 0.2).amax((-2, -1)).floor().long() - 1
    return torch.where(found < 0, NOTHING, found)


def test_pictures_show_what_is_asked():
    drawn = PICTURES.drawer(True, 3).draw(40)
    half = PICTURES.drawer.side // 2
    quarters = [drawn.pixels[:, 0, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    assert torch.equal(torch.stack([brightest(quarter) for quarter in quarters], 1), drawn.contents)
    assert 0.5 < (drawn.contents != NOTHING).float().mean() < 0.95
    cells = drawn.pixels[:, 0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    assert torch.equal(brightest(cells).flatten(1), drawn.places)


def test_videos_show_digits_one_after_the_other():
    drawn = VIDEOS.drawer(True, 4).draw(40)
    seen = brightest(drawn.pixels)  # (samples, frames)
    for frames, contents in zip(seen.tolist(), drawn.contents.tolist(), strict=True):
        assert [digit for digit, _ in itertools.groupby(frames)] == [digit for digit, _ in itertools.groupby(contents)]
        assert min(frames.count(digit) for digit in contents) >= 2
    moves = (drawn.places.view(40, 8, -1) != NOTHING).float().diff(dim=1).abs().sum(2)
    assert 0 < (moves == 4).float().mean() < 1  # a square of 2 x 2 patches goes on by one


def test_prompts_of_videos_are_as_the_processor_orders_them():
    """The pixels of each patch of each frame in raster order, and an answer behind each question."""
    drawn = VIDEOS.drawer(True, 5).draw(2)
    inputs = VIDEOS.inputs(drawn, torch.tensor([[2, 0, 1], [0, 1, 2]]))
    rows = inputs["pixel_values_videos"].view(2, 8, 4, 4, 3, PATCH, PATCH)
    assert torch.equal(rows[1, 5, 2, 3, 0], drawn.pixels[1, 5, 16:24, 24:32])
    assert torch.equal(inputs["input_ids"][0, -5::2] - ANSWER, drawn.contents[0, [2, 0, 1]])
    asked, answers = zip(*VIDEOS.questions_in_turn(drawn), strict=True)
    assert [int(one["input_ids"][0, -1]) - 7 for one in asked] == [0, 1, 2]
    assert torch.equal(torch.stack(answers, 1), drawn.contents)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_training_and_every_method(name: str, monkeypatch):
    pytest.importorskip("transformers")
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    task = TASKS[name]
    monkeypatch.setitem(digits.BUDGETS, name, (2,))
    model = task.build(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert train(task, model, Training(1, 2), 0, Console(quiet=True)) == []
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    records = digits.measure(task, model, task.drawer(False, 1).draw(2), Console(quiet=True))
    by_method = {record["method"]: record for record in records}
    assert {digits.ALL, "DivPrune (centered)", "FastV", "RandomTokens"} <= by_method.keys()
    assert ("EVS" in by_method) == (name == "videos")
    assert ("SmallerImage" in by_method) == (name == "pictures")
    assert by_method["SCOPE"]["left"] == 2 * task.drawer.frames
    assert by_method["FastV"]["left"] == 2 * task.drawer.frames
    assert by_method[digits.ALL]["left"] == task.tokens


def test_seeds_are_joined_and_shown():
    runs = [
        [{"method": "all tokens", "tokens": 64, "left": 64, "right": right + 0.1},
         {"method": "SCOPE", "tokens": 8, "settings": "scope:8", "left": 8, "right": right}]
        for right in (0.5, 0.8)
    ]  # fmt: skip
    found = {"task": "pictures", "records": digits.joined(runs)}
    assert found["records"][1]["right"] == [0.5, 0.8]
    head, rows = digits.rows_of(found)
    assert head == ["pictures: tokens left", "64", "8"]
    assert rows == [["SCOPE", "75 (60 to 90)", "65 (50 to 80)"]]
    assert digits._label(vlmfast.DivPrune(4, centered=True)) == "DivPrune (centered)"
