"""A load generator: sends requests to a server at random times and measures what its users would feel.

Definitions are the field's: TTFT, from sending to the first token; ITL, between one token's arrival and the next; TPOT,
their mean over one request, (E2EL - TTFT) / (tokens - 1); E2EL, from sending to the last token. Goodput counts the
requests per second that keep every limit given. Arrivals are a Poisson process, or all at once (rate infinite).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from rich.progress import Progress

from megamor.errors import ConfigError, DataError

LIMITS = ("ttft", "tpot", "e2el")
_QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is sent. `rate` in requests per second; prompts are `input_tokens` random ids below `vocab_size`."""

    url: str
    num_requests: int
    rate: float = math.inf
    max_concurrency: int | None = None
    input_tokens: int = 64
    output_tokens: int = 64
    vocab_size: int = 256
    temperature: float = 0.0
    seed: int = 0
    api_key: str | None = None

    def prompts(self) -> list[list[int]]:
        """The prompts, the same for a seed."""
        draw = random.Random(self.seed)
        return [draw.choices(range(self.vocab_size), k=self.input_tokens) for _ in range(self.num_requests)]

    def arrivals(self) -> list[float]:
        """Seconds after the start at which each request is sent."""
        draw, now, times = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.num_requests):
            times.append(now)
            now += 0.0 if math.isinf(self.rate) else draw.expovariate(self.rate)
        return times


@dataclass
class Record:
    """One request: seconds at which it was sent and each event with text came, or what went wrong."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """To the first token."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """To the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float:
        """Mean per token after the first."""
        return (self.e2el - self.ttft) / max(self.tokens - 1, 1)

    @property
    def itl(self) -> list[float]:
        """Between neighbouring tokens."""
        return np.diff(self.arrivals).tolist()


def _session(load: Load) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(load.url.rstrip("/") + "/", headers=headers, timeout=timeout, connector=connector)


async def served_model(load: Load) -> str:
    """Name of the model behind the URL.

    Raises:
        DataError: the server doesn't answer, or not with a model.
    """
    try:
        async with _session(load) as client, client.get("v1/models", raise_for_status=True) as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{load.url}/v1/models names no model: {type(error).__name__}: {error}") from error


async def send(load: Load) -> list[Record]:
    """Send everything; returns a record per request in the order of sending."""
    records: list[Record] = []
    gate = asyncio.Semaphore(load.max_concurrency or load.num_requests)
    async with _session(load) as client:
        with Progress(transient=True) as bar:
            task = bar.add_task("requests", total=load.num_requests)

            async def one(prompt: list[int], after: float, start: float) -> Record:
                await asyncio.sleep(max(0.0, start + after - time.perf_counter()))
                async with gate:
                    record = await _stream(client, load, prompt)
                bar.advance(task)
                return record

            start = time.perf_counter()
            work = (one(prompt, after, start) for prompt, after in zip(load.prompts(), load.arrivals(), strict=True))
            records = list(await asyncio.gather(*work))
    return records


async def _stream(client: aiohttp.ClientSession, load: Load, prompt: list[int]) -> Record:
    body = {
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": load.temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record = Record(time.perf_counter())
    try:
        async with client.post("v1/completions", json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text(errors='replace'))[:200]}"
                return record
            async for line in response.content:
                event = line.strip().removeprefix(b"data: ")
                if not event or event == b"[DONE]":
                    continue
                content = json.loads(event)
                if "error" in content:
                    record.error = content["error"]["message"]
                    return record
                if content["choices"]:
                    record.arrivals.append(time.perf_counter())
                if content.get("usage"):
                    record.tokens = content["usage"]["completion_tokens"]
    except aiohttp.ClientError as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and not record.arrivals:
        record.error = "the stream ended without a token"
    return record


def summarise(records: Sequence[Record], limits: Mapping[str, float]) -> dict[str, object]:
    """Figures of a run; `limits` [ms] by name of `LIMITS` define goodput.

    Raises:
        DataError: no request was answered.
    """
    good = [record for record in records if record.error is None]
    if not good:
        raise DataError(f"none of {len(records)} requests was answered; the first said: {records[0].error}")
    seconds = max(record.arrivals[-1] for record in good) - min(record.sent for record in records)
    kept = [r for r in good if all(1e3 * getattr(r, name) <= limit for name, limit in limits.items())]
    measures = {
        "ttft_ms": [record.ttft for record in good],
        "tpot_ms": [record.tpot for record in good if record.tokens > 1],
        "itl_ms": [gap for record in good for gap in record.itl],
        "e2el_ms": [record.e2el for record in good],
    }
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "first_error": next((record.error for record in records if record.error), None),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "goodput_per_second": len(kept) / seconds if limits else None,
        "output_tokens_per_second": sum(record.tokens for record in good) / seconds,
        **{name: _distribution(values) for name, values in measures.items() if values},
    }


def parse_limits(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:200` and the like, in milliseconds.

    Raises:
        ConfigError: of another form.
    """
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in LIMITS or not value.replace(".", "", 1).isdigit():
            raise ConfigError(f"--goodput {pair}: give NAME:MILLISECONDS with a name of {', '.join(LIMITS)}")
        limits[name] = float(value)
    return limits


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.asarray(seconds)
    quantiles = np.percentile(values, _QUANTILES)
    named = {f"p{share}": float(value) for share, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": float(values.mean()), **named}
