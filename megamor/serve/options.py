"""Settings of the engine and the server. Each is declared once, here, with its default and its line of help.

The module imports neither torch nor the web framework, so that `megamor serve --help` is fast.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from megamor.errors import ConfigError

Policy = Literal["full", "shrink", "depthwise"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
GPU_SHARE, CPU_BYTES = 0.8, 2**30
"""Memory for keys and values by default: of what a GPU has free once the model is loaded, and on a CPU."""
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `8GiB`, `512MiB` or a plain number."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([KMGT]iB|B|)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB, 512MiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_share(text: str) -> float:
    """A fraction below 1 from `80%`, or bytes as in `parse_bytes`."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)%", text)
    if match and not 0 < float(match[1]) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0% and 100%")
    return float(match[1]) / 100 if match else parse_bytes(text)


KV_SIZE = {"type": parse_share, "metavar": "SIZE"}
SECONDS = {"metavar": "SECONDS"}


@dataclass(frozen=True)
class EngineOptions:
    """How the engine schedules and what memory it may use.

    `kv_memory` is in bytes, or a fraction below 1 of what a GPU has free (0: `GPU_SHARE`; on a CPU `CPU_BYTES`).

    The fields without a line of help are not on the command line. `num_pages` by pool replaces what `kv_memory` would
    give; `max_rows` bounds the tokens in flight (default: room for every resident and two prompt chunks); `end_token`
    ends a continuation unless the request ignores it; `synchronize` waits for the GPU after each batch, so that
    measured seconds belong to that batch; `read_late` queues the next batches before it reads the tokens that an exit
    has drawn (default: on a GPU).

    Raises:
        ConfigError: a value is out of range.
    """

    policy: Annotated[Policy, "how batches are formed; full and shrink are baselines to compare with"] = "depthwise"
    hold: Annotated[int, "core batches between two boundaries; 0 picks the best for the measured costs"] = 0
    max_resident: Annotated[int, "sequences decoded at the same time"] = 64
    chunk_size: Annotated[int, "prompt tokens of one sequence read together"] = 128
    prefill_budget: Annotated[int, "prompt tokens that enter in one batch, beside decoding; 0: no limit"] = 128
    page_size: Annotated[int, "tokens per page of the KV cache"] = 16
    kv_memory: Annotated[float, "memory for keys and values: 8GiB, or 80% of what a GPU has free", KV_SIZE] = 0.0
    prefix_caching: Annotated[bool, "read every prompt from its first token"] = True
    cuda_graphs: Annotated[bool, "launch kernels one by one on a GPU"] = True
    prepacked: Annotated[bool, "multiply with the weights as they are stored: slower, less memory on a CPU"] = True
    num_pages: dict[str, int] | None = None
    max_rows: int | None = None
    end_token: int | None = None
    synchronize: bool = False
    read_late: bool | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy = {self.policy} is not one of {', '.join(POLICIES)}")
        positive = ("max_resident", "chunk_size", "page_size")
        for name, least in (("hold", 0), ("prefill_budget", 0), ("kv_memory", 0), *((name, 1) for name in positive)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least {least}")

    @property
    def num_slots(self) -> int:
        """Tokens that may be in flight at once."""
        return self.max_rows or self.max_resident + 2 * self.chunk_size


@dataclass(frozen=True)
class ServerOptions:
    """What the HTTP server accepts and how long it waits. Without `api_keys`, any client may send requests."""

    host: Annotated[str, "address to listen on; the default accepts connections from this machine only"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 picks a free one"] = 8000
    request_timeout: Annotated[float, "time limit for one request", SECONDS] = 600.0
    drain_timeout: Annotated[float, "time for running requests to finish at shutdown", SECONDS] = 60.0
    max_queued_requests: Annotated[int, "sequences (prompts times n) that may wait; more get status 429"] = 1024
    max_queued_tokens: Annotated[int, "prompt tokens that may wait; more are answered with status 429"] = 2**20
    cors_origins: Annotated[str, "origins whose web pages may send requests: URLs with commas between them, or *"] = ""
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 2**24


def add_options(parser: argparse.ArgumentParser, title: str, options: type) -> None:
    """Add an argument to `parser`, in a group of its own, for every field of `options` with a line of help.

    `--request-timeout` sets `request_timeout`; a field that is True by default gets `--no-...` instead.
    """
    group = parser.add_argument_group(title)
    for name, hint in get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        kind, text, *extra = get_args(hint)
        default, flag = getattr(options, name), name.replace("_", "-")
        if kind is bool:
            group.add_argument(f"--no-{flag}", dest=name, action="store_false", help=text)
            continue
        settings: dict[str, Any] = {"choices": POLICIES} if kind is Policy else {"type": kind, **dict(*extra)}
        shown = f"{default:g}" if kind is float else default if default != "" else "none"
        if KV_SIZE in extra:
            shown = f"{GPU_SHARE:.0%}, {CPU_BYTES // 2**30}GiB on a CPU"
        help_text = f"{text} (default: {shown})".replace("%", "%%")
        group.add_argument(f"--{flag}", default=default, help=help_text, **settings)


def chosen(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The values in `arguments` of those fields of `options` that are on the command line."""
    return {name: value for name, value in vars(arguments).items() if name in options.__annotations__}
