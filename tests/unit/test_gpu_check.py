"""`megamor gpu-check` without a GPU: what it would do, the checks that run on a CPU, and checks that fail or hang."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megamor.bench import gpu_check
from megamor.bench.gpu_check import CHECKS, Outcome, run_check, wait_for
from megamor.cli import gpu_check as command
from tests.commands import refusal
from tests.distributed.harness import free_port, run_ranks

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_what_it_would_do(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command.main([])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(CHECKS) + 1
    assert "would check failure: rank 1 fails: its status, and how soon the others end" in said
    assert said[-1] == "verdict: no GPU"


def test_gpus_that_cannot_be_used_are_a_failure(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamor.devices.signs_of_gpus", lambda: ["a sign"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as leaving:
        command.main([])
    assert leaving.value.code == 1
    said = capsys.readouterr().out
    assert "there are GPUs (a sign)" in said
    assert said.endswith("verdict: the GPUs can't be used\n")


def test_a_check_that_fails_decides_the_verdict(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"sdpa": Outcome(True, "fine", 1.0), "failure": Outcome(False, "statuses [0, 1]", 2.0)}
    monkeypatch.setattr(gpu_check, "run_check", lambda name, *rest: outcomes[name])
    with pytest.raises(SystemExit) as leaving:
        command.main(["--device", "cpu", "--only", "sdpa,failure"])
    assert leaving.value.code == 1
    sdpa, failure, verdict = capsys.readouterr().out.splitlines()
    assert sdpa.split() == ["sdpa", "ok", "1.0", "s", "fine"]
    assert failure.split()[:2] == ["failure", "FAILED"]
    assert verdict == "verdict: failure failed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "there is no check 'nothing' on auto: give driver, pinned"),
        (["--only", "sdpa,"], "there is no check '' on auto"),
        (
            ["--only", "sdpa,driver", "--device", "cpu"],
            "there is no check 'driver' on cpu: give sdpa, loss, all",
        ),
    ],
)
def test_checks_that_do_not_exist_there_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert said in refusal(capsys, command.main, *arguments)


def test_on_a_cpu_those_run_that_can(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()
    monkeypatch.setattr(gpu_check, "run_check", lambda name, *rest: ran.append(name) or Outcome(True, "", 1.0))
    command.main(["--device", "cpu"])
    assert {*ran} == {name for name, check in CHECKS.items() if check.on_cpu}, "in threads, and so in any order"
    command.main(["--device", "cpu", "--only", "loss, sdpa"])
    assert capsys.readouterr().out.splitlines()[-1] == "verdict: 2 checks are good on cpu"


@pytest.mark.parametrize(("name", "says"), [("all-reduce", "2 ranks"), ("hsdp", "2 groups of 1 ranks")])
def test_checks_of_several_ranks(name: str, says: str) -> None:
    assert says in run_ranks(CHECKS[name].run, CPU)[0]


def test_attention_is_compared_with_fp64() -> None:
    assert "error 0.0" in gpu_check.sdpa(CPU)
    with pytest.raises(AssertionError, match=r"differ from fp64's by"):
        gpu_check.attend(CPU, lambda q, k, v: gpu_check.causal(q, k, v) * 1.05)


@pytest.mark.parametrize(
    ("name", "does", "said"),
    [
        ("all-reduce", "echo found: $RANK of $WORLD_SIZE", "0 of 2"),
        ("all-reduce", "echo found: x; echo why$RANK; exit $((3 * RANK))", "statuses [0, 3]; rank 1: found: x / why1"),
        ("all-reduce", "echo found: x; exit $((76 - 73 * RANK))", "statuses [76, 3]; rank 1: found: x"),
        ("sdpa", "exit 0", "statuses [0]; rank 0: "),
        ("sdpa", "echo warning; echo found: x; echo bye", "x"),
        ("failure", "echo injected; exit $((76 - 75 * RANK))", "rank 1 had status 1, the others ended "),
        ("failure", "echo injected; [ $RANK = 1 ] && exit 1; kill -ABRT $$", "rank 1 had status 1, the others ended "),
        ("failure", "exit $((76 - 75 * RANK))", "statuses [76, 1]; rank 1: "),
        ("failure", "echo injected; exit $RANK", "statuses [0, 1]; rank 1: injected"),
        ("failure", "echo injected; echo found: x; exit 0", "statuses [0, 0]; rank 0: injected / found: x"),
    ],
)
def test_an_outcome_is_of_all_ranks(
    name: str, does: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    outcome = run_check(name, "cpu", 0, 1)
    assert outcome.text.startswith(said)
    assert outcome.good == (not said.startswith("statuses"))


def test_processes_that_hang_or_are_left_over_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SECONDS_AFTER_FAILURE", 0.5)
    begun = time.monotonic()
    hanging = [subprocess.Popen(["sleep", "60"])]
    wait_for(hanging, begun + 0.3)
    left = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
    ends = wait_for(left, begun + 1000)
    assert [process.returncode for process in hanging + left] == [-9, -9, 1]
    assert ends[0] - ends[1] >= 0.5
    assert time.monotonic() - begun < 10


@pytest.mark.slow
def test_whole_checks() -> None:
    """In processes of their own; one that fails, as there is no kernel for packed documents on a CPU."""
    outcome = run_check("failure", "cpu", 0, free_port())
    assert outcome.good, outcome.text
    assert outcome.text.startswith("rank 1 had status 1, the others ended")
    failed = run_check("varlen", "cpu", 0, free_port())
    assert not failed.good
    assert failed.text.startswith("statuses [1]; rank 0: ")
