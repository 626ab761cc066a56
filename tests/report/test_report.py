"""The HTML page of `megamor report`, in a real browser too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megamor.cli import report
from megamor.report import content
from megamor.report.build import build_page
from megamor.report.runs import read_results
from tests.commands import refusal, status
from tests.report.browser import BROWSER, browsing
from tests.report.fixture import LABELS, config_of, lines_of, write_run, write_study
from tests.report.test_figures import Reader

SECTIONS = ["Matched table", "Loss", "Leaderboard: validation loss", "Efficiency", "Depths over training", "Routers",
            "Learning rates", "Specifications"]  # fmt: skip


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_study_has_every_section(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = write_study(tmp_path / "s")
    (study / "results.json").rename(study / "routing.json")
    assert status(report.main, study / "routing.json") == 0
    assert capsys.readouterr().out == f"wrote {study / 'report.html'}\n"
    page = (study / "report.html").read_text()
    assert headings(page) == SECTIONS
    assert Reader(page).open == []
    titles = re.findall(r'aria-label="([^"]+)"', page)
    assert len(titles) == len(set(titles)) == page.count("<svg ")
    for title in ("Validation loss against executed training FLOPs", "Paired differences, 95 % intervals",
                  "Tuning of the learning rate", "Values of the seeds", "Relative to the largest"):  # fmt: skip
        assert title in titles
    for label in ("tokens seen", "training time (s)", "loss (nats/token)", "learning rate", "optimizer step"):
        assert f">{label}</text>" in page
    for text in ("Is learned routing better than random routing?",
                 "expert-choice against random (open gates): not resolved.",
                 "Behind the floor trigram (3.2000 nats/token)",
                 "megamor study run studies/routing.yaml",
                 "arXiv 2507.10524", "settings that are the same"):  # fmt: skip
        assert text in page
    assert "lr_at_edge" not in page


def test_a_single_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", config_of("mor", 0), lines_of("mor", 0))
    page = build_page(read_results([run])).render()
    assert headings(page) == ["Figures of the runs", "Loss", "Depths over training", "Routers", "Specifications"]


def test_runs_of_several_stages(tmp_path: Path) -> None:
    lines = lines_of("mor", 0)
    for line in lines:
        if "depth/1" in line:
            line |= {f"depth/stage_{i}/{d}": 0.5 for i in (0, 1) for d in (1, 2)} | {"routing/stage_0/mean_depth": 1.5}
    results = read_results([write_run(tmp_path / "x", config_of("mor", 0), lines)])
    titles = [re.findall(r'aria-label="([^"]+)"', figure)[0] for figure in content.depth_figures(results)]
    assert titles == ["x", "x, stage_0", "x, stage_1"]
    titles = [re.findall(r'aria-label="([^"]+)"', figure)[0] for figure in content.router_figures(results)]
    assert "routing/stage_0/mean_depth" in titles


def test_a_law_is_drawn_for_each_budget(tmp_path: Path) -> None:
    root = write_study(tmp_path / "s", law={"mor": {"phi": 0.4, "low": 0.3, "high": 0.5}}, differences=[])
    names = {"vanilla": "w1_single", "mor": "w1_loop", "random": "w2_loop"}
    study = json.loads((root / "results.json").read_text())
    for one in (*study["arms"], *study["runs"]):
        key = "name" if "name" in one else "arm"
        one[key] = names[one[key]]
    study["runs"] += [{**run, "budget": 6e12} for run in study["runs"]]
    (root / "results.json").write_text(json.dumps(study))
    (figure,) = content.law_figures(read_results([root]))
    for label in ("single, 3.00TFLOPs", "loop, 3.00TFLOPs", "loop, 6.00TFLOPs", "validation loss (nats/token)"):
        assert f">{label}</text>" in figure


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Nothing is wider than the screen, all text can be read, colours follow the preference, nothing is fetched."""
    page = tmp_path / "page.html"
    build_page(read_results([write_study(tmp_path / "s")])).write(page)
    wide = "document.documentElement.scrollWidth"
    overflowing = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + e.className).join()"
    )
    smallest = (
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => "
        "parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width / "
        "t.ownerSVGElement.viewBox.baseVal.width))"
    )
    outside = (
        "[...document.querySelectorAll('figure svg text')].filter(t => { const a = t.getBoundingClientRect(), "
        "b = t.ownerSVGElement.getBoundingClientRect(); return a.right > b.right + 2 || a.left < b.left - 2 })"
        ".map(t => t.textContent).join()"
    )
    label = "[...document.querySelectorAll('figure svg text')].find(t => t.textContent == 'tokens seen')"
    ink = f"getComputedStyle({label}).fill"
    with browsing(tmp_path / "profile") as browser:
        seen = {}
        for width in (1280, 400):
            for dark in (False, True):
                browser.look(width, dark=dark)
                browser.open(page.as_uri())
                browser.wait("document.querySelectorAll('figure svg').length > 20")
                assert browser.evaluate(wide) == width
                assert browser.evaluate(overflowing) == ""
                assert browser.evaluate(outside) == ""
                assert browser.evaluate(smallest) >= 10, "pixels"
                seen[width, dark] = browser.evaluate(ink)
        assert seen[400, False] == seen[1280, False] == "rgb(28, 39, 51)"
        assert seen[400, True] == seen[1280, True] == "rgb(230, 235, 240)"
        asked = [address for address in browser.requests if not address.startswith(("file:", "data:"))]
        assert asked == []
        browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert set(LABELS.values()) <= set(re.findall(r">([^<]+)</", page.read_text()))


POINTS = (
    ("own", None, 3.0, 2e6),
    ("at most n recursions", 1, 3.4, 1e6),
    ("at most n recursions", 2, 3.1, 1.5e6),
    ("exit: entropy", 1, 3.2, 1e6),
)
SWEEP = {
    "schema": "megamor-sweep/1",
    "checkpoint": "runs/x",
    "left_out": ["exit kl: no recursion"],
    "entries": [dict(zip(("label", "value", "loss", "flops_per_token"), point, strict=True)) for point in POINTS],
}
STAGE = {"depths": [0, 30, 70], "correlations": {"position": {"value": -0.2, "low": -0.3, "high": -0.1}},
         "classes": {}, "curves": {}}  # fmt: skip
ANALYSIS = {"schema": "megamor-analysis/1", "checkpoint": {"name": "x"}, "notes": ["One document."],
            "modes": {"causal": {"stages": {"stage": STAGE}}}}  # fmt: skip


def test_sweeps_and_analyses_are_added(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "x", config_of("vanilla", 0), lines_of("vanilla", 0, 40))
    files = [tmp_path / "sweep.json", tmp_path / "analysis.json"]
    for file, content_of in zip(files, (SWEEP, ANALYSIS), strict=True):
        file.write_text(json.dumps(content_of))
    assert status(report.main, run, *files, "--output", tmp_path / "a" / "page.html") == 0
    page = (tmp_path / "a" / "page.html").read_text()
    assert headings(page)[-2:] == ["Other depths than its own: runs/x", "What the router of x has learned: stage"]
    for text in ("at most n recursions", "exit: entropy", "Left out: exit kl: no recursion", "One document."):
        assert text in page
    for wrong, told in (("[1]", "contains a list"), ("{}", "has the schema None"), ("{", "can't read")):
        files[0].write_text(wrong)
        assert told in refusal(capsys, report.main, run, files[0])
    assert "no run or study" in refusal(capsys, report.main, files[1])
