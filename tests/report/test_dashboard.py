"""The Streamlit app: by streamlit's own test harness, and in a real browser while a run is written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from megamor.cli import dashboard as command
from megamor.report import dashboard
from tests.commands import refusal
from tests.report.browser import BROWSER, browsing, poll
from tests.report.fixture import config_of, lines_of, write_run, write_runs, write_study

ROOT = Path(__file__).parents[2]
needs_streamlit = pytest.mark.skipif(
    util.find_spec("streamlit") is None, reason="streamlit: pip install '.[dashboard]'"
)


def app(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv(dashboard.RUNS, str(root))
    monkeypatch.setenv(dashboard.REFRESH, "60")
    shown = AppTest.from_file(dashboard.__file__, default_timeout=60).run()
    assert not shown.exception
    return shown


def open_tab(shown: Any, name: str) -> Any:
    """Choose a tab and return it."""
    shown.session_state["tab"] = name
    assert not shown.run().exception
    return next(tab for tab in shown.tabs if tab.label == name)


@needs_streamlit
def test_the_tabs_show_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "routing")
    shown = app(tmp_path, monkeypatch)
    assert [tab.label for tab in shown.tabs] == list(dashboard.TABS)
    images = {"Losses": 13, "Specifications": 1, "Efficiency": 4, "Statistics": 4}
    assert {name: len(open_tab(shown, name).get("image")) for name in images} == images
    assert "not corrected for the number of pairs" in shown.tabs[4].markdown[0].value
    assert not shown.tabs[0].get("image"), "a tab that is closed isn't drawn"
    board = open_tab(shown, "Leaderboard")
    assert board.dataframe[0].value["arm"].tolist() == ["expert-choice", "random (open gates)", "vanilla"]
    assert board.dataframe[1].value["vanilla"].tolist()[0] == "3"
    assert "router.kind" in open_tab(shown, "Specifications").dataframe[0].value["setting"].tolist()
    assert "not resolved" in open_tab(shown, "Insights").markdown[0].value
    shown.selectbox(key="metric").set_value("accuracy")
    assert open_tab(shown, "Leaderboard").dataframe[0].value.columns[2] == "accuracy"


@needs_streamlit
def test_runs_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "live", config_of("mor", 0), lines_of("mor", 0, 4), checkpoint=False)
    shown = app(tmp_path, monkeypatch)

    def tokens() -> list[str]:
        table = open_tab(shown, "Leaderboard").dataframe[1].value.to_numpy().tolist()
        return [row[1] for row in table if row[0] == "training tokens"]

    assert tokens() == ["8.2k"]
    assert "validation loss (nats/token)" not in shown.selectbox(key="metric").options
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of("mor", 0, 40)))
    assert tokens() == ["81.9k"]
    assert shown.selectbox(key="metric").options[0] == "validation loss (nats/token)"


@needs_streamlit
def test_what_cannot_be_shown_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is none" in app(tmp_path, monkeypatch).info[0].value
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").touch()
    assert "nothing is logged yet" in app(tmp_path, monkeypatch).warning[0].value


def test_a_missing_streamlit_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told = refusal(capsys, command.main, tmp_path / "nothing")
    assert "is no directory" in told or "streamlit" in told
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert "pip install 'megamor[dashboard]'" in refusal(capsys, command.main, tmp_path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@needs_streamlit
@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_the_app_in_a_browser(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_runs(root)
    port = free_port()
    words = [sys.executable, "-m", "megamor", "dashboard", str(root), "--port", str(port), "--refresh", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(words, env=environment, stdout=output, stderr=output) as server:
        try:
            poll(lambda: "started on 127.0.0.1" in log.read_text())
            with browsing(tmp_path / "profile") as browser:
                browser.look(1280, dark=True)
                browser.open(f"http://127.0.0.1:{port}")
                browser.wait("document.querySelectorAll('[role=tab]').length == 6")
                browser.wait("[...document.images].filter(i => i.complete && i.naturalWidth > 300).length > 5")
                browser.evaluate("[...document.querySelectorAll('[role=tab]')].at(-1).click()")
                browser.wait("document.body.innerText.includes('mor is better than vanilla by 0.0540')")
                with (root / "mor_seed0" / "metrics.jsonl").open("a") as file:  # which is now longer than the others
                    file.writelines(json.dumps(line) + "\n" for line in lines_of("mor", 0, 240)[126:])
                browser.wait("document.body.innerText.includes('The runs are not matched')")
                foreign = [
                    a for a in browser.requests if not a.startswith((f"http://127.0.0.1:{port}/", "data:", "about:"))
                ]
                assert foreign == []
        finally:
            server.terminate()
