"""Look for errors in the CPU kernels of the instruction sets that an editable installation leaves out on this machine.

    python scripts/check_levels.py

Nothing is compiled, which takes seconds instead of a minute. A wheel has all of them.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def left_out() -> list[list[str]]:
    """Return the commands that compile a wheel's kernels and are not among those of an editable installation."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    if not setup["has_levels"]():
        return []
    torch, compiler = setup["import_torch"](), setup["find_compiler"]()
    everything, own = (
        [command for command in setup["cpu_commands"](torch, compiler, highest) if command[-1].endswith("_kernels.cpp")]
        for highest in (setup["HIGHEST_LEVEL"], setup["level_of_this_machine"](compiler))
    )
    return [command for command in everything if command not in own]


def is_right(command: list[str]) -> bool:
    """Tell whether the compiler finds no error and no reason to warn; it prints what it finds."""
    looking = ["-fsyntax-only" if part == "-c" else part for part in command]
    return subprocess.run([*looking, "-Werror"]).returncode == 0


def main() -> int:
    """Look at all; 1 if something is wrong."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 0 if all(list(pool.map(is_right, left_out()))) else 1


if __name__ == "__main__":
    sys.exit(main())
