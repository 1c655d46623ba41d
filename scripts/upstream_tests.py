"""Run transformers' own model tests on patched models, and list those that pass only unpatched.

    python scripts/upstream_tests.py CHECKOUT [MODEL_TYPE ...] [--reduce even:1.0] [-k EXPRESSION]

CHECKOUT is a source tree of the installed transformers with its ``tests`` folder: a checkout, or an unpacked source
distribution. The latter has no tests of single models; its common tests then run on tiny models of our own tests. Both
need ``pip install parameterized requests``. Every test runs three times: unpatched, with `vlmfast.patch(model)`, and
with ``reduce=EvenTokens(1.0)``, which keeps all tokens. A model is patched at its first call or ``generate``, after it
was loaded and moved. The exit code is 1 if a test fails patched for another reason than a refusal that README or docs
name.

This file is also the pytest plugin that patches the models.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODEL_TYPES = (
    *("internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"),
    *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"),
)
MODE = "VLMFAST_UPSTREAM_TESTS"  # environment variable: "none", "patch", or a method in the demo's syntax
OUTCOMES = "VLMFAST_UPSTREAM_OUTCOMES"  # environment variable: the file that the plugin appends outcomes to
CHECKOUT = "VLMFAST_UPSTREAM_CHECKOUT"  # environment variable: the source tree
ROOT = Path(__file__).parents[1]
REFUSALS = ("visual tokens are reduced", "cannot be reduced")  # words in the messages of refusals by design


# ---- the plugin ----


def pytest_configure() -> None:
    if os.environ.get(MODE, "none") == "none":
        return
    from transformers import GenerationMixin, PreTrainedModel

    def patched_first(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "_vlmfast_tried"):
                _patch(self)
                return getattr(type(self), original.__name__)(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        return method

    PreTrainedModel.__call__ = patched_first(PreTrainedModel.__call__)
    GenerationMixin.generate = patched_first(GenerationMixin.generate)


def _patch(model: Any) -> None:
    """Patch a whole model; with a reduction method, only a model that has a head."""
    import vlmfast
    from vlmfast.reduce.spelling import parse

    for module in model.modules():
        module.__dict__["_vlmfast_tried"] = True  # sub-models are patched with the whole model, not by themselves
    mode = os.environ[MODE]
    if model.config.model_type not in MODEL_TYPES:
        return
    if mode == "patch":
        vlmfast.patch(model)
    elif hasattr(model, "generate") and model.base_model is not model:
        vlmfast.patch(model, reduce=parse(mode))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        message = str(getattr(report.longrepr, "reprcrash", "") or "") if report.failed else ""
        with open(os.environ[OUTCOMES], "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, message]) + "\n")


# ---- the command ----


def run(checkout: Path, model_types: Sequence[str], mode: str, more: list[str]) -> dict[str, tuple[str, str]]:
    """Run the tests in one mode, and map each test to (outcome, message)."""
    options = ["-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    if (checkout / "tests" / "models").exists():
        tests = [f"tests/models/{name}/test_modeling_{name}.py" for name in model_types]
    else:
        testers = ROOT / "tests" / "helpers" / "upstream_testers.py"
        tests = [f"{testers}::{name}" for name in model_types]
        options += ["--noconftest", "-c", os.devnull, "--rootdir", str(ROOT)]  # ours are for our own tests
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests, *more],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path, MODE: mode, OUTCOMES: str(outcomes), CHECKOUT: str(checkout)},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    # Subtests have reports under the name of their test; after sorting, the dict keeps a failed one.
    rows.sort(key=lambda row: row[1] == "failed")
    return {test: (outcome, message) for test, outcome, message in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("model_types", nargs="*", default=MODEL_TYPES)
    parser.add_argument("--reduce", default="even:1.0", help="method of reduction, as the demo takes it")
    parser.add_argument("-k", help="which tests, as pytest takes it")
    options = parser.parse_args()
    more = ["-k", options.k] if options.k else []
    plain = run(options.checkout, options.model_types, "none", more)
    passed = {test for test, (outcome, _) in plain.items() if outcome == "passed"}
    if not passed:
        parser.error(f"no test of {options.checkout} passes unpatched")
    print(f"unpatched: {len(passed)} of {len(plain)} pass")
    wrong = 0
    for mode in ("patch", options.reduce):
        found = run(options.checkout, options.model_types, mode, more)
        failed = {test: found.get(test, ("missing", "")) for test in sorted(passed)}
        failed = {test: message for test, (outcome, message) in failed.items() if outcome != "passed"}
        refused = {test for test, message in failed.items() if any(words in message for words in REFUSALS)}
        wrong += len(failed) - len(refused)
        print(f"{mode}: {len(passed) - len(failed)} of {len(passed)} pass, {len(refused)} are refused by design")
        reasons = collections.Counter(message.split("Error: ")[-1][:160] for message in failed.values())
        for reason, count in reasons.most_common():
            print(f"  {count} x {reason}")
        for test in sorted(set(failed) - refused):
            print(f"  {test}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
