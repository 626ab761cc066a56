"""Runs whose batch, blend, sequence length or number of processes changes: no token is lost or repeated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.config import Config, DataConfig, RampConfig, SourceConfig, TrainConfig
from megamor.config.batches import BatchSchedule, BatchShape
from megamor.config.derive import derive
from megamor.corpus.writer import ShardWriter
from megamor.data.dataset import TrainingData, source_weights
from megamor.data.loader import TrainingLoader
from megamor.data.meta import ShardMeta, fingerprint, meta_path
from megamor.data.order import shuffled_in_blocks, shuffled_windows
from megamor.data.shard import TokenShard
from megamor.errors import ConfigError, DataError

CHUNK = 8
NAMES = ("a", "b", "c")
PACKINGS = ("stream", "best_fit", "document")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of documents of 1 to 20 tokens; a token identifies its source (thousands) and its position."""
    folder, generator = tmp_path_factory.mktemp("phases"), np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        with ShardWriter(folder / name, np.uint16) as writer:
            start = 1000 * (number + 1)
            for length in generator.integers(1, 21, 12 + 5 * number):
                writer.add(np.arange(start, start + length))
                start += length
            writer.commit()
    return folder


def opened(folder: Path, packing: str, weights: dict[str, int], **changes: object) -> TrainingData:
    train = tuple(SourceConfig(str(folder / name), weight) for name, weight in weights.items())
    config = DataConfig(train=train, seq_len=CHUNK, packing=packing, **changes)  # type: ignore[arg-type]
    return TrainingData.open(config, seed=5, vocab_size=5000)


def reference(folder: Path, packing: str, name: str, tokens: int) -> np.ndarray:
    """Inputs and labels [tokens, 2] of the stream of one source, which is the concatenation of its chunks."""
    rows = opened(folder, packing, {name: 1}).samples(0, -(-tokens // CHUNK))
    return np.stack((rows.inputs.ravel(), rows.labels.ravel()), axis=1)[:tokens]


legs = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 4]),  # processes
        st.sampled_from([12, 24]),  # global batch size
        st.sampled_from([1, 2, 3, 4, 5, 8, 11, 16, 24]),  # sequence length
        st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5), min_size=1),  # blend
        st.integers(0, 4),  # steps
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(legs=legs, packing=st.sampled_from(PACKINGS))
def test_each_source_is_read_without_gaps_across_any_changes_at_restarts(
    folder: Path, legs: list[tuple[int, int, int, dict[str, int], int]], packing: str
) -> None:
    """The tokens of a source that the ranks of all launches get are its stream, from the first token, without gaps."""
    state = None
    given_out: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for world, batch, seq_len, weights, steps in legs:
        data = opened(folder, packing, weights)
        if state is None:  # the first launch sets the chunk length
            data = opened(folder, packing, weights, chunk_len=CHUNK)
        data = replace(data, config=replace(data.config, seq_len=seq_len))
        batches = BatchSchedule((BatchShape(batch, 1, seq_len),))
        ranks = [TrainingLoader(data, rank=rank, world_size=world, batches=batches) for rank in range(world)]
        for rank in ranks:
            if state:
                rank.load_state_dict(state)
        for _ in range(steps):
            first = ranks[0].consumed_samples
            parts = [micro for rank in ranks for micro in rank.next_step()]
            sources, _ = ranks[0].order.locate(np.arange(first, first + batch))
            for micro, source in zip(parts, sources, strict=True):
                shard = ranks[0]._data.sources[ranks[0].order.sources[source]].shard
                given_out[Path(shard.prefix).name].append(
                    np.stack((micro.inputs.numpy().ravel(), micro.labels.numpy().ravel()), axis=1)
                )
        assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
        state = json.loads(json.dumps(ranks[0].state_dict()))
        for rank in ranks:
            rank.close()
    for name, parts in given_out.items():
        if parts:
            found = np.concatenate(parts)
            # A window joined from several chunks has their padding at its end.
            tokens = [pairs[pairs[:, 1] != -100] for pairs in (found, reference(folder, packing, name, len(found)))]
            assert np.array_equal(*tokens)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_is_complete_through_changes_of_length(folder: Path, packing: str) -> None:
    """The stream that the test above compares with has every pair once in an epoch."""
    (source,) = opened(folder, packing, {"c": 1}).sources.values()
    epoch = reference(folder, packing, "c", source.epoch_tokens)
    real = epoch[epoch[:, 1] != -100]
    assert (real[:, 1] == real[:, 0] + 1).all()
    assert len(set(real[:, 1].tolist())) == len(real) == source.num_pairs


