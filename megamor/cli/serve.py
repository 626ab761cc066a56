"""Serve a checkpoint over HTTP: `megamor serve --checkpoint runs/x/checkpoints/latest`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn

from megamor.errors import ConfigError, user_errors
from megamor.load import LoadedModel, load_model
from megamor.serve.engine.engine import EngineOptions, ServingEngine
from megamor.serve.engine.scheduler import POLICIES
from megamor.serve.http.server import ServerSettings, create_app
from megamor.serve.http.shutdown import DrainingServer
from megamor.serve.http.text import TextCodec

EXAMPLE = """\
example:
  megamor serve --checkpoint runs/quickstart/checkpoints/latest
  curl localhost:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 32, "stream": true}'

The interface is OpenAI's completions API; /docs describes it, /dashboard shows the engine at work, /metrics is for
Prometheus. --policy full and shrink are there to compare with. SIGTERM or Ctrl-C refuses new requests and lets the
running ones finish, a second one ends at once.
"""
END_TOKENS = ("<|endoftext|>", "</s>")
KEEP_ALIVE_SECONDS = 75
"""Longer than clients and proxies keep an idle connection, or it closes just when the next request is sent on it."""
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor.serve",
        description="Serve a checkpoint with continuous depth-wise batching.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, `latest`, a run's or an export's directory")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000, help="port, 0 for a free one (default: 8000)")
    add("--name", help="what the model is called in the interface (default: the run's, or an export's directory's)")
    add("--policy", choices=POLICIES, default="depthwise", help="how launches are put together (default: depthwise)")
    add("--hold", type=int, default=0, help="core launches between boundaries; 0 adapts to measured costs (default)")
    add("--max-resident", type=int, default=64, help="sequences at work at once (default: 64)")
    add("--chunk-size", type=int, default=128, help="prompt tokens read in one launch (default: 128)")
    add("--page-size", type=int, default=16, help="tokens of a page (default: 16)")
    add("--kv-memory", type=parse_bytes, default=2**30, metavar="SIZE", help="for keys and values (default: 1GiB)")
    add("--no-prefix-caching", action="store_true", help="read every prompt from its beginning")
    add("--no-cuda-graphs", action="store_true", help="start every kernel by itself (on a GPU)")
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add("--dtype", choices=_DTYPES, help="of weights and activations (default: bf16 on a GPU, else fp32)")
    add("--api-key-file", type=Path, metavar="FILE", help="keys that clients need, one a line")
    add("--request-timeout", type=float, default=600.0, metavar="S", help="seconds for one request (default: 600)")
    add("--drain-timeout", type=float, default=60.0, metavar="S", help="seconds to finish at the end (default: 60)")
    add("--max-queued-requests", type=int, default=1024, help="more get status 429 (default: 1024)")
    add("--max-queued-tokens", type=int, default=2**20, help="more prompt tokens get 429 (default: 1048576)")
    add("--log-level", choices=("debug", "info", "warning"), default="info", help="default: info")
    return parser.parse_args(argv)


def parse_bytes(text: str) -> int:
    """`8GiB`, `512MiB` or a number of bytes."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([KMGT]iB|B|)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB, 512MiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2]])


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys of a file, one a line; blank lines and lines that begin with # don't count.

    Raises:
        ConfigError: the file can't be read or holds none.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} can't be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line, or leave the option out")
    return keys


def build_engine(arguments: argparse.Namespace, loaded: LoadedModel) -> ServingEngine:
    """The engine of the command line's choices."""
    tokenizer = loaded.tokenizer()
    ids = [tokenizer.token_to_id(token) for token in END_TOKENS]
    options = EngineOptions(
        policy=arguments.policy,
        hold=arguments.hold,
        max_resident=arguments.max_resident,
        chunk_size=arguments.chunk_size,
        page_size=arguments.page_size,
        kv_memory=arguments.kv_memory,
        prefix_caching=not arguments.no_prefix_caching,
        cuda_graphs=not arguments.no_cuda_graphs,
        end_token=next((token for token in ids if token is not None), None),
    )
    return ServingEngine(loaded.model, options)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Returns after SIGTERM or Ctrl-C, when what was running is finished."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    keys = read_keys(arguments.api_key_file)
    on_gpu = arguments.device.startswith("cuda") if arguments.device else torch.cuda.is_available()
    dtype = _DTYPES[arguments.dtype or ("bf16" if on_gpu else "fp32")]
    loaded = load_model(arguments.checkpoint, arguments.device, dtype)
    engine = build_engine(arguments, loaded)
    settings = ServerSettings(
        model=arguments.name or loaded.name,
        max_model_len=loaded.config.model.max_seq_len,
        api_keys=keys,
        request_timeout=arguments.request_timeout,
        max_queued_requests=arguments.max_queued_requests,
        max_queued_tokens=arguments.max_queued_tokens,
    )
    app = create_app(engine, TextCodec(loaded.tokenizer()), settings)
    config = uvicorn.Config(
        app,
        arguments.host,
        arguments.port,
        log_level=arguments.log_level,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    print(f"serving {loaded.origin} as {settings.model!r}; Ctrl-C ends", file=sys.stderr)
    DrainingServer(config, app.state.server.runner, arguments.drain_timeout).run()


if __name__ == "__main__":
    main()
