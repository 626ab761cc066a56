"""Show runs and studies in a browser, following those that are still going on. Needs: pip install 'megamor[dashboard]'

examples:
  megamor dashboard runs/
  megamor dashboard runs/studies/routing --port 9000 --refresh 60

The app is served to this machine only (127.0.0.1), and sends nothing anywhere. From another machine:
ssh -L 8501:127.0.0.1:8501 HOST
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser, positive
from megamor.errors import ConfigError, user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by the app's."""
    parser = command_parser("dashboard", __doc__)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="directory of runs (default: runs)")
    parser.add_argument("--port", type=int, default=8501, help="default: 8501")
    parser.add_argument(
        "--refresh", type=positive, default=10, metavar="S", help="seconds between updates (default: 10)"
    )
    arguments = parser.parse_args(argv)
    from importlib.util import find_spec

    if find_spec("streamlit") is None:
        raise ConfigError("the dashboard needs streamlit, which isn't installed: pip install 'megamor[dashboard]'")
    if not arguments.runs.is_dir():
        raise ConfigError(f"{arguments.runs} is no directory; give one with runs")
    from megamor.report import dashboard

    options = {"address": "127.0.0.1", "port": arguments.port, "headless": "true", "fileWatcherType": "none"}
    flags = [f"--server.{name}={value}" for name, value in options.items()]
    flags += ["--browser.gatherUsageStats=false", "--client.toolbarMode=minimal"]
    where = {dashboard.RUNS: str(arguments.runs.resolve()), dashboard.REFRESH: str(arguments.refresh)}
    print(f"http://127.0.0.1:{arguments.port}", flush=True)
    command = [sys.executable, "-m", "streamlit", "run", dashboard.__file__, *flags]
    os.execve(sys.executable, command, {**os.environ, **where})