def schedule_of(**train: object) -> BatchSchedule:
    config = Config(data=DataConfig(seq_len=16), train=TrainConfig(global_batch_size=8, micro_batch_size=2, **train))  # type: ignore[arg-type]
    return BatchSchedule.of(config)


RAMP = (
    RampConfig(until_step=2, global_batch_size=4, seq_len=4),
    RampConfig(until_step=5, seq_len=8, micro_batch_size=4),
)


def test_ramp() -> None:
    batches = schedule_of(ramp=RAMP)
    shapes = [batches.at(step) for step in range(7)]
    assert shapes[:2] == [BatchShape(4, 2, 4)] * 2
    assert shapes[2:5] == [BatchShape(8, 4, 8)] * 3
    assert shapes[5:] == [BatchShape(8, 2, 16)] * 2
    assert [batches.tokens(n) for n in range(8)] == [0, 16, 32, 96, 160, 224, 352, 480]
    for tokens in range(1, 600):
        steps = batches.steps_for(tokens)
        assert batches.tokens(steps - 1) < tokens <= batches.tokens(steps)
    assert list(batches.stages(1, 4)) == [(1, 2, shapes[0]), (2, 4, shapes[2])]
    assert list(batches.stages(5, 5)) == []


def test_derived_quantities_of_a_ramp() -> None:
    train = TrainConfig(global_batch_size=8, micro_batch_size=2, max_tokens=480, ramp=RAMP)
    derived = derive(Config(data=DataConfig(seq_len=16), train=train), world_size=1)
    assert (derived.total_steps, derived.batches.tokens(7)) == (7, 480)
    assert "2 of 16 + 3 of 64 + 2 of 128 tokens = 480 tokens" in derived.describe()


def test_a_ramp_is_the_same_phases_as_restarts(folder: Path) -> None:
    """One launch with a ramp and one launch for each of its stages give the same samples and the same state."""
    data = opened(folder, "stream", {"a": 1, "b": 2}, chunk_len=16)
    data = replace(data, config=replace(data.config, seq_len=16))
    batches = schedule_of(ramp=RAMP)
    loader = TrainingLoader(data, rank=0, world_size=1, batches=batches)
    ramped = [np.concatenate([micro.inputs.numpy() for micro in loader.next_step()]) for _ in range(7)]
    assert [rows.shape for rows in ramped] == [(4, 4)] * 2 + [(8, 8)] * 3 + [(8, 16)] * 2
    assert [phase.first_sample for phase in loader.order.phases] == [0, 8, 32]
    state = None
    for first, end, shape in batches.stages(0, 7):
        single = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule((shape,)))
        if state:
            single.load_state_dict(state)
        for step in range(first, end):
            rows = np.concatenate([micro.inputs.numpy() for micro in single.next_step()])
            assert (rows == ramped[step]).all()
        state = single.state_dict()
        single.close()
    assert state == loader.state_dict()
    loader.close()


def test_phases_of_steps_that_were_only_prefetched_are_not_saved(folder: Path) -> None:
    data = opened(folder, "stream", {"a": 1}, chunk_len=16, prefetch_steps=5)
    loader = TrainingLoader(data, rank=0, world_size=1, batches=schedule_of(ramp=RAMP))
    loader.next_step()
    assert len(loader.state_dict()["phases"]) == 1
    loader.close()


def test_a_run_resumes_with_the_chunks_it_was_started_with(folder: Path) -> None:
    data = opened(folder, "best_fit", {"c": 1})
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule((BatchShape(2, 2, CHUNK),)))
    loader.next_step()
    state = loader.state_dict()
    loader.close()
    longer = TrainingData.open(replace(data.config, seq_len=16), seed=5, vocab_size=5000)
    assert longer.chunk_len == 16
    resumed = TrainingLoader(longer, rank=0, world_size=1, batches=BatchSchedule((BatchShape(2, 2, 16),)))
    resumed.load_state_dict(state)
    assert resumed.state_dict()["data.chunk_len"] == CHUNK
    assert any("chunks of 8 tokens, so sequences of 16 are joined" in line for line in resumed.describe(10))
    said = TrainingData.open(replace(data.config, seq_len=16, chunk_len=16), seed=5, vocab_size=5000)
    refusing = TrainingLoader(said, rank=0, world_size=1, batches=BatchSchedule((BatchShape(2, 2, 16),)))
    with pytest.raises(ConfigError, match=r"data\.chunk_len 8, not 16"):
        refusing.load_state_dict(state)


