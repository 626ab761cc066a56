"""Packed attention (flat rows with segment bounds) compared with padding and masks, and when each is used.

The kernel needs a GPU. Here a loop over the segments replaces it, in fp64, so that everything around it is tested on
any machine: bounds, order, grouped heads, and which calls use it. Buckets, the CPU's way to do the same, are compared
with both.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from megamor.model import attention, build_model
from megamor.model import layouts as geometry
from megamor.model.attention import (
    AttentionLayout,
    Grid,
    Segments,
    has_packed_kernel,
    packed_attention,
    visibility_mask,
)
from megamor.model.buckets import Buckets
from megamor.model.layouts import Geometry
from megamor.routing import TokenSet, plan
from tests.combinations import KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config

DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 24, [0] + [1] * 11 + [2] * 12])
"""[3, SEQ_LEN]"""


def loop_over_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `varlen_attn` segment by segment, and assert what the kernel requires."""
    assert window_size == (-1, 0), "causal"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert int(cu_seq_q.diff().max()) <= max_q == max_k
    out = [query[:0]]
    for start, stop in pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Segments]:
    """The packed path on a CPU; the list collects the segments of every call."""
    calls: list[Segments] = []

    def record(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        calls.append(segments)
        return packed_attention(q, k, v, segments)

    monkeypatch.setattr(geometry, "has_packed_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "packed_attention", record)
    monkeypatch.setattr(attention, "varlen_attn", loop_over_segments)
    monkeypatch.setattr(attention, "_CAUSAL", {"window_size": (-1, 0)})
    monkeypatch.setattr(attention, "_TAKES_GROUPS", True)
    return calls


def run(config: Any, mode: str, documents: Tensor | None) -> dict[str, Tensor]:
    """Loss, depths and gradients of one pass."""
    torch.manual_seed(0)
    model = lively_model(config)
    out = model(tokens(), tokens(1), mode=mode, documents=documents)
    (out.loss_sum + sum(out.router_losses.values())).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, "loss": out.loss_sum} | ({} if out.depth is None else {"depth": out.depth})


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_packed_equals_padded_and_masked(
    router: str, kv_policy: str, documents: Tensor | None, request: pytest.FixtureRequest
) -> None:
    config = tiny_config(ROUTERS[router], kv_policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "segment_bounds", lambda *_: None)
        expected = [run(config, mode, documents) for mode in ("train", "causal")]
    in_buckets = [run(config, mode, documents) for mode in ("train", "causal")]
    calls = request.getfixturevalue("packed")
    for mode, want, bucketed in zip(("train", "causal"), expected, in_buckets, strict=True):
        calls.clear()
        got = run(config, mode, documents)
        assert bucketed.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(bucketed[name], value, rtol=1e-9, atol=1e-9)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)
        if documents is not None:
            assert calls, "documents are packed in every combination"


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("kv_policy", ["share_first", "hybrid"])
def test_lengths_that_are_rounded_up_change_no_result(
    kv_policy: str, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(ROUTERS["token_choice"], kv_policy)
    want = run(config, "train", documents)
    monkeypatch.setattr(geometry, "reads_freely", lambda _: False)
    lengths = set[int]()
    pad = Grid.pad
    monkeypatch.setattr(Grid, "pad", lambda grid, *given: (lengths.add(grid.length), pad(grid, *given))[1])
    got = run(config, "train", documents)
    assert lengths <= {SEQ_LEN, geometry.LENGTH_MULTIPLE}
    assert geometry.LENGTH_MULTIPLE in lengths
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_documents_counted_by_the_host_are_the_same() -> None:
    begins = torch.tensor([0, 0, 2, 3, 3, 3, 6])
    assert geometry.segment_bounds(begins).tolist() == [0, 2, 3, 6, 7]
    for most in (4, 5, 60, 65):  # empty ones follow
        found = geometry.segment_bounds(begins, most).tolist()
        assert found[:5] == [0, 2, 3, 6, 7]
        assert set(found[5:]) == {7}
        assert len(found) == (65 if most <= 64 else 129)


def test_vanilla_with_documents(request: pytest.FixtureRequest) -> None:
    want = run(vanilla_config(), "train", DOCUMENTS)
    calls = request.getfixturevalue("packed")
    got = run(vanilla_config(), "train", DOCUMENTS)
    torch.testing.assert_close(got["loss"], want["loss"])
    assert len(calls) == 8
    assert calls[0].bounds.tolist() == [0, 10, 24, 48, 49, 60, 72]


def test_rectangular_sets_without_documents_stay_with_sdpa(packed: list[Segments]) -> None:
    run(vanilla_config(), "train", None)
    run(tiny_config(ROUTERS["expert_choice"]), "train", None)
    assert not packed


def test_no_mask_is_built_where_rows_are_packed(packed: list[Segments], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a dense mask")

    monkeypatch.setattr(geometry, "visibility_mask", refuse)
    run(tiny_config(ROUTERS["token_choice"]), "train", DOCUMENTS)
    assert packed


def test_buckets_hold_segments_of_similar_length() -> None:
    lengths = torch.tensor([0, 100, 3, 90, 400, 16, 99, 0, 5])
    buckets = Buckets.of(F.pad(lengths.cumsum(0), (1, 0)).int())
    assert buckets.shapes == ((1, 400), (2, 100), (1, 90), (3, 16))
    assert len(buckets.slots.unique()) == int(lengths.sum())
    assert Buckets.of(torch.tensor([0, 0])).shapes == ()


@pytest.mark.parametrize("seed", range(5))
def test_buckets_equal_a_loop_over_the_segments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, (60, 3, 200, 17, 1)[seed] + 1, (9,), generator=generator)
    lengths[seed] = 1
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    leaves = [
        torch.randn(int(bounds[-1]), heads, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    got = Buckets.of(bounds).attend(*leaves)
    longest = int(lengths.max())
    want = loop_over_segments(*leaves, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_segments_of_selected_rows(packed: list[Segments]) -> None:
    config = vanilla_config().model
    ids = tokens(batch=2, length=6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    chosen, indices = TokenSet.all(2, 6).where(torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1]) == 1)
    assert indices.tolist() == [0, 2, 7, 10, 11]
    layout = Geometry.of(ids, config, torch.float64, documents).layout(chosen, chosen)
    assert layout.segments is not None
    assert layout.segments.bounds.tolist() == [0, 2, 2, 2, 5]  # no token of two of the documents
    layout = Geometry.of(ids, config, torch.float64).layout(chosen, chosen)
    assert layout.segments is not None
    assert layout.segments.bounds.tolist() == [0, 2, 5]
    assert layout.segments.longest == 6  # known without reading from the device
    padded = Geometry.of(ids, config, torch.float64, lengths=(4, 3))
    layout = padded.layout(padded.everything, padded.everything)
    assert layout.segments is not None
    assert layout.segments.bounds.tolist() == [0, 4, 7]
    assert layout.segments.longest == 6  # of the window: another number in each step would compile anew


def test_positions_of_a_segment_see_no_other_segment(packed: list[Segments]) -> None:
    q = torch.randn(7, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(7, 1, 8, dtype=torch.float64) for _ in range(2))
    layout = AttentionLayout(Grid(1, 7), None, segments=Segments(torch.tensor([0, 3, 3, 7], dtype=torch.int32), 7))
    before = layout.attend(q, k, v)
    k[3:], v[3:] = 9.0, 9.0
    after = layout.attend(q, k, v)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


@pytest.mark.parametrize("takes_groups", [True, False])
def test_the_installed_kernel_gets_its_own_options(takes_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_groups:
        monkeypatch.setattr(attention, "_TAKES_GROUPS", False)
    q = torch.empty(10, 4, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(10, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    out = packed_attention(q, k, v, Segments(bounds, 8))
    out.sum().backward()
    assert out.shape == q.shape
    assert k.grad is not None
    assert k.grad.shape == k.shape
    # The argument for causality has one of two names, depending on the version.
    assert attention._CAUSAL.keys() <= inspect.signature(varlen.varlen_attn).parameters.keys()


def test_kernels_are_for_16_bits_on_gpus() -> None:
    assert not has_packed_kernel(torch.device("cpu"), torch.bfloat16, 64)
    assert not has_packed_kernel(torch.device("cuda"), torch.float32, 64)
    assert not has_packed_kernel(torch.device("cuda"), torch.bfloat16, 20)


def test_a_padded_query_sees_the_first_key() -> None:
    """Some kernels turn a row without any key into NaN, which would reach the gradients of real keys."""
    mask = visibility_mask(torch.tensor([[1, 3, -1]]), torch.tensor([[0, 1, 2, 3]]))
    assert (mask[0, 0] == 0).tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert mask.isneginf().logical_or(mask == 0).all()


def test_masks_have_the_dtype_of_attention() -> None:
    config = vanilla_config().model
    ids = tokens()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        everything = TokenSet.all(*ids.shape)
        few = everything.pick(torch.tensor([[0, 5]] * len(ids)))
        layout = Geometry.of(ids, config, dtype, DOCUMENTS).layout(few, everything)
        assert [chunk.mask.dtype for chunk in layout.chunks] == [dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert Geometry.of(ids, config, torch.float32).dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(4))
def test_where_keeps_the_rows_of_the_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.arange(3 * SEQ_LEN)
    chosen = TokenSet.all(3, SEQ_LEN)
    expected = torch.ones(3 * SEQ_LEN, dtype=torch.bool)
    for _ in range(3):
        keep = torch.rand(len(chosen), generator=generator) < 0.6
        expected[chosen.rows(stream.device)[~keep]] = False
        old = chosen
        chosen, indices = old.where(keep)
        assert torch.equal(chosen.gather(stream), stream[expected])
        assert torch.equal(old.gather(stream)[indices], chosen.gather(stream))
        lengths = expected.view(3, SEQ_LEN).sum(1)
        assert chosen.lengths is not None
        assert torch.equal(chosen.lengths, lengths)
        assert chosen.max_length == int(lengths.max())
        known, _ = old.where(keep, (len(chosen), chosen.max_length))
        assert torch.equal(known.rows(stream.device), chosen.rows(stream.device))
    nothing, indices = chosen.where(torch.zeros(len(chosen), dtype=torch.bool))
    assert (len(nothing), nothing.max_length, len(indices)) == (0, 0, 0)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "expert_choice_aux_router", "token_choice"])
def test_nothing_is_read_from_the_device(router: str, kv_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device reading a value raises, and so shows every read that would make a GPU wait."""
    sent: list[Tensor] = []

    class Sizes:
        """The sizes that token-choice reads from the device, once."""

        def __init__(self, numbers: Tensor) -> None:
            assert numbers.shape == (3, 2), "asked the device for the size of a set"
            sent.append(numbers)

        def tolist(self) -> list[list[int]]:
            return [[72, 24], [50, 20], [20, 9]]

    monkeypatch.setattr(plan, "Incoming", Sizes)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # autocast doesn't support the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(geometry, "has_packed_kernel", lambda *_: True)
    model = build_model(tiny_config(ROUTERS[router], kv_policy), device="meta")
    out = model(tokens().to("meta"), mode="train")
    assert out.logits is not None
    assert [numbers.shape for numbers in sent] == ([(3, 2)] if router == "token_choice" else [])
