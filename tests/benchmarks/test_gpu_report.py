"""`make gpu-report`, and the pages that `make docs` makes of its results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.parts import part_of
from vlmfast import cli
from vlmfast.benchmarks import gpu_report, gpu_tests, report
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def python(name: str, code: str, seconds: float = 20.0, **environment: str) -> gpu_report.Step:
    return gpu_report.Step(name, [sys.executable, "-c", code], seconds, environment)


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys):
    """Return a function that runs `bench gpu` without a GPU on given steps.

    It returns the exit code, the steps that are done and the output.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "environment", lambda device: {"device": device})
    monkeypatch.setattr(report, "device_name", lambda device: "NVIDIA H200")

    def run(planned: list[gpu_report.Step], *arguments: str):
        monkeypatch.setattr(gpu_report, "steps", lambda out, device: planned)
        code = cli.main(["bench", "gpu", "--out", str(tmp_path / "out"), *arguments])
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        return code, {step["step"]: step["exit_code"] for step in summary["steps"]}, capsys.readouterr().out

    return run


SLOW = python("slow", "print('half', flush=True); import time; time.sleep(60)", 2.0)
BROKEN = python("broken", "raise SystemExit(3)")
LAST = python("last", "import os; print(os.environ['GIVEN'])", GIVEN="yes")


def test_gpu_report_keeps_what_came_out(tmp_path: Path, call):
    """A step that fails or takes too long does not stop the others."""
    code, done, printed = call([SLOW, BROKEN, LAST])
    assert code == 1
    assert done == {"slow": None, "broken": 3, "last": 0}
    assert (tmp_path / "out" / "slow.log").read_text() == "half\n"
    assert (tmp_path / "out" / "last.log").read_text() == "yes\n"
    assert "benchmarks/results/nvidia-h200" in printed
    assert "seconds set aside, 42 of 530" in printed
    assert "slow 2, broken 20, last 20" in printed


def test_gpu_report_goes_on_where_it_was_stopped(call, monkeypatch):
    """A successful step is rerun only on request, or if the device or a version has changed."""
    call([SLOW, LAST])
    must_not_run = python("last", "raise SystemExit(4)")
    quick = python("slow", "")
    code, done, printed = call([quick, must_not_run])
    assert (code, done) == (0, {"slow": 0, "last": 0})
    assert "slow 20, last done" in printed
    assert call([quick, must_not_run], "--again")[:2] == (1, {"slow": 0, "last": 4})
    call([quick, LAST])
    monkeypatch.setattr(report, "environment", lambda device: {"device": device, "torch": "2.99"})
    code, done, printed = call([quick, must_not_run])
    assert (code, done) == (1, {"slow": 0, "last": 4})
    assert "all of it again: torch changed" in printed


def test_a_step_has_what_those_before_it_left_over(call):
    nap = python("nap", "import time; time.sleep(4)", 2.0)
    assert call([nap, LAST], "--again")[1] == {"nap": None, "last": 0}
    assert call([LAST, nap], "--again")[1] == {"last": 0, "nap": 0}
    assert call([LAST, nap], "--again", "--limit", "3")[1]["nap"] is None


def test_results_are_copied_while_a_step_runs(tmp_path: Path, call, monkeypatch):
    """The machine hands back a folder of its own, and may end at any time."""
    kept = tmp_path / "kept"
    copying, copies = gpu_report._copy, []
    monkeypatch.setattr(gpu_report, "_copy", lambda out, copy: copies.append(copying(out, copy)))
    call([SLOW, LAST], "--copy", str(kept))
    assert len(copies) >= 3
    assert (kept / "slow.log").read_text() == "half\n"
    assert json.loads((kept / "summary.json").read_text())["steps"][1]["exit_code"] == 0


def test_a_report_that_is_terminated_ends_its_step(tmp_path: Path, call):
    """The step has a session of its own, and would go on without its parent."""
    started = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    code = f"import os, signal, time; {started}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        call([python("forever", code)])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["environment"]["sources"]
    with pytest.raises(KeyboardInterrupt):
        call([LAST, python("forever", code)])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["last"], "what was finished is kept"


def test_changed_code_is_measured_again(tmp_path: Path, call, monkeypatch):
    call([LAST])
    for name in ("ops.json", "tests-1.passed", "report.html"):
        (tmp_path / "out" / name).touch()
    monkeypatch.setattr(gpu_report, "sources", lambda: "others")
    code, done, printed = call([python("last", "raise SystemExit(4)")])
    assert (code, done) == (1, {"last": 4})
    assert "all of it again: sources changed" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["last.log", "report.html", "summary.json"]