def test_a_position_of_another_version_is_refused(folder: Path) -> None:
    data = opened(folder, "stream", {"a": 1})
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule((BatchShape(2, 2, CHUNK),)))
    state = loader.state_dict()
    del state["phases"][0]["seq_len"]
    with pytest.raises(DataError, match="another version of megamor"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("packing", PACKINGS)
def test_more_steps_and_epochs_change_nothing_before(folder: Path, packing: str) -> None:
    data = opened(folder, packing, {"a": 3, "b": 1})
    few, many = data.samples(0, 20), data.samples(0, 400)  # a dozen epochs
    assert (many.inputs[:20] == few.inputs).all()
    assert (many.labels[:20] == few.labels).all()
    assert (data.samples(333, 7).inputs == many.inputs[333:340]).all()


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_blocks_are_read_one_after_the_other_and_each_window_once(sizes: list[int], seed: int) -> None:
    total = sum(sizes)
    positions = np.arange(3 * total)
    blocks, windows = shuffled_in_blocks(positions, np.array(sizes), seed)
    for epoch in np.split(np.stack((blocks, windows), axis=1), 3):
        assert sorted(map(tuple, epoch.tolist())) == [(b, w) for b, size in enumerate(sizes) for w in range(size)]
        assert (np.diff(epoch[:, 0]) != 0).sum() == len(sizes) - 1
    for i in (0, total):
        alone = shuffled_in_blocks(positions[i : i + 1], np.array(sizes), seed)
        assert (alone[0], alone[1]) == (blocks[i], windows[i])


def test_order_of_blocks_is_pinned() -> None:
    """Saved runs must resume with the same order, so these numbers must never change."""
    blocks, windows = shuffled_in_blocks(np.arange(9), np.array([2, 3, 4]), seed=1234)
    assert blocks.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert windows.tolist() == [0, 1, 2, 0, 1, 1, 0, 3, 2]
    assert shuffled_windows(np.arange(12), 10, seed=1234).tolist() == [7, 4, 3, 0, 1, 9, 8, 2, 6, 5, 4, 9]


# --- weights, epochs, exhaustion --------------------------------------------------------------------------------------


def config_of(folder: Path, *sources: SourceConfig, **changes: object) -> DataConfig:
    train = tuple(replace(source, prefix=str(folder / source.prefix)) for source in sources)
    return DataConfig(train=train, seq_len=CHUNK, **changes)  # type: ignore[arg-type]


def test_source_weights(folder: Path) -> None:
    budgets = config_of(folder, SourceConfig("a", tokens=3e9), SourceConfig("b", tokens=1e9))
    assert source_weights(budgets, [10, 20]) == [3e9, 1e9]
    weights = (SourceConfig("a", 2.0), SourceConfig("b"))
    assert source_weights(config_of(folder, *weights), [10, 1000]) == [2, 1]
    assert source_weights(config_of(folder, *weights, blend_temperature=1.0), [10, 1000]) == pytest.approx([20, 1000])
    assert source_weights(config_of(folder, *weights, blend_temperature=2.0), [100, 400]) == pytest.approx([20, 20])
    even = source_weights(config_of(folder, *weights, blend_temperature=1e9), [10, 1000])
    assert even == pytest.approx([2, 1], rel=1e-6)


def test_budgets_are_kept(folder: Path) -> None:
    config = config_of(folder, SourceConfig("a", tokens=320), SourceConfig("b", tokens=80))
    data, batches = TrainingData.open(config, seed=0, vocab_size=5000), BatchSchedule((BatchShape(10, 10, CHUNK),))
    loader = TrainingLoader(data, rank=0, world_size=1, batches=batches)
    assert [use.tokens for use in loader.forecast(total_steps=5)] == [320, 80]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    until=st.tuples(st.integers(1, 9), st.integers(10, 20)),
    batch=st.integers(1, 6),
    start=st.integers(0, 12),
)
def test_the_forecast_equals_what_happens(
    folder: Path, weights: tuple[int, int], until: tuple[int, int], batch: int, start: int
) -> None:
    """Forecast tokens, epochs and the first step with a repeat equal those of a loader that runs the steps."""
    data = opened(folder, "stream", dict(zip("ab", weights, strict=True)), chunk_len=CHUNK, prefetch_steps=0)
    ramp = (BatchShape(1, 1, 2), BatchShape(2, 1, 4), BatchShape(batch, 1, CHUNK))
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule(ramp, until))
    for _ in range(start):
        loader.next_step()
    forecast, repeats = loader.forecast(30), {}
    for step in range(start + 1, 31):
        loader.next_step()
        for name, epochs in loader.epochs().items():
            if epochs > 1:
                repeats.setdefault(name, step)
    for use in forecast:
        name = data.names[use.key]
        assert use.epochs == loader.epochs()[name]
        assert use.repeats_in_step == repeats.get(name)
    assert sum(use.fraction for use in forecast) == pytest.approx(1)
    loader.close()


