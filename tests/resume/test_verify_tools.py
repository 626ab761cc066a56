"""megamor verify-checkpoint and megamor verify-resume: the faults that they find, and their exit statuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamor.checkpoint import iterate_state
from megamor.checkpoint.manifest import create_manifest, manifest_json
from megamor.cli import verify_checkpoint, verify_resume
from megamor.config import CheckpointConfig, Config, config_to_yaml
from megamor.ranks import Ranks
from tests.commands import flip_bit, refusal, status
from tests.distributed.runs import stored_tensors
from tests.resume.runs import LOSS_FREE, directory_of, fit, tiny_run

verify = partial(status, verify_checkpoint.main)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with checkpoints of four and of eight steps."""
    config = tiny_run(tmp_path_factory.mktemp("verified"), "fsdp2")
    config = replace(config, router=LOSS_FREE, checkpoint=CheckpointConfig(every_steps=4))
    assert all(fit(config))
    return config


@pytest.fixture
def checkpoint(run: Config, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(directory_of(run) / "checkpoints" / "step_00000008", tmp_path / "step_00000008"))


def test_whole_ones_pass(run: Config, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    root = directory_of(run)
    for path in (checkpoint, root, root / "checkpoints", root / "checkpoints" / "latest"):
        assert verify(path) == verify(path, "--quick") == 0
    capsys.readouterr()
    assert verify(root, "--all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/", 1)[1] for line in lines] == ["step_00000004: whole", "step_00000008: whole"]


@pytest.mark.promise("R3")
def test_every_fault_is_listed(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    (checkpoint / "rng" / "rank_00001.pt").unlink()
    flip_bit(checkpoint / "state" / "__0_0.distcp", -1)
    (checkpoint / "trainer.json").write_text(
        (checkpoint / "trainer.json").read_text().replace('"step": 8', '"step": 7')
    )
    assert verify(checkpoint) == 2
    found = capsys.readouterr().out
    for fault in (
        "rank_00001.pt is missing\n",
        "__0_0.distcp has changed since it was written",
        "trainer.json has changed since it was written",
        "named after step 8, but trainer.json says step 7",
        "rank_00001.pt is missing, though 2 ranks saved the checkpoint",
    ):
        assert fault in found
    assert "5 faults" in found
    assert verify(checkpoint, "--quick") == 2
    assert "__0_0" not in capsys.readouterr().out


@pytest.mark.promise("R10")
def test_state_of_another_model_is_found_though_every_file_is_whole(
    checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    tensors = stored_tensors(checkpoint)
    tensors["model.head.weight"] = tensors["model.embed.weight"].clone()  # tied weights stored twice
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    tensors["optimizer.state.embed.weight.exp_avg"][0, 0] = float("nan")
    del tensors["optimizer.state.embed.weight.step"]
    shutil.rmtree(checkpoint / "state")
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(checkpoint / "state"), no_dist=True)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(manifest_json(create_manifest(checkpoint, Ranks())))
    assert verify(checkpoint) == 2
    found = capsys.readouterr().out
    for fault in (
        "model.head.weight (128, 32) is not in the model",
        "model.norm.weight is (31,) instead of (32,)",
        "optimizer.state.embed.weight.exp_avg has values that are not finite",
        "optimizer.state.embed.weight.step () is missing",
        "unique parameters are stored, but the configuration has",
    ):
        assert fault in found
    assert "5 faults" in found


def test_state_is_read_in_batches(checkpoint: Path) -> None:
    whole = stored_tensors(checkpoint)
    in_parts = dict(iterate_state(checkpoint, batch_bytes=1000))
    assert in_parts.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in in_parts.items())


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "there is no checkpoint at" in refusal(capsys, verify_checkpoint.main, tmp_path / "nowhere")


@pytest.mark.promise("R1")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_verify_resume_of_a_run(run: Config, tmp_path: Path, processes: int, capfd: pytest.CaptureFixture) -> None:
    file, work = tmp_path / "run.yaml", tmp_path / "work"
    file.write_text(config_to_yaml(run))
    arguments = ["--config", str(file), "--steps", "2", "--processes", str(processes), "--dir", str(work)]
    verify_resume.main([*arguments, "checkpoint.asynchronous=true"])
    assert "2 steps and 1 + 1 steps are the same to the last bit" in capfd.readouterr().out
    assert list(work.iterdir()) == []


def test_verify_resume_says_what_differs(tmp_path: Path) -> None:
    straight = [{"step": 1, "train/loss": 2.0, "time": 1.0}, {"step": 2, "train/loss": 1.5, "throughput/x": 3}]
    resumed = [{"step": 1, "train/loss": 2.0, "time": 9.0}, {"step": 2, "train/loss": 1.25, "throughput/x": 4}]
    assert list(verify_resume.differing_metrics(straight, straight)) == []
    assert list(verify_resume.differing_metrics(straight, resumed)) == ["step 2: train/loss is 1.25 instead of 1.5"]
    assert list(verify_resume.differing_metrics(straight, resumed[:1])) == ["step 2 is missing"]
    ones, other = {"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.tensor([1.0, 1.5]), "b": torch.ones(1)}
    assert list(verify_resume.differing_tensors(ones, ones)) == []
    assert list(verify_resume.differing_tensors(ones, other)) == ["a differs in 1 of 2 values, by at most 0.5"]