def test_gpu_tests_run_in_parts_and_go_on(tmp_path: Path, monkeypatch, capsys):
    """Each test is in one part; what has passed is left out, and what has failed is not."""
    tests = (
        "import os, pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('x', ['rms_norm-a', 'rms_norm-b', 'rope-a'])\n"
    )
    tests += "def test_it(x):\n    assert x != 'rope-a' or 'FIXED' in os.environ\ndef test_other(): pass\n"
    (tmp_path / "test_some.py").write_text(tests)
    (tmp_path / "test_more.py").write_text("import no_such_package\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_tests, "WITH_GPU_TESTS", (str(tmp_path), "-c", str(tmp_path / "pytest.ini")))
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run() -> list[int]:
        assert gpu_tests.main(tmp_path) == 1  # a file cannot be collected
        lines = capsys.readouterr().out.splitlines()
        return [sum(int(n) for n in re.findall(rf"(\d+) {kind}", "".join(lines))) for kind in ("passed", "failed")]

    assert run() == [2, 1]
    assert run() == [0, 1]
    monkeypatch.setenv("FIXED", "1")
    assert run() == [1, 0]
    assert {part_of(f"test_it[rms_norm-{x}]", 8) for x in "abcdef"} == {part_of("test_other[rms_norm-x]", 8)}


def test_all_tests_that_need_a_gpu_are_run():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    assert marked
    assert all(path.relative_to(ROOT).as_posix().startswith(gpu_tests.WITH_GPU_TESTS) for path in marked)


def test_the_build_may_take_the_time_of_the_last_steps(call):
    """All numbers depend on it; what follows keeps its own time until the limit is reached."""
    slow = gpu_report.Step("build", [sys.executable, "-c", "import time; time.sleep(3)"], 1.0, most=10.0)
    assert call([slow, LAST])[1] == {"build": 0, "last": 0}
    nap = python("nap", "import time; time.sleep(30)")
    assert call([slow, nap], "--again", "--limit", "4")[1] == {"build": 0, "nap": None}


def test_what_was_built_is_not_on_another_machine(call, monkeypatch):
    built = python("build", "")
    call([built, LAST])
    must_not_run = python("last", "raise SystemExit(4)")
    assert "build done, last done" in call([built, must_not_run])[2]
    monkeypatch.setattr(gpu_report, "LIBRARY", Path("/nowhere/_C.so"))
    assert "build 20, last done" in call([built, must_not_run])[2]


def test_gpu_report_asks_for_what_there_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for device in ("cuda", "cpu"):
        planned = gpu_report.steps(tmp_path, device)
        commands = {step.name: step.command for step in planned}
        assert list(commands)[:4] == ["build", "deciding", "decode", "prefill"]
        assert sum(step.seconds for step in planned) <= 530, "nine minutes, and some to start"
        assert "compile" not in commands["ops"]
        for name, command in commands.items():
            if command[1:3] == ["-m", "vlmfast"]:  # check that the command line accepts the arguments
                assert cli.parse(command[3:]), name


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_numbers_that_decide_are_workloads(device: str):
    for text in gpu_report.DECIDING[device]:
        name, _, label = text.partition(":")
        like = "compact_tokens" if OPS[name].family == "masked_rows" else name  # its masks work on the meta device
        place = "meta" if device == "cuda" else "cpu"
        assert label in [label for label, _ in OPS[like].cases.workloads(place, torch.bfloat16)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_report_needs_a_gpu(capsys):
    assert cli.main(["bench", "gpu"]) == 2
    message = "bench gpu needs a GPU, and torch sees none; its steps run on a CPU by `vlmfast bench gpu --rehearse`"
    assert capsys.readouterr().err == f"vlmfast: error: {message}\n"


# ---- make docs ----


@pytest.fixture
def docs(tmp_path: Path, monkeypatch):
    """Load scripts/make_docs.py with only the committed runs on CPUs."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in (*RESULTS.glob("cpu*.json"), RESULTS / "models_cpu.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def stand_in(name: str, folder: Path, change) -> None:
    """Fake a run on a GPU by changing one of a CPU."""
    run = json.loads((RESULTS / name).read_text())
    run["environment"] |= {"device": "NVIDIA H0", "kind": "cuda"}
    run["records"] = change(run["records"])
    folder.mkdir(exist_ok=True)
    (folder / {"cpu.json": "ops.json", "models_cpu.json": "models.json"}.get(name, name)).write_text(json.dumps(run))


def without_compile(records):
    rows = lambda record: [row for row in record["contenders"] if row["name"] != "torch.compile"]  # noqa: E731
    return [{**record, "contenders": rows(record)} for record in records]


def row(text: str, *cells: str) -> list[str]:
    """Return the cells of the only table row that begins with these cells."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_gpu_the_readme_says_so(docs):
    assert "There is no result of a GPU yet" in docs.figures()
    assert "Whole models" not in docs.figures()
    assert row(docs.benchmarks(), "llava-next-7b", "eager", "reduced")[4] == "8.49"


def test_the_readme_shows_five_rows_and_the_page_all(docs):
    assert len([line for line in docs.figures().splitlines() if line.startswith("| `")]) == 5
    assert docs.benchmarks().count("| `top_tokens` | 5x576 |") == 2


def test_all_of_a_gpu_report_is_shown(docs, tmp_path: Path):
    def compiled(records):
        (record,) = [r for r in records if (r["op"], r["workload"]) == ("rms_norm", "600x2048")]
        ours = record["contenders"][0]
        theirs = {"name": "torch.compile", "group": "peer", "error": None, "us": 14.0}
        return [{**record, "contenders": [{**ours, "us": 2.0}, theirs]}]

    def graphs(records):
        broken = {"model": "smolvlm-256m", "size": "full", "dtype": "bfloat16", "mode": "graph", "variant": "patched"}
        fine = {**records[1], "mode": "graph", "peak_bytes": 5_000_000, "prefill_graph": "none: it waits"}
        return [fine, {**broken, "error": "RuntimeError: planted"}]

    folder = tmp_path / "nvidia-h0"
    stand_in("cpu.json", folder, without_compile)
    stand_in("models_cpu.json", folder, graphs)
    (folder / "summary.json").write_text("{}")
    before = docs.figures()
    assert row(before[: before.index("AMD EPYC")], "`rms_norm`", "600x2048")[5] == ""
    stand_in("cpu.json", folder, compiled)
    (folder / "ops.json").rename(folder / "compiled.json")
    stand_in("cpu.json", folder, without_compile)
    readme, page = docs.figures(), docs.benchmarks()
    assert "There is no result of a GPU yet" not in readme
    assert readme.count("NVIDIA H0") == 2
    gpu = readme[: readme.index("AMD EPYC")]
    assert row(gpu, "`rms_norm`", "600x2048")[3:6:2] == ["5.6", "7.0"]
    assert row(gpu, "`add_rms_norm`", "600x2048")[3:6:2] == ["5.3", ""]
    assert page.count("## NVIDIA H0") == 3
    assert "torch.compile 7.00" in page
    for text in (readme, page):
        assert row(text, "llava-next-7b", "graph", "patched")[3:] == [
            "5843.41 (no graph)",
            "1.04",
            "43.74",
            "1.18",
            "97.1",
            "5",
        ]
        assert row(text, "smolvlm-256m", "graph", "patched")[3:] == ["no time", "", "", "", "", ""]


def test_what_a_gpu_report_measures_first_is_shown_with_the_rest(docs, tmp_path: Path):
    """Its files of its own are joined with those of all ops and models, from which a stop may have kept it."""
    folder = tmp_path / "nvidia-h0"
    stand_in("cpu.json", folder, lambda records: records)
    (folder / "ops.json").rename(folder / "deciding.json")
    rows = docs.benchmarks().count("| `")
    stand_in("cpu.json", folder, lambda records: records[:1])
    assert docs.benchmarks().count("## NVIDIA H0") == 1
    assert docs.benchmarks().count("| `") == rows
    for name, variant in (("decode", "original"), ("prefill", "patched"), ("models", "reduced")):
        stand_in("models_cpu.json", folder, lambda records, only=variant: [r for r in records if r["variant"] == only])
        (folder / "models.json").rename(folder / f"{name}.json")
    gpu = docs.figures().partition("AMD EPYC")[0]
    assert all(row(gpu, "llava-next-7b", "eager", variant) for variant in ("original", "patched", "reduced"))


def test_a_part_of_a_gpu_report_is_shown(docs, tmp_path: Path):
    stand_in("models_cpu.json", tmp_path / "nvidia-h0", lambda records: records)
    readme = docs.figures()
    assert row(readme, "llava-next-7b", "eager", "patched")[3] == "5843.41"
    assert "There is no result of a GPU yet" not in readme
    assert "## NVIDIA H0" in docs.benchmarks()


def test_what_failed_in_one_file_of_a_gpu_report_is_left_out(docs, tmp_path: Path):
    def failed(records):
        (record,) = [r for r in records if (r["op"], r["workload"]) == ("rms_norm", "600x2048")]
        return [{**record, "contenders": [{"name": "vlmfast native", "group": "ours", "error": "planted"}]}]

    folder = tmp_path / "nvidia-h0"
    stand_in("cpu.json", folder, lambda records: records)
    for name in ("compiled", "matmul"):
        shutil.copy(folder / "ops.json", folder / f"{name}.json")
    stand_in("cpu.json", folder, failed)
    assert "`rms_norm`" not in docs.figures().partition("AMD EPYC")[0]
    assert docs.benchmarks().count("## NVIDIA H0") == 3
