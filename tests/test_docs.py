"""The code of README, CONTRIBUTING and docs/ runs: Python on tiny models, command lines as far as they are parsed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.tiny_types import build, deep
from vlmfast.cli import parse

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"docs/ops.md", "docs/training.md"}  # signatures, no programs; and what tests/training/test_page.py runs
OWN = "farthest"  # the method of the example, which only has this name in a folder of vlmfast
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
REDUCING = {"docs/token_reduction.md", "README.md"}


def blocks(name: str, language: str) -> list[tuple[str, str]]:
    """Return the blocks of a language: the heading that each stands under, and its text."""
    found = []
    for section in re.split(r"^(?=##? )", (ROOT / name).read_text(), flags=re.MULTILINE):
        heading = section.split("\n", 1)[0].lstrip("# ")
        found += [(heading, text) for kind, text in FENCE.findall(section) if kind == language]
    return found


# ---- Python ----


def of_llava() -> dict[str, Any]:
    """What the pages call by these names: a LLaVA that cuts between any layers which are named, and its prompts."""
    model, inputs = deep("llava", 18)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -2:] = True
    return {"model": model, "inputs": inputs, "unpatched": build("llava")[0], "mask": mask}


def of_videos() -> dict[str, Any]:
    """A Qwen2.5-VL and a processor that makes the inputs of a video."""
    from tests.helpers.qwen_models import inputs_of, model_of

    model = model_of("qwen2_5_vl")
    inputs = inputs_of(model, (), video=(4, 8, 12))
    return {"model": model, "processor": lambda text, videos: inputs, "video": None}


MADE: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("README.md", "vlmfast"): lambda: dict(zip(("model", "inputs"), build("qwen3_vl"), strict=True)),
    ("README.md", "Fewer visual tokens"): of_llava,
    ("docs/token_reduction.md", "Token reduction"): of_llava,
    ("docs/token_reduction.md", "Videos"): of_videos,
    ("docs/serving.md", "Serving with vLLM"): lambda: {"client": mock.MagicMock()},
}


def run_page(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of a page one behind the other, and return what their names are in the end."""
    patch = vlmfast.patch

    def anew(model: Any, **options: Any) -> Any:
        """Pages show several ways to patch one below the other: each stands for itself."""
        vlmfast.unpatch(model)
        return patch(model, **options)

    monkeypatch.setattr(vlmfast, "patch", anew)
    names: dict[str, Any] = {"vlmfast": vlmfast, "torch": torch, "__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", SimpleNamespace())  # for dataclasses
    sections: set[str] = set()
    for heading, text in blocks(name, "python"):
        if heading not in sections:
            names |= MADE.get((name, heading), dict)()
            sections.add(heading)
        exec(compile(text, f"{name}, {heading}", "exec"), names)
    return names


def test_every_page_is_looked_at():
    """A page without a block would pass in silence, were the expression for blocks wrong."""
    counted = {name: (len(blocks(name, "python")), (ROOT / name).read_text().count("```python")) for name in NAMES}
    assert all(found == written for found, written in counted.values())
    assert sum(found for name, (found, _) in counted.items() if name not in ELSEWHERE) > 12
    assert {heading for name, heading in MADE} <= {heading for name in NAMES for heading, _ in blocks(name, "python")}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE and blocks(name, "python")])
def test_python_runs(name: str, monkeypatch, capsys):
    if name in REDUCING and not shortens_prompts():
        pytest.skip("this transformers is too old")
    transformers = pytest.importorskip("transformers")
    vllm = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("vlmfast.vllm.naming._architecture", lambda model: "LlavaForConditionalGeneration")
    load = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(load, "from_pretrained", lambda name, dtype: build("qwen3_vl")[0].to(dtype))
    check = CHECKS.get(name, lambda names, output, vllm: None)
    check(run_page(name, monkeypatch), capsys.readouterr().out, vllm)


