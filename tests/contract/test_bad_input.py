"""Bad input gives one clear message and exit status 2, and leaves no half-written file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megamor.cli import pretrain
from megamor.config import config_to_yaml
from megamor.data.meta import ShardMeta
from megamor.parallel import close_world
from tests.distributed.harness import run_ranks
from tests.resume.runs import VOCABULARY, checkpoint_names, directory_of, tiny_run, trace, write_shard

pytestmark = pytest.mark.promise("R16")


@dataclass(frozen=True)
class Case:
    """A run of two steps in `directory`, described by a configuration file that a test may spoil."""

    directory: Path
    file: Path

    @property
    def data(self) -> Path:
        """Prefix of the training data."""
        return self.directory / "data" / "train"

    def replace(self, old: str, new: str) -> None:
        """Change the file."""
        text = self.file.read_text()
        assert text.count(old) == 1, old
        self.file.write_text(text.replace(old, new))

    def refused(self, capsys: pytest.CaptureFixture, *overrides: str) -> str:
        """The message of a launch that must be refused, without the name of the exception."""
        status, message = launch(self.file, overrides, capsys)
        assert status == 2, message
        assert message.count("Error: ") == 1
        assert "Traceback" not in message
        return message.partition("Error: ")[2]

    def nothing_was_written(self) -> bool:
        """Whether the run left nothing on disk."""
        return {path.name for path in self.directory.iterdir()} <= {"data", "run.yaml"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A run that would work."""
    torch.set_num_threads(1)
    config = tiny_run(tmp_path, max_steps=4)
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    return Case(tmp_path, tmp_path / "run.yaml")


