"""Serve a checkpoint over HTTP, with continuous depth-wise batching.

example:
  megamor serve --checkpoint runs/quickstart/checkpoints/latest
  curl localhost:8000/v1/completions -d '{"prompt": "def main():", "max_tokens": 48, "temperature": 0.5}'

The API is OpenAI's completions API. /docs describes it, /dashboard shows the engine at work, /metrics is for
Prometheus. SIGTERM or Ctrl-C refuses new requests and lets the running ones finish; a second signal exits at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megamor.cli import add_exit_options, chosen_exit, command_parser
from megamor.errors import ConfigError, user_errors
from megamor.serve.options import EngineOptions, ServerOptions, add_options, chosen

if TYPE_CHECKING:
    import torch
    from fastapi import FastAPI
    from ray.serve.deployment import Application

    from megamor.load import LoadedModel
    from megamor.serve.engine.engine import ServingEngine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of `megamor serve`."""
    parser = command_parser("serve", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, `latest`, or the directory of a run or an export")
    add("--name", help="name of the model in the API (default: the run's name, or the export's directory)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    auto = "bf16 on a GPU; on a CPU bf16 if a short measurement finds it faster, otherwise fp32"
    add("--dtype", choices=("auto", *DTYPES), default="auto", help=f"of weights and activations (default auto: {auto})")
    add_exit_options(parser)
    add("--replicas", metavar="N", help="servers behind one address, on Ray Serve: a number, or a range such as 1-4")
    add("--api-key-file", type=Path, metavar="FILE", help="keys that clients must send one of, one per line")
    add("--log-level", choices=("debug", "info", "warning"), default="info", help="default: info")
    add_options(parser, "server", ServerOptions)
    add_options(parser, "engine", EngineOptions)
    return parser.parse_args(argv)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one per line; blank lines and lines that start with # are ignored.

    Raises:
        ConfigError: the file can't be read or has no key.
    """
    if path is None:
        return ()
    try:
        # Editors on Windows put a byte-order mark before the first key.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} can't be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if unsendable := next((number for number, key in enumerate(keys, 1) if not key.isprintable()), None):
        raise ConfigError(f"--api-key-file {path}: key {unsendable} has a character that no header can have; remove it")
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no key; write one per line, or leave the option out")
    return keys


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if `port` of `host` can't be listened on, before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must be 0 to 65535"
        advice = "give another --host or --port; --port 0 picks one"
        raise ConfigError(f"can't listen on {host}, port {port} ({reason}): {advice}") from error


def build_engine(arguments: argparse.Namespace, loaded: LoadedModel) -> ServingEngine:
    """The engine that `arguments` describe."""
    from megamor.serve.engine.engine import ServingEngine

    end = loaded.codec().end_of_text
    end_token = end.id if end else None
    return ServingEngine(loaded.model, EngineOptions(**chosen(arguments, EngineOptions), end_token=end_token))


def chosen_dtype(arguments: argparse.Namespace) -> tuple[torch.dtype, str]:
    """Type of weights and activations, and why."""
    import torch

    from megamor.devices import usable_device
    from megamor.serve.engine.packed import fastest_dtype

    if arguments.dtype != "auto":
        return getattr(torch, DTYPES[arguments.dtype]), "--dtype"
    on_gpu = usable_device(arguments.device).type == "cuda"
    return (torch.bfloat16, "a GPU") if on_gpu else fastest_dtype()


def load_server(arguments: argparse.Namespace) -> FastAPI:
    """The application that `arguments` describe, with its engine."""
    # OpenMP keeps a team of threads for each thread that ever had work for one, and once there are more of them than
    # cores, they sleep between operations instead of waiting awake, which costs a server a quarter of its speed. So
    # the team that loads the model ends with this thread, before the engine's thread has its own.
    with ThreadPoolExecutor(1, "load") as loader:
        return loader.submit(loaded_server, arguments).result()


def loaded_server(arguments: argparse.Namespace) -> FastAPI:
    """As `load_server`, in the thread that calls it."""
    # torch reads it when it first allocates. Weights in huge pages are read 5 to 10 % faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from megamor.checkpoint.layout import CHAT_TEMPLATE_FILE
    from megamor.load import load_model
    from megamor.serve.http.chat import ChatTemplate
    from megamor.serve.http.server import create_app

    rule = chosen_exit(arguments)
    dtype, reason = chosen_dtype(arguments)
    loaded = load_model(arguments.checkpoint, arguments.device, dtype)
    loaded.model.set_exit(rule)
    engine = build_engine(arguments, loaded)
    name = arguments.name or loaded.name
    suffix = f" with exit {rule}" if rule else ""
    weights = next(short for short, long in DTYPES.items() if getattr(torch, long) == dtype)
    packing = "stacked" if loaded.model.embed.weight.is_cuda else "prepacked"
    products = f"as stored ({unpacked})" if (unpacked := engine.unpacked) else packing
    attention = f"; attention by torch ({engine.kernels})" if isinstance(engine.kernels, str) and not unpacked else ""
    print(f"weights in {weights} ({reason}), {products}{attention}", file=sys.stderr)
    print(f"serving {loaded.origin} as {name!r}{suffix}; Ctrl-C stops", file=sys.stderr)
    codec = loaded.codec()
    chat = ChatTemplate.read(loaded.directory / CHAT_TEMPLATE_FILE, codec)
    del loaded  # with the weights that are stored anew
    return create_app(engine, codec, name, server_options(arguments), chat)


def server_options(arguments: argparse.Namespace) -> ServerOptions:
    """The server's part of `arguments`."""
    return ServerOptions(**chosen(arguments, ServerOptions), api_keys=read_keys(arguments.api_key_file))


def replicated(arguments: argparse.Namespace) -> Application:
    """Replicas of the server that `arguments` describe, for Ray Serve."""
    from megamor.devices import usable_device

    try:
        from megamor.serve.replicas import Scale, application
    except ImportError as error:
        raise ConfigError(f"--replicas needs Ray ({error}): pip install 'megamor[replicas]'") from error
    gpus = int(usable_device(arguments.device).type == "cuda")
    ongoing = 2 * arguments.max_resident  # as many again may wait, so that a step never lacks rows
    build = partial(load_server, arguments)
    return application(build, Scale.parse(arguments.replicas), server_options(arguments), ongoing, gpus)


def deployment(options: dict[str, str]) -> Application:
    """For `serve run` and `serve deploy`: import path megamor.cli.serve:deployment, with the options of this command.

    `{"checkpoint": "/models/mor", "replicas": "2-8", "max-resident": "128"}` are --checkpoint, --replicas ….
    """
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return replicated(parse_arguments(["--replicas", "1", *words]))


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then return when the running requests have finished."""
    arguments = parse_arguments(argv)
    chosen_exit(arguments)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = server_options(arguments)
    check_port(options.host, options.port)
    if arguments.replicas:
        app = replicated(arguments)
        from megamor.serve import replicas

        replicas.run(app, options)
        return
    from megamor.serve.http.server import serve

    serve(load_server(arguments), arguments.log_level)


if __name__ == "__main__":
    main()
