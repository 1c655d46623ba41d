"""The OpenAI server with a reduced model, under fifty requests at once."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.helpers import written_models
from tests.helpers.written_models import picture
from vlmfast.vllm import KEY, server_arguments

ROOT = Path(__file__).parents[2]
METHODS = (None, "even:8", "DivPrune(keep=8, centered=True)", "visionzip:12+4", "random:0.2")
REQUESTS = 50


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = written_models.write("qwen3_vl", tmp_path_factory.mktemp("models"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "server.log"
    options = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--block-size",
        "32",
        "--served-model-name",
        "tiny",
    ]
    limits = [
        "--limit-mm-per-prompt",
        '{"image": 2, "video": 0}',
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--trust-request-mm-kwargs",
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options, *limits]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *server_arguments("visionzip:14+4", str(folder))],
            stdout=file,
            stderr=file,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: Any, log: Path) -> None:
    for _ in range(400):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


def _url(image: Image.Image | bytes) -> str:
    data = io.BytesIO()
    if isinstance(image, bytes):
        data.write(image)
    else:
        image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


async def _ask(client: openai.AsyncOpenAI, number: int, broken: bool = False) -> Any:
    """Ask with no, one or two of five pictures of several sizes, and one of five methods."""
    pictures = [picture(seed, 64 * (2 + seed % 3), 64 * (1 + seed % 4)) for seed in (number % 5, (number + 1) % 5)]
    urls = [_url(image) for image in pictures[: number % 3]]
    if broken:
        urls = [_url(b"no picture")]
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": f"what is w{number % 7} ?"})
    method = METHODS[number % len(METHODS)]
    return await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        extra_body={"ignore_eos": True} | ({"mm_processor_kwargs": {KEY: method}} if method else {}),
    )


def test_fifty_requests_at_once(server: str):
    """One broken picture fails alone; all others get what they get when they are asked one after the other."""

    async def run() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=server, api_key="none", max_retries=0, timeout=300) as client:
            asked = [_ask(client, number, broken=number == 17) for number in range(REQUESTS)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            return found, [await _ask(client, number) for number in range(REQUESTS) if number != 17]

    found, alone = asyncio.run(run())
    failed = found.pop(17)
    assert isinstance(failed, openai.BadRequestError), failed
    assert len(found) == len(alone) == REQUESTS - 1
    for number, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert not isinstance(one, BaseException), (number, one)
        assert one.usage.prompt_tokens == other.usage.prompt_tokens, number
        assert one.usage.completion_tokens == 8
        assert one.choices[0].message.content == other.choices[0].message.content, number


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fastv:2:0.5", "cuts between layers"),
        ("os.system('true')", "must name one of"),
        ("even", "even is written even:KEEP"),
    ],
)
def test_a_method_that_cannot_be_served_is_a_bad_request(server: str, method: str, message: str):
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=300)
    content: list[Any] = [{"type": "image_url", "image_url": {"url": _url(picture(0, 128, 128))}}]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            max_tokens=2,
            extra_body={"mm_processor_kwargs": {KEY: method}},
        )
