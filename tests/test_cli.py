"""The command line: what it prints, and above all its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.tiny_types import build
from vlmfast import demo_answers
from vlmfast.backends import LOADERS, Backend
from vlmfast.cli import entry, main
from vlmfast.console import version
from vlmfast.demo_model import PHOTOGRAPH
from vlmfast.patches.bodies import BODIES
from vlmfast.registry import OPS, Op

SHORT = ["--new-tokens", "3", "--repeats", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The commands are under test, not the kernels: no interpreter for every norm, no backend that only tests have."""
    for name in LOADERS.keys() - {"native", "triton", "torch"}:
        monkeypatch.delitem(LOADERS, name)
    with vlmfast.use("torch"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaVA of random weights and its processor, saved as a checkpoint is."""
    pytest.importorskip("transformers")
    from tests.helpers.patches_models import llava_processor

    path = tmp_path_factory.mktemp("llava")
    build("llava")[0].save_pretrained(path)
    llava_processor().save_pretrained(path)
    return path


def wrong_rms_norm(x, weight, eps=1e-6, variant="llama"):
    return -OPS["rms_norm"].reference(x, weight, eps, variant)


def plant(override, op, backend, run):
    override(OPS[op], backend, Backend(backend, run, lambda *args, **kwargs: None))


# ---- demo ----


def test_demo_of_the_random_model(capsys):
    assert main(["demo", "--layers", "1", "--new-tokens", "3", "--repeats", "1", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "RANDOM weights" in output
    assert "china.jpg, 640 x 427, 260 visual tokens" in output  # 26 x 40 patches, four to a token
    assert re.search(r"Qwen3VLTextRMSNorm.forward +5 modules", output)
    for op in ("rms_norm", "place_embeddings", "deepstack_add"):
        assert re.search(rf"{op} +(native|torch) +\d", output)
    assert "generated ids: EQUAL, all 3" in output
    assert "largest logit difference: 0 " in output


def test_demo_of_a_checkpoint(checkpoint, capsys):
    assert main(["demo", "--model", str(checkpoint), "--prompt", "describe this", *SHORT]) == 0
    output = capsys.readouterr().out
    assert "(llava, " in output
    assert "16 visual tokens" in output  # 4 x 4 patches
    assert "'describe this', 18 tokens with the image" in output
    assert re.search(r"rms_norm +torch +15 ", output)  # five norms, three tokens
    assert "generated ids: EQUAL, all 3" in output
    assert "each further token" in output


def test_demo_uses_the_chat_template(checkpoint, capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    part = "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}"
    template = "{% for m in messages %}<s> {% for c in m.content %}" + part + "{% endfor %}{% endfor %}"
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    processor.chat_template = template
    transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["demo", "--model", str(tmp_path), "--prompt", "describe this", *SHORT]) == 0
    assert "19 tokens with the image" in capsys.readouterr().out  # <s> as well


def test_demo_fails_when_the_tokens_differ(checkpoint, capsys, override):
    plant(override, "rms_norm", "torch", wrong_rms_norm)
    assert main(["demo", "--model", str(checkpoint), *SHORT]) == 1
    output = capsys.readouterr().out
    assert "generated ids: DIFFERENT from token 1 on" in output
    assert "EQUAL" not in output


def test_demo_shows_a_difference_that_changes_no_token(checkpoint, capsys, override):
    plant(override, "rms_norm", "torch", lambda *args: OPS["rms_norm"].reference(*args) * (1 + 1e-5))
    assert main(["demo", "--model", str(checkpoint), *SHORT]) == 0
    output = capsys.readouterr().out
    assert "EQUAL" in output
    assert "largest logit difference: " in output
    assert "largest logit difference: 0 " not in output


def test_a_bug_is_an_exception_and_leaves_the_ops_as_they_were(checkpoint, override):
    def explode(*args, **kwargs):
        raise RuntimeError("planted")

    run = Op.run
    plant(override, "rms_norm", "torch", explode)
    with pytest.raises(RuntimeError, match="planted"):
        main(["demo", "--model", str(checkpoint), *SHORT])
    assert Op.run is run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no/such.jpg"], "cannot read the image no/such.jpg: FileNotFoundError"),
        (["--image", __file__], "UnidentifiedImageError"),
        (["--model", "./no-such-model"], "there is no directory ./no-such-model"),
        (["--model", "EMPTY"], "cannot load"),
        (["--device", "tpu9"], "cannot use tpu9"),
        (["--device", "meta"], "cannot use meta"),
        pytest.param(
            ["--device", "cuda"],
            "cannot use cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["demo", *(str(tmp_path) if argument == "EMPTY" else argument for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("vlmfast: error: ")
    assert len(error.splitlines()) == 1


def test_demo_of_a_model_in_which_nothing_is_known(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("vlmfast.demo_model.find_sites", lambda model: [])
    assert main(["demo", "--model", str(checkpoint), *SHORT]) == 2
    assert re.search("knows no method of .*, which is of type llava", capsys.readouterr().err)


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_counts_must_be_positive(number, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--new-tokens", number])
    assert end.value.code == 2
    assert "argument --new-tokens" in capsys.readouterr().err


def test_speed_up_is_taken_pair_by_pair():
    """The machine became ten times slower within the measurement; the patched model was twice as fast throughout."""
    before, after, ratio = demo_answers.compare([(0.2, 0.1), (2.0, 1.0), (2.0, 1.0)])
    assert before == "2000.00 ms (200.00 to 2000.00)"
    assert after == "1000.00 ms (100.00 to 1000.00)"
    assert ratio == "2.00x (2.00 to 2.00)"


# ---- demo --reduce ----


@pytest.mark.parametrize(("method", "tokens"), [("visionzip:5+3", 8), ("random:6", 6), ("even:0.25", 4)])
def test_demo_reduces_and_draws(checkpoint, capsys, tmp_path, method, tokens):
    picture = tmp_path / "kept.png"
    command = ["demo", "--model", str(checkpoint), *SHORT, "--reduce", method, "--overlay", str(picture)]
    if not shortens_prompts():
        assert main(command) == 2
        assert "--reduce: reduce needs transformers 5.17 or later" in capsys.readouterr().err
        return
    assert main(command) == 0
    output = capsys.readouterr().out
    assert re.search(rf"visual tokens +16 +{tokens} ", output)
    prompt = int(re.search(r"(\d+) tokens with the image", output)[1])
    assert re.search(rf"tokens in the KV cache +{prompt} +{prompt - 16 + tokens} ", output)
    assert re.search(r"KV cache +\d+\.\d\d MB +\d+\.\d\d MB ", output)
    assert re.search(r"first token, median \(range\) +\d+\.\d+ ms \(.*\) +\d+\.\d+ ms \(.*\) +\d", output)
    with Image.open(picture) as drawn, Image.open(PHOTOGRAPH) as photograph:
        assert drawn.size == photograph.size


def test_demo_reduces_the_random_model(capsys, tmp_path):
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    picture = tmp_path / "kept.png"
    short = ["--layers", "1", "--new-tokens", "1", "--repeats", "1", "--device", "cpu"]
    assert main(["demo", *short, "--reduce", "visionzip:54+10", "--overlay", str(picture)]) == 0
    assert re.search(r"visual tokens +260 +64 ", capsys.readouterr().out)
    assert picture.exists()


@pytest.mark.parametrize("method", ["visionzip:54", "random:1+2", "even:-1", "fastv:3", "even:", "visionzip:1.5+0.1"])
def test_method_that_is_none(method, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--reduce", method])
    assert end.value.code == 2
    assert "argument --reduce" in capsys.readouterr().err


def test_overlay_that_cannot_be_written(checkpoint, capsys, tmp_path):
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    missing = tmp_path / "no" / "such.png"
    assert main(["demo", "--model", str(checkpoint), *SHORT, "--reduce", "even:4", "--overlay", str(missing)]) == 2
    assert "--overlay: cannot write" in capsys.readouterr().err


# ---- info and explain ----


def test_info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    replacements = {body.function.__name__ for body in BODIES if body.function is not None}
    for name in (*OPS, *LOADERS, *replacements, vlmfast.__version__, torch.__version__):
        assert name in output
    assert "broken" not in output


def test_info_says_what_is_broken(capsys, monkeypatch, override):
    def explode(*args, **kwargs):
        raise RuntimeError("planted\nand more")

    override(OPS["rms_norm"], "torch", Backend("torch", explode, explode))
    monkeypatch.setattr("vlmfast.info._bodies", explode)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "broken: RuntimeError: planted (1 op)" in output
    assert output.rstrip().endswith("broken: RuntimeError: planted")
    assert "Traceback" not in output


def test_explain(capsys):
    assert main(["explain", "rms_norm", "--device", "cpu", "--dtype", "float16"]) == 0
    output = capsys.readouterr().out
    workloads = list(OPS["rms_norm"].cases.workloads("cpu", torch.float16))
    assert output.count("    torch: runs") == len(workloads)
    assert "rms_norm(x: 600x2048 float16, weight: 2048 float16)" in output


def test_explain_of_an_unknown_op(capsys):
    assert main(["explain", "layer_norm"]) == 2
    error = capsys.readouterr().err
    assert "there is no op 'layer_norm'" in error
    assert "rms_norm" in error


def test_without_a_command(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("demo", "info", "explain"))


def test_as_a_module():
    command = [sys.executable, "-m", "vlmfast", "explain", "no_such_op"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("vlmfast: error: there is no op 'no_such_op'")
    assert not result.stdout


# ---- what goes wrong outside of vlmfast ----


def one_error(text: str) -> str:
    """The one line of an error, without what stands in front of it."""
    [line] = text.splitlines()
    assert line.startswith("vlmfast: error: ")
    return line.removeprefix("vlmfast: error: ")


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
    for command in ([], ["info"], ["explain", "rms_norm"]):
        ran = subprocess.run(
            [sys.executable, "-m", "vlmfast", *command], env=environment, capture_output=True, text=True, check=False
        )
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
    ],
)
def test_numbers_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert re.search(rf"argument {arguments[-2]}: must be a .*, got '{arguments[-1]}'", capsys.readouterr().err)


def test_narrow(capsys, monkeypatch):
    """All that is said is there, within the width, in whole words."""
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["info"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    assert "…" not in narrow
    for name in OPS:
        assert f" {name} " in narrow
    monkeypatch.setenv("COLUMNS", "0")  # says nothing
    assert main(["info"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 60


def test_one_run_gives_no_speed_up():
    assert demo_answers.compare([(0.2, 0.1)]) == ("200.00 ms", "100.00 ms", "not known")


# ---- scan ----


def test_scan_keeps_what_a_file_says_of_other_releases(tmp_path, monkeypatch, capsys):
    file = tmp_path / "families.json"
    file.write_text('{"1.0": {}}')
    monkeypatch.setattr("vlmfast.patches.scan.model_types", dict)
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
