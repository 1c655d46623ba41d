"""examples/ray_batch.py: two workers, a broken picture, and a run that goes on where another one was stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers import written_models

pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
# Ray gives the agent of its dashboard 15 seconds to write its ports into files, and dies where these are late, as on a
# busy machine (ray-project/ray#65983). Without the packages of the dashboard the agent only writes that there are none.
NO_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NODE = "1" * 56


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """Start Ray, with a core for each worker and one for what they read, and return its address."""
    port, agent = free_ports(2)
    log = tmp_path / "ray.log"
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions, log.open("w") as file:  # a short path, for sockets
        options = [f"--port={port}", f"--runtime-env-agent-port={agent}", f"--temp-dir={sessions}", "--num-cpus=3"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor", *options],
            stdout=file,
            stderr=file,
            env=ENVIRONMENT | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": NODE},
        )
        try:
            deadline = time.monotonic() + 300
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                for session in Path(sessions).glob("session_2*"):
                    for name in NO_PORTS:
                        (session / f"{name}_{NODE}").write_text("-1")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def test_batches_are_answered_once(tmp_path: Path, cluster: str):
    model = written_models.write("llava", tmp_path / "models")
    pictures, answers = tmp_path / "pictures", tmp_path / "answers"
    pictures.mkdir()
    for number in range(10):
        written_models.picture(number, 64 + number, 80).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    first = run(cluster, model, pictures, answers)
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
    second = run(cluster, model, pictures, answers)
    assert f"11 pictures, {10 - lost} answered before" in second
    assert f"{lost + 1} answered now; 0 could not be read" in second
    assert sorted(row["answer"] for row in rows) == sorted(
        row["answer"] for row in read(answers) if Path(row["path"]).stem != "10"
    )


def run(cluster: str, model: Path, pictures: Path, answers: Path) -> str:
    options = ["--prompt", "user : <image> what is in this ?", "--workers", "2", "--batch", "4", "--new-tokens", "4"]
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), str(model), "visionzip:14+4"]
    done = subprocess.run(
        [*command, str(pictures), str(answers), *options, "--cpu"],
        capture_output=True,
        text=True,
        timeout=1800,
        env=ENVIRONMENT | {"RAY_ADDRESS": cluster},
    )
    assert "answered now" in done.stdout, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def read(answers: Path) -> list[dict[str, object]]:
    return [row for file in sorted(answers.glob("*.parquet")) for row in pyarrow.read_table(file).to_pylist()]
