"""A plugin of pytest: run one part of the tests, without those that have passed in an earlier run.

    python -m pytest -p tests.helpers.parts --part 1/8 --passed FILE

Tests of one op are in one part, so that no other process compiles the same kernels.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="such as 1/8: the first of eight")
    parser.addoption("--passed", type=Path, help="names of tests that have passed; tests that pass are added")


def part_of(test: str, parts: int) -> int:
    """Return the part of a test, from 1: by the op, which is the first parameter, or else by the whole name."""
    op = re.search(r"\[(\w+)", test)
    return 1 + zlib.crc32((op[1] if op else test).encode()) % parts


@pytest.hookimpl(trylast=True)  # behind the choice by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("part").split("/"))
    path = config.getoption("passed")
    passed = {*path.read_text().splitlines()} if path and path.exists() else set()
    chosen = [item for item in items if part_of(item.nodeid, parts) == part and item.nodeid not in passed]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*chosen}])
    items[:] = chosen


class Passed:
    """Adds each test that passes to a file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("passed"):
        config.pluginmanager.register(Passed(path))
