"""What `train.deterministic` promises: on the same GPU, a resumed run is bitwise the uninterrupted one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megamor.config import Config, ParallelConfig, RouterConfig, config_to_dict
from tests.resume.runs import EXPERT_CHOICE, LOSS_FREE, assert_same_run, named, tiny_run, trace, until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def pretrain(config: Config) -> None:
    """Launch a run in a process of its own: cuBLAS reads its settings when it starts."""
    path = Path(config.run.dir, f"{config.run.name}.yaml")
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    command = [sys.executable, "-m", "megamor", "pretrain", "--config", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("router", [EXPERT_CHOICE, LOSS_FREE], ids=["expert_choice", "token_choice"])
def test_a_deterministic_run_resumes_bitwise(
    tmp_path: Path, router: RouterConfig, precision: str, compiled: bool
) -> None:
    settings = {"deterministic": True, "precision": precision, "compile": compiled, "eval_every": 4}
    straight = replace(tiny_run(tmp_path, **settings), router=router, parallel=ParallelConfig("fsdp2"))
    stopped = named(straight, "stopped")
    pretrain(straight)
    pretrain(until(stopped, 3))
    pretrain(stopped)
    assert_same_run(trace(straight), trace(stopped))
