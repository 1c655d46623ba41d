"""Ask one question about every picture of a folder, with Ray Data and vLLM, and write the answers as Parquet.

    pip install "ray[data]" vllm vlmfast
    python examples/ray_batch.py MODEL METHOD PICTURES ANSWERS --prompt "USER: <image> What is this? ASSISTANT:"

Each worker has its own engine. A run can be stopped and started again: pictures with answers in ANSWERS are left out.
Pictures that cannot be read are named at the end, and the next run tries them again. With several machines, install
vlmfast and vLLM on each; the method travels in the model's configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("method", help='such as visionzip:54+10, or "none"')
    parser.add_argument("pictures", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--prompt", required=True, help="with the model's placeholder of an image")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="pictures that a worker is given at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="workers have a CPU core each, and no GPU")
    options = parser.parse_args()

    pictures = sorted(str(path) for path in options.pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    before = answered(options.answers)
    left = [path for path in pictures if path not in before]
    print(f"{len(pictures)} pictures, {len(pictures) - len(left)} answered before", flush=True)
    if left:
        run(left, options)
    unread = sorted(set(left) - answered(options.answers))
    print(f"{len(left) - len(unread)} answered now; {len(unread)} could not be read", *unread, sep="\n")
    return int(bool(unread))


def answered(folder: Path) -> set[str]:
    """Return the pictures with answers, and remove a file that a stopped run did not finish."""
    import pyarrow
    import pyarrow.parquet

    found: set[str] = set()
    for file in folder.glob("*.parquet"):
        try:
            found.update(pyarrow.parquet.read_table(file, columns=["path"])["path"].to_pylist())
        except pyarrow.ArrowInvalid:
            file.unlink()
    return found


def run(paths: list[str], options: argparse.Namespace) -> None:
    """Answer, and write each block of answers when it is ready."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from vlmfast.vllm import reduced

    settings: dict[str, Any] = {} if options.method == "none" else reduced(options.method, options.model)
    if options.cpu:
        settings |= {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "max_model_len": 1024}
    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs=settings,
        log_engine_metrics=False,  # Ray's recorder of them does not load beside vLLM 0.32
        concurrency=options.workers,
        batch_size=options.batch,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **({"placement_group_config": {"bundles": [{"CPU": 1}]}, "accelerator_type": None} if options.cpu else {}),
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        image = Image.open(row["path"]).convert("RGB")
        sampling = {"temperature": 0, "max_tokens": options.new_tokens}
        return {
            "path": row["path"],
            "prompt": options.prompt,
            "multimodal_data": {"image": image},
            "sampling_params": sampling,
        }

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        tokens = {"prompt_tokens": int(row["num_input_tokens"]), "answer_tokens": int(row["num_generated_tokens"])}
        return {"path": row["path"], "answer": row["generated_text"], **tokens}

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    questions = ray.data.from_items([{"path": path} for path in paths]).repartition(-(-len(paths) // options.batch))
    answers = build_processor(config, preprocess=ask, postprocess=keep)(questions.filter(readable))
    answers.write_parquet(os.path.abspath(options.answers), mode="append")


def readable(row: dict[str, Any]) -> bool:
    """Tell whether a picture can be decoded."""
    from PIL import Image

    try:
        with Image.open(row["path"]) as image:
            image.load()
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
