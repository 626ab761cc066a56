"""Data that a run would use twice without saying so: a validation set that is trained on, sources within sources."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megamor.cli import pretrain
from megamor.config import DataConfig, SourceConfig, config_to_yaml
from megamor.corpus.merge import merge_shards
from megamor.data.dataset import announce_shared_data
from megamor.data.meta import ShardMeta
from tests.resume.runs import tiny_run, write_shard


def data(*train: Path | str, **validation: Path | str) -> DataConfig:
    """A configuration that names these prefixes."""
    return DataConfig(
        train=tuple(SourceConfig(str(prefix)) for prefix in train),
        validation={name: str(prefix) for name, prefix in validation.items()},
    )


def link(prefix: Path, name: Path) -> Path:
    """Another name of the pair, without its side file."""
    for suffix in (".bin", ".idx"):
        Path(f"{name}{suffix}").symlink_to(f"{prefix}{suffix}")
    return name


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "copy", "one of a blend"])
def test_a_validation_set_that_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    train, other = tmp_path / "train", tmp_path / "other"
    write_shard(train)
    write_shard(other, tokens=9_000)
    monkeypatch.chdir(tmp_path)
    if how == "copy":
        for suffix in (".bin", ".idx"):
            shutil.copyfile(f"{train}{suffix}", tmp_path / f"copy{suffix}")
    used = {"relative": "../" + tmp_path.name + "/train", "copy": tmp_path / "copy"}.get(how, train)
    used = link(train, tmp_path / "link") if how == "symlink" else used
    sources = (other, train) if how == "one of a blend" else (train,)
    (warning,) = announce_shared_data(data(*sources, v=used))
    assert warning.startswith(f"validation set v ({used}) is training data")
    assert announce_shared_data(data(*sources, v=other)) == (
        []
        if other not in sources
        else [f"validation set v ({other}) is training data: its loss says nothing about unseen text"]
    )


def test_merged_data_contains_its_parts(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for number, part in enumerate(parts):
        texts = [{"name": f"{number}.jsonl", "documents": 3, "tokens": 9_000}]
        write_shard(part, tokens=9_000 + 500 * number, meta=ShardMeta(sources=texts))
    merge_shards([str(part) for part in parts], str(tmp_path / "ab"))
    (warning,) = announce_shared_data(data(tmp_path / "ab", v=parts[1]))
    assert f"validation set v ({parts[1]}) is training data ({tmp_path / 'ab'})" in warning
    (warning,) = announce_shared_data(data(tmp_path / "ab", parts[0]))
    assert warning == f"data.train: {parts[0]} is contained in {tmp_path / 'ab'}, so its texts have both weights"
    assert announce_shared_data(data(*parts)) == []


def test_a_run_announces_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_run(tmp_path, max_steps=2)
    shared = replace(config.data, validation={"v": config.data.train[0].prefix})
    (tmp_path / "run.yaml").write_text(config_to_yaml(replace(config, data=shared)))
    pretrain.main(["--config", str(tmp_path / "run.yaml")])
    assert "is training data: its loss says nothing about unseen text" in caplog.text
    caplog.clear()
    (tmp_path / "run.yaml").write_text(config_to_yaml(replace(config, run=replace(config.run, name="fine"))))
    pretrain.main(["--config", str(tmp_path / "run.yaml")])
    assert "training data" not in caplog.text
