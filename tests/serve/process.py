"""`megamor serve` as users run it: a checkpoint written by training, and the server in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from megamor.corpus.writer import ShardWriter
from megamor.parallel import init_world
from megamor.train import build_trainer
from tests.resume.runs import directory_of, tiny_run
from tests.serve.fake import byte_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog sleeps. " * 400
CONTEXT = 256


def trained_checkpoint(directory: Path, steps: int = 20) -> Path:
    """A tiny MoR trained on bytes of `TEXT`."""
    tokenizer = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    base = tiny_run(directory, max_steps=steps)
    with ShardWriter(directory / "data" / "train", np.dtype("<u2")) as writer:
        writer.add(tokenizer.encode(TEXT).ids)
        writer.commit()
    config = replace(
        base,
        model=replace(base.model, vocab_size=256, max_seq_len=CONTEXT),
        data=replace(base.data, tokenizer=str(directory / "tokenizer.json"), validation={}, seq_len=64),
    )
    assert build_trainer(config, init_world(config.parallel)).fit()
    return directory_of(config) / "checkpoints" / "latest"


@dataclass
class Process:
    """A running server, whose output is in `log`."""

    url: str
    popen: subprocess.Popen[bytes]
    log: Path

    def open_files(self) -> int:
        """Number of open file descriptors."""
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def memory(self) -> int:
        """Resident memory in bytes."""
        text = Path(f"/proc/{self.popen.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])  # type: ignore[index]

    def stats(self) -> dict[str, Any]:
        """The engine's statistics."""
        answer: dict[str, Any] = httpx.get(self.url + "/stats", timeout=30).json()
        return answer

    def wait_until_idle(self, seconds: float = 30.0) -> dict[str, Any]:
        """Statistics once no request runs any more; fail after `seconds`."""
        end = time.monotonic() + seconds
        while (stats := self.stats())["requests_running"] or stats["resident"] or stats["waiting"]:
            assert time.monotonic() < end, f"still running: {stats}"
            time.sleep(0.05)
        return stats


@contextmanager
def server_process(checkpoint: Path, directory: Path, *options: str, seconds: float = 60) -> Iterator[Process]:
    """Start `megamor serve` on a free port and wait until it answers."""
    log = directory / "server.log"
    command = [sys.executable, "-m", "megamor.serve", "--checkpoint", str(checkpoint), "--port", "0", *options]
    # oneDNN keeps up to 1,024 compiled shapes, which would look like a leak.
    caches = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **caches}
    with log.open("wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + seconds
        while not (found := re.search(r"running on (http://[\d.]+:\d+)", log.read_text())):
            assert popen.poll() is None and time.monotonic() < end, log.read_text()  # noqa: PT018
            time.sleep(0.1)
        yield Process(found[1], popen, log)
    finally:
        popen.kill()
        popen.wait()
