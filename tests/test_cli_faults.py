"""The command line in a faulty environment or with faulty arguments: one line of error and exit code 2."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest

from tests.test_cli import one_error
from vlmfast import demo_answers
from vlmfast.cli import entry, main
from vlmfast.console import version
from vlmfast.patches import scan
from vlmfast.registry import OPS


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_command_that_is_stopped(raised, line, capsys, monkeypatch):
    def stop(options):
        raise raised

    monkeypatch.setattr("vlmfast.info.info", stop)
    assert entry(["info"]) == 2
    assert one_error(capsys.readouterr().err) == line


@pytest.mark.parametrize("command", ["info", "explain rms_norm"])
def test_a_pipe_that_nobody_reads(command):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmfast", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert one_error(process.communicate()[1]) == "stopped, because nobody reads the output any more"
    assert process.returncode == 2


def test_a_backend_of_another_name_in_the_environment():
    environment = {**os.environ, "VLMFAST_BACKEND": "nonsense"}
    command = [sys.executable, "-m", "vlmfast", "info"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    message = "VLMFAST_BACKEND must be one of native, triton, torch, got 'nonsense'"
    assert (ran.returncode, one_error(ran.stderr), ran.stdout) == (2, message, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--layers", "99999999999"],
        ["demo", "--repeats", "1.5"],
        ["bench", "--threads", "-1"],
        ["bench", "models", "--budget", "-1"],
        ["bench", "models", "--budget", "nan"],
        ["bench", "gpu", "--limit", "soon"],
        ["bench", "digits", "--steps", "0"],
        ["bench", "digits", "--seeds", "99999999999"],
    ],
)
def test_numbers_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert re.search(rf"argument {arguments[-2]}: must be a .*, got '{arguments[-1]}'", capsys.readouterr().err)


def test_narrow(capsys, monkeypatch):
    """A narrow console shows all of the text, within its width and without breaking words."""
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["info", "--all"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    assert "…" not in narrow
    for name in OPS:
        assert f" {name} " in narrow
    monkeypatch.setenv("COLUMNS", "0")  # counts as not set
    assert main(["info", "--all"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 60


def test_one_run_gives_no_speed_up():
    assert demo_answers.compare([(0.2, 0.1)]) == ("200.00 ms", "100.00 ms", "not known")


# ---- scan ----


@pytest.mark.thorough
def test_scan_keeps_what_a_file_says_of_other_releases(tmp_path, monkeypatch, capsys):
    file = tmp_path / "families.json"
    file.write_text('{"1.0": {}}')
    monkeypatch.setattr("vlmfast.patches.scan.model_types", dict)
    monkeypatch.setattr("vlmfast.patches.scan.scan", functools.cache(scan.scan))  # ten seconds
    assert main(["scan", str(file)]) == 0
    written = json.loads(file.read_text())
    assert list(written) == ["1.0", version("transformers")]
    assert main(["scan"]) == 0
    counts = re.findall(r"^(?:known|left alone|unknown): (\d+) methods", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(int, counts)) == sum(map(len, written[version("transformers")]["bodies"].values())) > 0


@pytest.mark.parametrize(
    ("content", "message"), [("", "is not what `scan` writes"), ("[]", "is not what `scan` writes")]
)
def test_scan_into_a_file_of_something_else(content, message, tmp_path, capsys):
    file = tmp_path / "families.json"
    file.write_text(content)
    assert main(["scan", str(file)]) == 2
    assert message in one_error(capsys.readouterr().err)
    assert file.read_text() == content
    assert main(["scan", str(tmp_path)]) == 2
    assert "it is a folder" in one_error(capsys.readouterr().err)
    assert main(["scan", str(tmp_path / "no" / "such.json")]) == 2
    assert "FileNotFoundError" in one_error(capsys.readouterr().err)