def check_first_page(names: dict[str, Any], output: str, vllm: Any) -> None:
    """Check what the comments of README say."""
    assert "runs" in output
    assert names["x"].grad.shape == names["x"].shape
    assert names["short"]["attention_mask"].shape[1] == names["inputs"]["attention_mask"].shape[1] - 12
    start = names["inputs"]["input_ids"]
    assert torch.equal(names["ids"][:, : start.shape[1]], start)


def check_ops(names: dict[str, Any], output: str, vllm: Any) -> None:
    """Check what the page of ops says of its results."""
    assert torch.equal(names["prompt"][:, 20:276], names["image"][None])
    assert torch.equal(names["deeper"][:, 20:276], names["image"][None] * 2)
    assert torch.equal(names["packed"][0], names["image"])
    assert names["tokens"].shape == (4, 256, 896)
    assert names["scores"].shape == (4, 1024)
    assert names["fewer"].shape == (4, 64, 1024)


def check_serving(names: dict[str, Any], output: str, vllm: Any) -> None:
    """Check that what requests carry is a method that a request may name."""
    from vlmfast.vllm.naming import requested_method

    [start], requests = vllm.LLM.call_args_list, []
    assert start.kwargs["hf_overrides"]["architectures"][0].startswith("Vlmfast")
    for call in [*names["llm"].generate.call_args_list, *names["client"].chat.completions.create.call_args_list]:
        given = call.args[0] if call.args and isinstance(call.args[0], dict) else call.kwargs["extra_body"]
        requests.append(
            requested_method("LlavaForConditionalGeneration", given["mm_processor_kwargs"]["vlmfast_reduce"])
        )
    assert requests == [vlmfast.EvenTokens(1.0), vlmfast.DivPrune(128, centered=True)]


CHECKS = {
    "README.md": check_first_page,
    "docs/call.md": check_ops,
    "docs/serving.md": check_serving,
}


# ---- what is generated ----


def test_what_a_method_reads_is_what_it_asks_for():
    """The page of methods says it of a method by letting it choose."""
    page = importlib.import_module("scripts.docs_methods")
    reads = {
        vlmfast.EvenTokens: [],
        vlmfast.RandomTokens: ["pixels"],
        vlmfast.SCOPE: ["rows of the tower", "attention in the tower"],
        vlmfast.VisionZip: ["attention in the tower", "keys of the tower"],
        vlmfast.VCAST: ["tokens as the language model sees them"],
        vlmfast.FastV: ["attention of the last token"],
        vlmfast.SparseVLM: ["attention of the words of the question"],
    }
    assert {method: page.read(method) for method in reads} == reads
    said = "A rule.\n\nArgs:\n    a, b: one\n        and ``more``: yes.\n    c: two.\n\nSource:\n    A\n    paper."
    assert page.markdown(said) == (
        "A rule.\n\n**Args**\n\n- `a, b`: one and `more`: yes.\n- `c`: two.\n\n**Source**: A paper."
    )


# ---- command lines ----


def commands(name: str) -> list[str]:
    """Return the command lines of a page, without their comments, also those within its text."""
    text = "".join(text for _, text in blocks(name, "sh")).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    prose = FENCE.sub("", (ROOT / name).read_text())
    return [*filter(None, lines), *re.findall(r"`((?:python -m vlmfast|make) [^`]+)`", prose)]


def check_command(line: str) -> None:
    """Check that a command is there and takes these arguments; raise otherwise."""
    program, *arguments = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in arguments:
            known = rf"^{word.partition('=')[0]} \?=" if "=" in word else rf"^{word}:"
            assert re.search(known, makefile, re.MULTILINE), f"{line}: there is no {word}"
    elif arguments[:2] == ["-m", "vlmfast"]:
        parse(arguments[2:])
    elif arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]), line
    elif program == "python":
        script = (ROOT / arguments[0]).read_text()
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--")), line
    else:
        assert program in {"pip", "vllm", "lmms-eval"}, line


@pytest.mark.parametrize("name", [name for name in NAMES if commands(name)])
def test_commands_are_taken(name: str):
    for line in commands(name):
        try:
            check_command(line.replace(OWN, "even"))
        except SystemExit:  # of argparse
            pytest.fail(f"{name}: {line}")
