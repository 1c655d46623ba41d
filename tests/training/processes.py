"""Two processes that form a group of torch.distributed, by gloo on the CPU."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

RANKS, SECONDS = 2, 120


def on_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in two forks of this process that form a group; return both results."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = _free_port()

    def run(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        try:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS / 2))
            results.put((rank, function(rank, *arguments)))
            dist.barrier()
        except BaseException:
            results.put((rank, traceback.format_exc()))
        finally:
            dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        found: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while len(found) < RANKS:
            try:
                rank, result = results.get(timeout=1)
            except queue.Empty:
                codes = [process.exitcode for process in processes]
                assert not any(codes), f"exit codes {codes}"
                assert time.monotonic() < deadline, "a process hangs"
                continue
            assert not isinstance(result, str), f"process {rank}:\n{result}"
            found[rank] = result
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(RANKS)]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
