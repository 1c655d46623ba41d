"""Run the tests that need a GPU, in several processes: most of their time goes into compiling Triton kernels.

    python -m vlmfast.benchmarks.gpu_tests FOLDER

Each process has a log in the folder, and a list of what has passed, which the next call leaves out. It needs no plugin
of pytest but that of this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MOST = 8  # processes, each with a context of its own on the GPU
WITH_GPU_TESTS = ("tests/ops", "tests/patches", "tests/benchmarks")
NOTHING_LEFT = 5  # pytest's exit code for no test at all: another part has them, or all have passed


def command(folder: Path, part: int, parts: int) -> list[str]:
    """Return the command of one part."""
    mine = ["-p", "tests.helpers.parts", "--part", f"{part}/{parts}", "--passed", str(folder / f"tests-{part}.passed")]
    # What this Python has no package for cannot be collected, which is no reason to leave out the others.
    ours = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *ours, *mine, *WITH_GPU_TESTS]


def main(folder: Path) -> int:
    """Run all parts side by side, print the last line of each, and return 1 if one has failed."""
    parts = max(1, min(MOST, (os.cpu_count() or 1) // 2))
    environment, running = {"OMP_NUM_THREADS": "2", **os.environ}, []
    for part in range(1, parts + 1):
        log = folder / f"tests-{part}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command(folder, part, parts), stdout=file, stderr=file, env=environment)
            running.append((log, process))
    codes = []
    for log, process in running:
        codes.append(process.wait())
        print(f"{log.name}: {log.read_text().rstrip().rpartition(chr(10))[2]}", flush=True)
    return int(any(code not in (0, NOTHING_LEFT) for code in codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
