"""`megamor trace`: the documents that it names hold the tokens that the trainer was given, for every packing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megamor.analysis.trace import samples_of, trace
from megamor.cli import trace as command
from megamor.config import Config, RampConfig, SourceConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.corpus.tokenizer import char_tokenizer
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import TrainingData
from megamor.data.loader import TrainingLoader
from megamor.data.meta import ShardMeta, sha256_of_tokenizer
from megamor.data.shard import TokenShard
from megamor.errors import DataError
from megamor.train import Trainer
from tests.commands import refusal, status
from tests.resume.runs import fit, tiny_run, until

LETTERS = "abcdefgh \n"
SEQ_LEN = 32


def write_texts(prefix: Path, tokenizer: Path, lengths: list[int], seed: int) -> str:
    """Documents of two files, of random letters."""
    generator = np.random.default_rng(seed)
    files = [{"name": name, "documents": n, "tokens": 0} for name, n in (("a.txt", 5), ("b.txt", len(lengths) - 5))]
    with ShardWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add(generator.integers(0, len(LETTERS), length))
        writer.commit(ShardMeta("tokenizer.json", sha256_of_tokenizer(tokenizer), 11, sources=files))
    return str(prefix)


def record(folder: Path, trainer: Trainer) -> None:
    """Write every batch that the trainer fetches to `folder`."""
    folder.mkdir(exist_ok=True)
    fetch = trainer.loader.next_step

    def recorded() -> object:
        step, batches = trainer.progress.step + 1, fetch()
        inputs, lengths = (
            np.concatenate([getattr(b, name).numpy() for b in batches]) for name in ("inputs", "lengths")
        )
        np.savez(folder / f"{step}.npz", inputs=inputs, lengths=lengths)
        return batches

    trainer.loader.next_step = recorded  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module", params=["stream", "best_fit", "document"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A blend of two data sets, whose batches and sequences grow, stopped after step 6 of 8 and then continued.

    Batches are in `batches`; the state after step 6 is the last checkpoint of the run `stopped`.
    """
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_run(folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(char_tokenizer([LETTERS], ["<|endoftext|>"]).to_str())
    generator = np.random.default_rng(1)
    lengths = [[*generator.integers(1, 90, 60).tolist(), 0, 300], [*generator.integers(1, 20, 150).tolist()]]
    prefixes = [
        write_texts(folder / "data" / name, tokenizer, n, i)
        for i, (name, n) in enumerate(zip("xy", lengths, strict=True))
    ]
    data = replace(
        config.data,
        train=(SourceConfig(prefixes[0], 2), SourceConfig(prefixes[1], 1)),
        packing=request.param,
        tokenizer=str(tokenizer),
    )
    ramp = (RampConfig(until_step=3, global_batch_size=2, seq_len=16), RampConfig(until_step=5, global_batch_size=6))
    config = replace(config, data=data, train=replace(config.train, ramp=ramp))
    fit(
        replace(config, run=replace(config.run, name="straight")),
        world_size=1,
        spoil=partial(record, folder / "batches"),
    )
    fit(until(config, 6), world_size=1)
    return config


def test_pieces_are_what_the_trainer_read(run: Config) -> None:
    """Steps 7 and 8 are looked up before the run has got there."""
    shards = {source.prefix: TokenShard.open(source.prefix) for source in run.data.train}
    used = set()
    for step in range(1, 9):
        read = np.load(Path(run.run.dir) / "batches" / f"{step}.npz")
        found = trace(Path(run.run.dir) / "tiny", step)
        assert found["trained"] == (step <= 6)
        assert len(found["samples"]) == len(read["inputs"])
        for sample, inputs, length in zip(found["samples"], read["inputs"], read["lengths"], strict=True):
            tokens: list[int] = []
            for piece in sample["pieces"]:
                assert piece["column"] == len(tokens)
                document, (low, high) = shards[piece["prefix"]].document(piece["document"]), piece["tokens"]
                assert piece["document_tokens"] == len(document)
                alphabet = "".join(sorted(LETTERS))
                text = "".join(alphabet[token] for token in document)
                assert text[low:high].startswith(piece["text"])
                assert piece["line"] == 1 + text[:low].count("\n")
                file = ("a.txt", piece["document"]) if piece["document"] < 5 else ("b.txt", piece["document"] - 5)
                assert (piece["file"], piece["document_of_file"]) == file
                tokens += document[low:high].tolist()
                used.add(piece["source"])
            assert tokens == inputs[:length].tolist()
    assert used == {"x", "y"}


def test_the_command(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(run.run.dir) / "tiny"
    assert status(command.main, "--run", directory, "--step", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, step 2"
    assert [line for line in lines if line.startswith("sample")] == ["sample 2:", "sample 3:"]
    assert status(command.main, "--run", directory, "--step", 2, "--sample", 3, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["samples"] == trace(directory, 2)["samples"][1:]
    assert "samples 2 to 3" in refusal(capsys, command.main, "--run", directory, "--step", 2, "--sample", 4)
    assert "from 1" in refusal(capsys, command.main, "--run", directory, "--step", 0)
    assert status(command.main, "--run", directory, "--step", 99) == 0
    assert "step 99, which isn't trained yet" in capsys.readouterr().out


def test_changed_data_is_refused(run: Config) -> None:
    prefix = Path(run.data.train[0].prefix)
    saved = {suffix: prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx", ".meta.json")}
    try:
        write_texts(prefix, Path(str(run.data.tokenizer)), [50] * 40, seed=9)
        with pytest.raises(DataError, match="isn't the data that the run was started with"):
            trace(Path(run.run.dir) / "tiny", 1)
    finally:
        for suffix, content in saved.items():
            prefix.with_suffix(suffix).write_bytes(content)


def test_steps_after_rollbacks(tmp_path: Path) -> None:
    """A loader that is rolled back like the trainer's (`Trainer.roll_back`), also past an earlier rollback."""
    with ShardWriter(tmp_path / "d", np.uint16) as writer:
        for start in range(0, 5000, 50):
            writer.add(np.arange(start, start + 50) % 97)
        writer.commit()
    config = tiny_run(tmp_path / "run").data
    config = replace(config, train=(SourceConfig(str(tmp_path / "d")),), validation={}, seq_len=8)
    data = TrainingData.open(config, seed=0, vocab_size=97)
    batches = BatchSchedule((BatchShape(2, 1, 8), BatchShape(3, 1, 8)), (5,))
    loader = TrainingLoader(data, rank=0, world_size=1, batches=batches)
    saved, first_of, left_out, step = {0: loader.state_dict()}, {}, [], 0
    for end, back in ((4, 2), (9, 4), (8, 1), (12, None)):
        while step < end:
            step += 1
            first_of[step] = loader.consumed_samples
            loader.next_step()
            saved[step] = loader.state_dict()
        if back is not None:
            position = loader.state_dict()
            left_out.append((saved[back]["consumed_samples"], position["consumed_samples"]))
            loader.load_state_dict({**position, "steps": back})
            step = back
    loader.close()
    for number, first in first_of.items():
        size = 2 if number <= 5 else 3
        assert samples_of(loader.order, left_out, number) == range(first, first + size), number
