"""Measure the requests per second of vLLM with all and with fewer visual tokens, on a CPU or a GPU.

    python examples/vllm_throughput.py llava visionzip:54+10         # 576 tokens a picture
    python examples/vllm_throughput.py qwen3_vl visionzip:0.15+0.05  # of 1020
    python examples/vllm_throughput.py MODEL METHOD                  # a folder or the name of a repository

The first two are random models with as many tokens as published ones, but fewer and narrower layers. Each engine is a
process; full and reduced ones take turns. Times are wall and CPU time of that process after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = {"llava": (336, 336), "qwen3_vl": (960, 1088)}  # of the pictures: width and height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("method")
    parser.add_argument("--requests", type=int, default=8, help="at once")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="engines of each kind")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("RESULT", json.dumps(measure(options)))
        return
    runs: dict[str, list[dict[str, float]]] = {"none": [], options.method: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for method, found in runs.items():
                numbers = ["--requests", str(options.requests), "--new-tokens", str(options.new_tokens), "--worker"]
                command = [sys.executable, __file__, options.model, method, *numbers]
                environment = {"PYTHONPATH": str(ROOT), "VLMFAST_MODELS": folder, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
                if "RESULT" not in done.stdout:
                    sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
                found.append(json.loads(done.stdout.split("RESULT")[1]))
                print(method, found[-1], flush=True)
    full, reduced = ({key: statistics.median(run[key] for run in found) for key in found[0]} for found in runs.values())
    for key in full:
        print(f"{key}: {full[key]:.2f} -> {reduced[key]:.2f}, {full[key] / reduced[key]:.2f} times less")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one engine, and return the tokens of a prompt and the seconds for each request."""
    from vllm import LLM, SamplingParams

    import tests.vllm.conftest  # noqa: F401  # settings of vLLM on CPUs
    import vlmfast.vllm
    from tests.helpers.written_models import picture, placeholder, write

    name = options.model
    model = str(write(f"{name}_wide", Path(os.environ["VLMFAST_MODELS"]))) if name in SIZES else name
    reduction = {} if options.method == "none" else vlmfast.vllm.reduced(options.method, model)
    limits = {"image": 1, "video": 0} if "qwen" in model.lower() else {"image": 1}
    llm = LLM(
        model,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=options.requests,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt=limits,
        **reduction,
    )
    text = f"user : {placeholder('llava' if 'llava' in model.lower() else 'qwen')} what is in this image ? assistant :"

    def run(count: int, tokens: int, first: int) -> tuple[float, float, float]:
        size = SIZES.get(name, (640, 480))
        pictures = [picture(first + number, *size) for number in range(count)]
        prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for image in pictures]
        wall, used = time.perf_counter(), time.process_time()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        out = llm.generate(prompts, sampling, use_tqdm=False)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        return wall / count, used / count, len(out[0].prompt_token_ids)

    run(2, 2, 0)
    first = run(2, 1, 10)
    wall, used, prompt = run(options.requests, options.new_tokens, 20)
    return {
        "tokens of a prompt": prompt,
        "wall seconds a request": round(wall, 3),
        "CPU seconds a request": round(used, 3),
        "CPU seconds of a prompt and its first token": round(first[1], 3),
    }


if __name__ == "__main__":
    main()
