"""examples/ray_batch.py: two workers, a broken picture, and a run that goes on where another one was stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import written_models

pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[2]


def test_batches_are_answered_once(tmp_path: Path):
    model = written_models.write("llava", tmp_path / "models")
    pictures, answers = tmp_path / "pictures", tmp_path / "answers"
    pictures.mkdir()
    for number in range(10):
        written_models.picture(number, 64 + number, 80).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    first = run(model, pictures, answers)
    assert "11 pictures, 0 answered before" in first
    assert "10 answered now; 1 could not be read" in first
    assert "broken.png" in first
    rows = read(answers)
    assert sorted(Path(row["path"]).stem for row in rows) == sorted(str(number) for number in range(10))
    assert {row["prompt_tokens"] for row in rows} == {18 + 7}
    assert {row["answer_tokens"] for row in rows} == {4}

    # stopped while it wrote, then more pictures
    file = sorted(answers.glob("*.parquet"))[0]
    lost = len(pyarrow.read_table(file))
    file.write_bytes(file.read_bytes()[:100])
    (pictures / "broken.png").unlink()
    written_models.picture(10, 64, 80).save(pictures / "10.png")
    second = run(model, pictures, answers)
    assert f"11 pictures, {10 - lost} answered before" in second
    assert f"{lost + 1} answered now; 0 could not be read" in second
    assert sorted(row["answer"] for row in rows) == sorted(
        row["answer"] for row in read(answers) if Path(row["path"]).stem != "10"
    )


def run(model: Path, pictures: Path, answers: Path) -> str:
    options = ["--prompt", "user : <image> what is in this ?", "--workers", "2", "--batch", "4", "--new-tokens", "4"]
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), str(model), "visionzip:14+4"]
    done = subprocess.run(
        [*command, str(pictures), str(answers), *options, "--cpu"],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert "answered now" in done.stdout, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def read(answers: Path) -> list[dict[str, object]]:
    return [row for file in sorted(answers.glob("*.parquet")) for row in pyarrow.read_table(file).to_pylist()]