def launch(file: Path, overrides: Sequence[str], capsys: pytest.CaptureFixture) -> tuple[Any, str]:
    """Exit status and what was printed on stderr."""
    capsys.readouterr()
    try:
        pretrain.main(["--config", str(file), *overrides])
    except SystemExit as leaving:
        return leaving.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_the_case_itself_runs(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert launch(case.file, (), capsys) == (0, "")


def test_no_such_file(case: Case, capsys: pytest.CaptureFixture) -> None:
    case.file.unlink()
    assert f"{case.file}: no such configuration file" in case.refused(capsys)


def test_unknown_key(case: Case, capsys: pytest.CaptureFixture) -> None:
    case.replace("micro_batch_size:", "micro_batchsize:")
    message = case.refused(capsys)
    assert "train.micro_batchsize" in message
    assert "did you mean" in message
    assert "micro_batch_size" in message
    assert case.nothing_was_written()


def test_missing_key(case: Case, capsys: pytest.CaptureFixture) -> None:
    case.replace("  max_steps: 4\n", "")
    message = case.refused(capsys)
    assert "train.max_steps" in message
    assert "train.max_tokens" in message


def test_missing_key_of_a_source(case: Case, capsys: pytest.CaptureFixture) -> None:
    case.replace(f"prefix: {case.data}", "weight: 2.0")
    case.replace("    weight: 1.0\n", "")
    assert "prefix" in case.refused(capsys)


def test_depth_not_divisible_by_the_recursions(case: Case, capsys: pytest.CaptureFixture) -> None:
    message = case.refused(capsys, "model.num_layers=7")
    assert "model.num_layers = 7" in message
    assert "use num_layers 5 or 8" in message
    assert case.nothing_was_written()


def test_no_training_data(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert "data.train names no data set" in case.refused(capsys, "data.train=[]")
    assert case.nothing_was_written()


def test_no_such_data(case: Case, capsys: pytest.CaptureFixture) -> None:
    message = case.refused(capsys, f"data.train=[{case.data}x]")
    assert f"{case.data}x.idx" in message
    assert case.nothing_was_written()


def test_no_such_validation_data(case: Case, capsys: pytest.CaptureFixture) -> None:
    message = case.refused(capsys, f"data.validation.held_out={case.data}y")
    assert f"{case.data}y.idx" in message
    assert case.nothing_was_written()


def test_shard_shorter_than_its_index_says(case: Case, capsys: pytest.CaptureFixture) -> None:
    tokens = Path(f"{case.data}.bin")
    tokens.write_bytes(tokens.read_bytes()[:-100])
    message = case.refused(capsys)
    assert f"{case.data}.bin" in message
    assert "39900" in message.replace(",", "")
    assert "40000" in message.replace(",", "")
    assert case.nothing_was_written()


def test_vocabulary_of_the_data_larger_than_the_models(case: Case, capsys: pytest.CaptureFixture) -> None:
    """Data without a side file, so that only the ids themselves show the mistake."""
    Path(f"{case.data}.meta.json").unlink()
    message = case.refused(capsys, "model.vocab_size=100")
    assert f"{case.data}.bin holds token id" in message
    assert "model.vocab_size" in message
    assert checkpoint_names(tiny_run(case.directory)) == []


def test_tokenizer_larger_than_the_model(case: Case, capsys: pytest.CaptureFixture) -> None:
    write_shard(case.data, meta=ShardMeta(vocab_size=500))
    message = case.refused(capsys)
    assert "500 entries" in message
    assert f"model.vocab_size {VOCABULARY}" in message
    assert case.nothing_was_written()


def test_another_tokenizer(case: Case, capsys: pytest.CaptureFixture) -> None:
    tokenizer = case.directory / "data" / "tokenizer.json"
    tokenizer.write_text("{}")
    write_shard(case.data, meta=ShardMeta(tokenizer_name="other", tokenizer_sha256="0" * 64))
    message = case.refused(capsys, f"data.tokenizer={tokenizer}")
    assert "tokenizer other (sha256 000000000000…)" in message
    assert hashlib.sha256(b"{}").hexdigest()[:12] in message
    assert case.nothing_was_written()


def test_no_such_tokenizer(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert "nowhere.json can't be read" in case.refused(capsys, "data.tokenizer=nowhere.json")
    assert case.nothing_was_written()


@pytest.mark.parametrize("override", ["model.ffn_dim=96", "router.sampling=aux_router", "model.num_layers=8"])
def test_checkpoint_of_another_model(case: Case, capsys: pytest.CaptureFixture, override: str) -> None:
    assert launch(case.file, (), capsys)[0] == 0
    metrics = (directory_of(tiny_run(case.directory)) / "metrics.jsonl").read_bytes()
    message = case.refused(capsys, override, "train.max_steps=6")
    assert "step_00000004 belong to another model" in message
    assert f"{override.split('=')[0]}: " in message
    assert "another run.name" in message
    assert checkpoint_names(tiny_run(case.directory)) == ["latest", "step_00000004"]
    assert (directory_of(tiny_run(case.directory)) / "metrics.jsonl").read_bytes() == metrics


def test_checkpoint_of_other_data(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert launch(case.file, (), capsys)[0] == 0
    write_shard(case.data, tokens=30_000)
    message = case.refused(capsys, "train.max_steps=6")
    assert f"{case.data} isn't the data that the run was started with" in message


def test_damaged_checkpoint(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert launch(case.file, (), capsys)[0] == 0
    (directory_of(tiny_run(case.directory)) / "checkpoints" / "step_00000004" / "config.yaml").write_text("")
    status, printed = launch(case.file, ("train.max_steps=6",), capsys)
    assert status == 2
    assert "none of the 1 checkpoints" in printed


def test_unwritable_run_directory(case: Case, capsys: pytest.CaptureFixture) -> None:
    message = case.refused(capsys, f"run.dir={case.file}")
    assert f"can't create the run's directory {case.file}/tiny" in message
    assert "set run.dir or run.name" in message


def save_on_a_full_disk(file: Path) -> tuple[Any, str]:
    """The disk is full for files above 40 KB: metrics fit, weights don't."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    return launch_here([str(file), "checkpoint.every_steps=2"])


def test_full_disk(case: Case, capsys: pytest.CaptureFixture) -> None:
    assert launch(case.file, ("train.stop_at_step=1",), capsys)[0] == 0
    ((status, printed),) = run_ranks(save_on_a_full_disk, case.file, world_size=1)
    assert status == 2
    assert printed.count("Error: ") == 2  # ours, with the system's
    assert printed.startswith("CheckpointError: writing ")
    assert "OSError: [Errno 27] File too large" in printed
    config = tiny_run(case.directory)
    assert checkpoint_names(config) == ["latest", "step_00000001"]
    assert trace(config).tensors  # of the checkpoint before, which is still whole
    assert launch(case.file, (), capsys)[0] == 0
    assert checkpoint_names(config) == ["latest", "step_00000001", "step_00000004"]


def launch_here(arguments: list[str]) -> tuple[Any, str]:
    """Exit status and stderr of this rank."""
    pretrain.SECONDS_BEFORE_SILENT_EXIT = 0.0
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)  # how one of several ranks ends
        try:
            pretrain.main(["--config", *arguments])
        except SystemExit as leaving:
            return leaving.code, printed.getvalue()
        finally:
            close_world()
    return 0, printed.getvalue()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch_size=3", "train.global_batch_size = 3"),
        ("model.num_layers=7", "model.num_layers = 7"),
        ("data.train=[nowhere]", "nowhere.idx"),
        ("model.vocab_size=100", "holds token id"),
        ("parallel.backend=single", "parallel.backend = single with 2 processes"),
    ],
)
def test_two_ranks_speak_with_one_voice(case: Case, override: str, said: str) -> None:
    Path(f"{case.data}.meta.json").unlink()
    (status, printed), other = run_ranks(launch_here, [str(case.file), override])
    assert status == 2
    assert said in printed
    assert printed.count("Error: ") == 1
    assert other == (2, "")
    assert not (directory_of(tiny_run(case.directory)) / "checkpoints" / "latest").exists()