@pytest.mark.parametrize(("on_exhausted", "says"), [("repeat", "and then read again"), ("stop", "the run ends early")])
def test_a_source_that_will_repeat_or_run_out_is_named_at_the_start(folder: Path, on_exhausted: str, says: str) -> None:
    data = opened(folder, "stream", {"a": 1, "c": 1}, on_exhausted=on_exhausted)
    loader = TrainingLoader(data, rank=0, world_size=1, batches=BatchSchedule((BatchShape(4, 4, CHUNK),)))
    use, other = loader.forecast(1000)
    (small, large) = data.sources.values()
    assert use.repeats_in_step == math.ceil((small.num_chunks + 1) / 2)  # each source gets two samples a step
    lines = loader.describe(use.repeats_in_step)
    assert len(lines) == 3
    assert lines[2].startswith("warning: ")
    assert says in lines[2]
    assert f"{use.repeats_in_step - (on_exhausted == 'stop'):,}" in lines[2]
    assert len(loader.describe(use.repeats_in_step - 1)) == 2
    assert other.repeats_in_step > use.repeats_in_step
    assert large.num_chunks > small.num_chunks


def test_names_are_as_long_as_needed(tmp_path: Path) -> None:
    for name in ("x/train", "y/train", "x/val"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            writer.add(np.arange(len(name) + ord(name[0]), 200))
            writer.commit()
    config = config_of(tmp_path, SourceConfig("x/train"), SourceConfig("x/val"))
    assert list(TrainingData.open(config, seed=0, vocab_size=5000).names.values()) == ["train", "val"]
    config = config_of(tmp_path, SourceConfig("x/train"), SourceConfig("y/train"))
    assert list(TrainingData.open(config, seed=0, vocab_size=5000).names.values()) == ["x/train", "y/train"]


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, tokenizer in (("a", "1" * 64), ("b", "2" * 64), ("v", "3" * 64)):
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            writer.add(np.arange(200))
            writer.commit(ShardMeta(tokenizer_name=f"{name}.json", tokenizer_sha256=tokenizer))
    for config in (
        config_of(tmp_path, SourceConfig("a"), SourceConfig("b")),
        config_of(tmp_path, SourceConfig("a"), validation={"v": str(tmp_path / "v")}),
    ):
        with pytest.raises(DataError, match=r"a with a\.json \(sha256 1{12}…\), .*(b with b|v with v)\.json"):
            TrainingData.open(config, seed=0, vocab_size=5000)


def test_a_change_in_place_of_foreign_data_is_found(tmp_path: Path) -> None:
    """Without a side file, overwriting any five-hundredth of the tokens is noticed though size and index stay."""
    prefix, count = tmp_path / "foreign", 8_000_000
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add(np.arange(count) % 5000)
        writer.commit()
    meta_path(str(prefix)).unlink()
    before = fingerprint(TokenShard.open(prefix))
    assert before == fingerprint(TokenShard.open(prefix))
    tokens = np.memmap(f"{prefix}.bin", "<u2", "r+")
    for start in np.random.default_rng(0).integers(0, count - count // 500, 20):
        part = slice(start, start + count // 500)
        kept = tokens[part].copy()
        tokens[part] += 1
        assert fingerprint(TokenShard.open(prefix)) != before
        tokens[part] = kept
    assert fingerprint(TokenShard.open(prefix)) == before
    for end in (0, -1):  # both ends are always read
        tokens[end] += 1
        assert fingerprint(TokenShard.open(prefix)) != before
        tokens[end] -= 1


@pytest.mark.slow
def test_a_hundred_million_documents_open_in_seconds(tmp_path: Path) -> None:
    """Takes 2 GB of disk. Opening is constant time and best fit one pass over all lengths; both bounds have slack."""
    from megamor.bench.loader import measure_documents, write_index

    found = measure_documents(write_index(tmp_path / "x", 100_000_000))
    assert found["open_stream_seconds"] < 5
    assert found["first_stream_batch_seconds"] < 1
    assert found["open_best_fit_seconds"] < 30
