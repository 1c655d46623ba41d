"""The command line: its output and, above all, its exit codes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.cases import require
from tests.helpers.tiny_types import build
from vlmfast import demo_answers
from vlmfast.backends import LOADERS, Backend, cpu_level
from vlmfast.cli import main
from vlmfast.demo_model import PHOTOGRAPH
from vlmfast.patches.bodies import BODIES
from vlmfast.reduce.drawing import CAPTION, KEPT, PANEL
from vlmfast.registry import OPS, Op

SHORT = ["--new-tokens", "3", "--repeats", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Use only the torch backend, because the commands are under test: no interpreter and no backend of the tests."""
    for name in LOADERS.keys() - {"native", "triton", "torch"}:
        monkeypatch.delitem(LOADERS, name)
    with vlmfast.use("torch"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save a LLaVA with random weights and its processor as a checkpoint."""
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


def one_error(text: str) -> str:
    """Check that the text is one line of an error, and return it without the prefix."""
    [line] = text.splitlines()
    assert line.startswith("vlmfast: error: ")
    return line.removeprefix("vlmfast: error: ")


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
    # Three tokens, two layers: only the first norm of a token has no addition before it.
    assert re.search(r" rms_norm +torch +3 ", output)
    assert re.search(r"add_rms_norm +torch +12 ", output)
    assert re.search(r"qk_norm_rope +torch +6 ", output)
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
        (["--image", "."], "IsADirectoryError"),
        (["--image", "PICTURE empty.png 0"], "UnidentifiedImageError"),
        (["--image", "PICTURE half.png 500"], "cannot read the image"),
        (["--image", "PICTURE half.jpg 500"], "cannot read the image"),
        (["--image", "BOMB"], "DecompressionBombError"),
        (["--image", "PANORAMA"], "the processor refuses the image or the prompt: ValueError: absolute aspect ratio"),
        (["--prompt", "what is <|image_pad|> ?"], "--prompt: must be without <|image_pad|>"),
        (["--prompt", "what is<|video_pad|>?"], "--prompt: must be without <|video_pad|>"),
        (["--prompt", "what \udcff"], "--prompt: must be text"),
        (["--model", "LLAVA", "--prompt", "what is <image>"], "--prompt: must be without <image>"),
        (["--model", "LLAVA", "--layers", "1"], "--layers: is of the random model"),
        (["--model", "PICTURE model.png 9"], "there is no directory"),
        (["--overlay", "kept.png"], "--overlay: there is nothing to draw without --reduce or --compare"),
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
def test_what_the_user_can_put_right_is_one_line(arguments, message, capsys, tmp_path, checkpoint):
    def given(argument: str) -> str:
        if argument.startswith("PICTURE"):
            _, name, size = argument.split()
            whole = io.BytesIO()
            Image.effect_noise((64, 64), 50).save(whole, Path(name).suffix[1:].replace("jpg", "jpeg"))
            (tmp_path / name).write_bytes(whole.getvalue()[: int(size)])
            return str(tmp_path / name)
        if argument in ("BOMB", "PANORAMA"):
            picture = tmp_path / "large.png"
            Image.new("1", (16000, 16000) if argument == "BOMB" else (4200, 20)).save(picture)
            return str(picture)
        return {"EMPTY": str(tmp_path), "LLAVA": str(checkpoint)}.get(argument, argument)

    assert main(["demo", *map(given, arguments)]) == 2
    assert message in one_error(capsys.readouterr().err)


def test_demo_of_a_model_in_which_nothing_is_known(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("vlmfast.demo_model.find_sites", lambda model: [])
    assert main(["demo", "--model", str(checkpoint), *SHORT]) == 2
    assert re.search("knows no method of .*, which is of type llava", capsys.readouterr().err)


def test_what_fails_without_the_patch_is_not_ours(checkpoint, capsys, monkeypatch):
    def fail(subject, new_tokens, options):
        assert options is None
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr("vlmfast.demo.answer", fail)
    assert main(["demo", "--model", str(checkpoint), *SHORT]) == 2
    message = "the model cannot answer, even without vlmfast: RuntimeError: planted"
    assert one_error(capsys.readouterr().err) == message


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_counts_must_be_positive(number, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--new-tokens", number])
    assert end.value.code == 2
    assert "argument --new-tokens" in capsys.readouterr().err


def test_speed_up_is_taken_pair_by_pair():
    """The patched model is twice as fast throughout, although the machine gets ten times slower in between."""
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


def test_demo_cuts_between_layers(checkpoint, capsys, tmp_path):
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    picture = tmp_path / "kept.png"
    command = ["demo", "--model", str(checkpoint), *SHORT, "--reduce", "fastv:1:0.5", "--overlay", str(picture)]
    assert main(command) == 0
    output = capsys.readouterr().out
    prompt = int(re.search(r"(\d+) tokens with the image", output)[1])
    assert re.search(rf"tokens in the KV cache +{prompt} +{prompt - 4} ", output)  # all in one layer, half in the other
    assert "FastV(layer=1, keep=0.5): visual tokens of the last prompt 16 in layer 0, 8 in layer 1" in output
    assert "nothing is drawn" in output
    assert not picture.exists()


def test_demo_compares_methods(checkpoint, capsys, tmp_path):
    """Of 16 visual tokens; what a method between layers leaves is that of its last layer."""
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    sheet = tmp_path / "sheet.png"
    methods = ["scope:4", "smaller:9", "fastv:1:0.5", "even:0.5+fastv:1:2", "pyramiddrop:7:0.5"]
    command = ["demo", "--model", str(checkpoint), *SHORT, "--compare", *methods, "--overlay", str(sheet)]
    assert main(command) == 0
    output = capsys.readouterr().out
    number = r"+\d+\.\d\d ms "
    assert re.search(rf"all tokens +16 {number} +\d", output)
    share = r"+\d+\.\d% +\d\.\d{3} +\d\.\d{3} "
    for name, tokens in (("scope:4", 4), ("fastv:1:0.5", 8), ("even:0.5+fastv:1:2", 2)):
        assert re.search(rf"{re.escape(name)} +{tokens} {share}{number} +\d+\.\d\dx +\d", output), name
    assert re.search(rf"smaller:9 +9 {number} +\d+\.\d\dx", output)  # the tower has seen another picture
    assert re.search("left out pyramiddrop:7:0.5: layer must be below 2", output)
    with Image.open(sheet) as drawn:
        assert drawn.width == 3 * PANEL
        assert drawn.height > 2 * CAPTION


def test_compare_is_refused_before_the_run(checkpoint, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        main(["demo", "--compare", "scop:4"])
    assert "argument --compare: unknown method 'scop'; known: " in capsys.readouterr().err
    monkeypatch.setattr("vlmfast.demo._load", lambda *_: pytest.fail("found out too late"))
    assert main(["demo", "--compare", "--overlay", str(tmp_path / "no" / "such.png")]) == 2
    assert "--overlay: cannot write" in one_error(capsys.readouterr().err)
    assert main(["demo", "--compare", "64", "--reduce", "even:4"]) == 2
    assert "--compare: not beside --reduce" in one_error(capsys.readouterr().err)


@pytest.mark.thorough
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


@pytest.mark.parametrize("name", ["no/such.png", "", "kept.xyz", "kept", "kept.json"])
def test_overlay_that_cannot_be_written(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmfast.demo._load", lambda *_: pytest.fail("found out too late"))
    assert main(["demo", *SHORT, "--reduce", "even:4", "--overlay", str(tmp_path / name)]) == 2
    assert "--overlay: cannot write" in one_error(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_overlay_shows_what_a_centre_crop_saw(checkpoint, tmp_path):
    """The sides of a wide picture, which the processor cuts off, are dimmed all over."""
    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    Image.new("RGB", (112, 28), (200, 90, 20)).save(tmp_path / "wide.png")
    files = ["--image", str(tmp_path / "wide.png"), "--overlay", str(tmp_path / "kept.png")]
    assert main(["demo", "--model", str(checkpoint), *SHORT, "--reduce", "even:1.0", *files]) == 0
    with Image.open(tmp_path / "kept.png") as drawn:
        framed = [x for x in range(112) if KEPT in {drawn.getpixel((x, y)) for y in range(28)}]
        assert drawn.size == (112, 28)
    assert framed == list(range(42, 70))


# ---- info and explain ----


def test_info(capsys):
    replacements = {body.function.__name__ for body in BODIES if body.function is not None}
    everywhere = (*LOADERS, vlmfast.__version__, torch.__version__)
    for arguments, names in ([], everywhere), (["--all"], (*everywhere, *OPS, *replacements)):
        assert main(["info", *arguments]) == 0
        output = capsys.readouterr().out
        assert [name for name in names if name not in output] == []
        assert "broken" not in output
        assert arguments or len(output.splitlines()) < 25


def test_info_says_for_which_processors_the_kernels_are(capsys):
    require(OPS["rms_norm"], "native")
    level = {"AVX2": "v3", "AVX512": "v4"}.get(torch.backends.cpu.get_cpu_capability())
    if level is None or "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("torch does not tell the level of this processor")
    own = cpu_level()
    assert own.split(" of ")[-1].removesuffix("_bf16") == level
    assert main(["info"]) == 0
    assert f"native: {own}, threads" in " ".join(capsys.readouterr().out.split())


def test_info_says_what_is_broken(capsys, monkeypatch, override):
    def explode(*args, **kwargs):
        raise RuntimeError("planted\nand more")

    override(OPS["rms_norm"], "torch", Backend("torch", explode, explode))
    monkeypatch.setattr("vlmfast.info._bodies", explode)
    assert main(["info", "--all"]) == 0
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
