"""`megamor bench gpu` without a GPU: every case with a tiny model, and every way in which a case can end."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.bench import gpu, tables
from megamor.bench.cases import SIZES, case_of_size
from megamor.bench.gpu import Task, compare, fitting_micro_batch, goals, measure_all
from megamor.bench.measure import make_documents, within_memory
from megamor.cli import bench
from megamor.errors import ConfigError
from megamor.plan.memory import step_memory
from tests.commands import refusal

HELPER = Path(tempfile.gettempdir(), f"helper_{os.getpid()}")
TINY = [*gpu.toy_settings()]


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        print("before the end")
        raise error

    return work


def with_a_helper() -> dict[str, Any]:
    """Hangs, and so does a process that it started."""
    if (helper := os.fork()) == 0:
        time.sleep(600)
    HELPER.write_text(str(helper))
    time.sleep(600)
    return {}


ENDS: dict[str, tuple[Callable[[], Any], str]] = {
    "error": (raising(RuntimeError("broken kernel")), "RuntimeError: broken kernel"),
    "sticky": (raising(RuntimeError("CUDA error: device-side assert triggered")), "device-side assert"),
    "memory": (raising(torch.OutOfMemoryError("CUDA out of memory")), "OutOfMemoryError: CUDA out of memory"),
    "leaves": (raising(SystemExit(2)), "SystemExit: 2"),
    "exits": (lambda: os._exit(3), "the process ended with status 3"),
    "segfault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the process ended with SIGSEGV"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ended with SIGKILL"),
    "hangs": (with_a_helper, "no result within 1 s"),
}


def test_every_end_of_a_case_is_recorded_and_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    report: dict[str, Any] = {}
    saved: list[int] = []
    planned = [Task("1b", name, work) for name, (work, _) in ENDS.items()]
    planned += [Task("1b", "long", dict, seconds=1e9), Task("1b", "last", lambda: {"pid": os.getpid()})]
    results = measure_all(
        planned, time.monotonic() + 30, report, lambda: saved.append(len(report["settings"][0]["cases"]))
    )
    for result, (name, (_, said)) in zip(results, ENDS.items(), strict=False):
        assert result["name"] == name
        assert said in result["error"]
    assert "before the end" in results[0]["log"]
    assert "takes about" in results[-2]["skipped"]
    assert results[-1]["pid"] not in (os.getpid(), None)
    assert saved == list(range(1, len(planned) + 1)), "written after every case"
    helper = Path("/proc", HELPER.read_text(), "stat")
    HELPER.unlink()
    assert not helper.exists() or helper.read_text().split()[2] == "Z", "what it had started is killed with it"


def test_nothing_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = measure_all([Task("1b", "x", dict, seconds=5)], time.monotonic() + 4, {}, lambda: None)
    assert result["skipped"] == "takes about 5 s, 4 s are left"
    monkeypatch.setattr(gpu, "LIMIT", 5.0)
    late = Task("1b", "x", lambda: time.sleep(600) or {})
    (result,) = measure_all([late], time.monotonic() + 1, {}, lambda: None)
    assert result["error"] == "no result within 1 s"


def test_every_case_with_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu_toy.json"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which it doesn't ask for
    bench.main(["gpu", "--toy", "--json", str(out)])
    report = json.loads(out.read_text())
    cases = report["settings"][0]["cases"]
    assert all(case["tokens_per_second"] > 0 for case in cases)
    decisive = [f"{size} {name}" for size in SIZES for name in ("vanilla", "mor3_expert")]
    assert [case["label"] for case in cases[:6]] == decisive
    assert {case["variant"] for case in cases} >= {"", "documents", "eager", "single", "whole trainer"}
    assert all(case["accumulation"] == 4 for case in cases if case["name"] != "serving")
    by_label = {case["label"]: case for case in cases}
    plain, masked = by_label["360m vanilla"], by_label["360m vanilla, documents"]
    assert masked["training_flops"] < plain["training_flops"], "documents have fewer pairs"
    assert by_label["360m mor3_expert"]["flops_allow"] > 1
    assert by_label["360m mor3_expert"]["mean_depth"] == pytest.approx((32 + 21 + 10) / 32)
    said = capsys.readouterr().out
    assert "say nothing about a GPU" in said
    assert "not measured" in said
    shown = tables.regenerate("<!-- generated: bench-gpu -->\n<!-- /generated -->\n", tmp_path)
    assert "| 360m mor3_expert, eager | 4 × 2 |" in shown
    assert "None yet" in tables.regenerate("<!-- generated: bench-gpu -->\n<!-- /generated -->\n", tmp_path / "none")


def test_the_named_cases_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu_toy.json"
    bench.main(["gpu", "--toy", "--cases", "135m vanilla", "360m vanilla, eager", "--json", str(out)])
    cases = json.loads(out.read_text())["settings"][0]["cases"]
    assert [case["label"] for case in cases] == ["135m vanilla", "360m vanilla, eager"]
    said = refusal(capsys, bench.main, "gpu", "--toy", "--cases", "135m")
    assert "unknown case '135m'; choose from 360m vanilla, 360m mor3_expert," in said


def test_a_gpu_that_cannot_be_used_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "probe", raising(RuntimeError("a kernel failed")))
    said = refusal(capsys, bench.main, "gpu")
    assert "a kernel failed" in said
    assert "before the end" in said, "the output of the process"
    monkeypatch.setattr(gpu, "probe", raising(ConfigError("the driver is too old")))
    said = refusal(capsys, bench.main, "gpu")
    assert "the driver is too old" in said
    assert said.count("\n") == 1
    for minutes in ("0", "-1", "nan"):
        assert f"--minutes is {float(minutes)}" in refusal(capsys, bench.main, "gpu", "--minutes", minutes)


def test_ctrl_c_ends_the_case_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)
        return {}

    def interrupted(process: Any, seconds: float) -> None:
        monkeypatch.undo()
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("multiprocessing.process.BaseProcess.join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.isolated(work, 600)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_goals_by_hand() -> None:
    def case(name: str, tokens: float, mfu: float, again: int = 0) -> dict[str, Any]:
        known = {"size": "360m", "name": name, "variant": "", "label": f"360m {name}", "compiled": True}
        measured = {"tokens_per_second": tokens, "training_flops": 8.0, "batch_size": 2, "mfu": mfu}
        return known | measured | {"recompilations_after_warmup": again, "mean_depth": None}

    cases = [case("vanilla", 100.0, 0.50), case("mor3_expert", 134.0, 0.4, again=1)]
    compare(cases)
    assert cases[1]["over_vanilla"] == pytest.approx(1.34)
    met = {row["goal"]: row["met"] for row in goals(cases)}
    assert met["360m vanilla: MFU ≥ 50%"] == "yes"
    assert met["360m mor3_expert: times vanilla's tokens/s ≥ 1.35"] == "no"
    assert len(met) == 3, "nothing of other cases"
    assert met["recompilations after the warm-up: 0"] == "no"


def test_the_largest_micro_batch_that_fits() -> None:
    case = case_of_size("360m", "mor3_expert", gpu.BASE)
    found = fitting_micro_batch(case, 80e9)
    sizes = [step_memory(case.config(size), 1).total / 80e9 for size in (found, 2 * found)]
    assert sizes[0] < 0.92 < sizes[1] or found == 32
    assert fitting_micro_batch(case, 1e9) == 1


def test_documents_are_as_long_as_web_pages() -> None:
    config = case_of_size("360m", "vanilla").config(16)
    documents = make_documents(config)
    assert documents.shape == (16, 2048)
    assert (documents.flatten().diff() >= 0).all()
    assert 300 < documents.numel() / len(documents.unique()) < 1500


def test_what_takes_most_of_a_step() -> None:
    case = case_of_size("360m", "vanilla", (*gpu.BASE, *TINY))
    found = gpu.isolated(partial(gpu.train_case, case, toy=True, profile=True), 60)["kernels"]
    assert found == sorted(found, key=lambda kernel: -kernel["seconds"])
    assert any("mm" in kernel["name"] for kernel in found)


def test_memory_that_runs_out_halves_the_micro_batch() -> None:
    def run(micro_batch: int) -> list[dict[str, Any]]:
        if micro_batch > 4:
            raise torch.OutOfMemoryError("full")
        return [{"micro_batch": micro_batch}]

    assert within_memory(run, 16, torch.device("cpu")) == [{"micro_batch": 4, "out_of_memory_at": [16, 8]}]
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(lambda _: run(5), 3, torch.device("cpu"))


def test_serving_beside_vanilla(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    models = ["--config", "configs/bench/serve_360m.yaml", "--vanilla", "configs/bench/serve_360m_vanilla.yaml"]
    arguments = ["--residents", "2,4", "--turns", "2", "--prompt-tokens", "3", "--new-tokens", "4-9", "--hold", "0"]
    policies = ["--kv-policies", "recursion_wise,share_first", "--device", "cpu", "--json", str(out)]
    bench.main(["serve", *models, *arguments, *policies, *TINY])
    settings = json.loads(out.read_text())["settings"]
    found = [(setting["config"]["recursion"]["kv_policy"], setting["workload"]["residents"]) for setting in settings]
    assert found == [(policy, count) for policy in ("recursion_wise", "share_first") for count in (2, 4)]
    for setting in settings:
        cases = {case["case"]: case for case in setting["cases"]}
        assert list(cases) == ["full", "shrink", "depthwise", "vanilla", "depthwise, equal KV bytes"]
        assert 1 < cases["depthwise"]["mean_depth"] < 3
        assert cases["depthwise"]["over_vanilla"] > 0
        assert cases["depthwise"]["hold"] in (1, 2, 3), "as the costs of the first turns suggest"
        assert cases["vanilla"]["hold"] == 1
        assert cases["vanilla"]["of_prediction"] is None
