"""Order of samples: permutations, blends and phases, which are functions of numbers and need no data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamor.config import config_from_dict
from megamor.data.blend import MAX_PERIOD, Blend
from megamor.data.order import SampleOrder, shuffled_windows
from megamor.errors import ConfigError


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_each_epoch_holds_each_window_once(size: int, seed: int, epoch: int) -> None:
    windows = shuffled_windows(np.arange(epoch * size, (epoch + 1) * size), size, seed)
    assert (np.sort(windows) == np.arange(size)).all()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**12), seed=st.integers(0, 2**32), positions=st.lists(st.integers(0, 10**13), min_size=1))
def test_each_position_can_be_computed_alone(size: int, seed: int, positions: list[int]) -> None:
    together = shuffled_windows(np.array(positions), size, seed)
    alone = [shuffled_windows(np.array([position]), size, seed)[0] for position in positions]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < size)).all()


def test_order_is_pinned() -> None:
    """Saved runs must resume with the same order, so these numbers must never change."""
    assert shuffled_windows(np.arange(12), 10, seed=1234).tolist() == [7, 4, 3, 0, 1, 9, 8, 2, 6, 5, 4, 9]


def test_epochs_and_seeds_differ_and_mix_well() -> None:
    size = 20_000
    first, second = shuffled_windows(np.arange(2 * size), size, 1).reshape(2, size)
    other = shuffled_windows(np.arange(size), size, 2)
    for a, b in ((first, second), (first, other), (first, np.arange(size)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # 4 standard deviations of independent draws
    assert abs(np.abs(np.diff(first)).mean() / size - 1 / 3) < 0.01
    assert (first == second).sum() < 10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 5000))
def test_blend_is_within_one_sample_at_every_prefix(weights: list[int], length: int) -> None:
    blend = Blend(weights)
    sources, ranks = blend.locate(np.arange(length))
    given_so_far = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / sum(weights)
    ideal = np.arange(1, length + 1)[:, None] * shares
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0  # Tijdeman's bound, less than one sample
    assert length == 0 or np.abs(given_so_far - ideal).max() <= bound + 1e-9
    assert (ranks == [given_so_far[n, s] - 1 for n, s in enumerate(sources)]).all()
    assert (blend.counts(length) == np.bincount(sources, minlength=len(weights))).all()


@pytest.mark.parametrize("count", [2, 3, 300])
def test_blend_of_odd_weights_and_of_many_sources(count: int) -> None:
    shares = np.random.default_rng(count).dirichlet(np.ones(count)) + 1e-4
    blend = Blend(shares.tolist())
    shares /= shares.sum()
    sources, _ = blend.locate(np.arange(20_000))
    for source in range(min(count, 20)):
        given_so_far = np.cumsum(sources == source)
        assert np.abs(given_so_far - np.arange(1, 20_001) * shares[source]).max() < 1
    far = 10**9
    assert np.abs(blend.counts(far) - far * shares).max() <= 1 + far / MAX_PERIOD
    assert blend.counts(far).sum() == far


def test_decimal_weights_repeat_exactly() -> None:
    assert Blend([0.3, 0.7]).period == 10
    assert Blend([3, 7]).per_period.tolist() == [3, 7]
    assert Blend([0.2]).period == 1


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_are_not_positive_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.weight: found .*, expected a positive number"):
        config_from_dict({"data": {"train": [{"prefix": "a", "weight": weight}]}})


def test_a_weight_too_small_to_be_scheduled_is_refused() -> None:
    with pytest.raises(ConfigError, match="weights"):
        Blend([1, 1e-9])


changes = st.lists(
    st.tuples(
        st.integers(0, 400),  # samples until the change
        st.integers(1, 64),  # global batch size from then on
        st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1),  # blend from then on
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(changes=changes)
def test_phases_use_every_sample_of_a_source_once_and_in_order(changes: list[tuple[int, int, dict[str, int]]]) -> None:
    order = SampleOrder.start(8, 1, {"a": 1, "b": 2})
    now = 0
    for samples, batch, weights in changes:
        now += samples
        order = SampleOrder.from_state(json.loads(json.dumps(order.to_state()))).changed_at(now, batch, 1, weights)
    sources, positions = order.locate(np.arange(now + 300))
    for source in range(len(order.sources)):
        used = positions[sources == source]
        assert (used == np.arange(len(used))).all()


@settings(max_examples=40, deadline=None)
@given(changes=changes)
def test_a_change_leaves_what_came_before(changes: list[tuple[int, int, dict[str, int]]]) -> None:
    order, now = SampleOrder.start(8, 1, {"a": 1, "b": 2}), 0
    for samples, batch, weights in changes:
        now += samples
        changed = order.changed_at(now, batch, 1, weights)
        before, after = (
            [(o.sources[s], p) for s, p in zip(*o.locate(np.arange(now)), strict=True)] for o in (order, changed)
        )
        assert before == after
        order = changed


def test_only_real_changes_open_a_phase() -> None:
    order = SampleOrder.start(8, 1, {"a": 1, "b": 1})
    assert order.changed_at(80, 8, 1, {"a": 2, "b": 2}) is order
    batch = order.changed_at(80, 16, 1, {"a": 1, "b": 1})
    assert [(p.first_sample, p.global_batch_size) for p in batch.phases] == [(0, 8), (80, 16)]
    sources, positions = order.locate(np.arange(300))
    assert all((x == y).all() for x, y in zip(batch.locate(np.arange(300)), (sources, positions), strict=True))
    # Nor does it start the schedule of the blend over: three samples make a period here, and 80 is inside one.
    uneven = SampleOrder.start(8, 1, {"a": 1, "b": 2})
    larger = uneven.changed_at(80, 16, 1, {"a": 1, "b": 2})
    assert all((x == y).all() for x, y in zip(larger.locate(np.arange(99)), uneven.locate(np.arange(99)), strict=True))
    blend = order.changed_at(81, 8, 1, {"b": 1})
    assert dict(blend.phases[1].consumed) == {"a": 41, "b": 40}
    assert blend.changed_at(81, 8, 1, {"a": 1}).phases[1].consumed == blend.phases[1].consumed


def test_sources_may_be_listed_in_another_order() -> None:
    order = SampleOrder.start(8, 1, {"a": 1, "b": 1})
    assert order.changed_at(80, 8, 1, {"b": 1, "a": 1}) is order
    longer = order.changed_at(80, 16, 1, {"b": 1, "a": 1})
    found = [[(o.sources[s], p) for s, p in zip(*o.locate(np.arange(300)), strict=True)] for o in (order, longer)]
    assert found[0] == found[1]
