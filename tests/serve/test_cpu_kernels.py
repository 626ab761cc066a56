"""The compiled kernels for a CPU: as torch computes it, alone and in the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.model.blocks import RotaryAngles
from megamor.serve.engine import cpu_kernels
from megamor.serve.engine.attention import PagedKeysValues
from megamor.serve.engine.cpu_kernels import LANES, Kernels, Sight, compiled, kernels_for
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.request import RequestOutput, SamplingParams
from megamor.serve.options import EngineOptions
from tests.combinations import ROUTERS, SERVED_ROUTERS, lively_model, tiny_config, tokens, vanilla_config
from tests.serve.reference import replayed_logprobs
from tests.serve.test_equality import call_again

EXACT = {torch.float32: 3e-6, torch.bfloat16: 0.02}
pytestmark = pytest.mark.skipif(isinstance(compiled(), str), reason=f"kernels of the CPU: {compiled()}")


def kernels(dtype: torch.dtype, head_dim: int = 64, grouped: int = 4, page_size: int = 16) -> Kernels:
    found = kernels_for(dtype, head_dim, grouped, page_size)
    assert isinstance(found, Kernels)
    return found


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_norms_and_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # 77 is no multiple of the lanes, and so many rows are worth a team of threads.
    x, weight, gate_up = (3 * torch.randn(*shape).to(dtype) for shape in ((300, 77), (77,), (300, 2 * 77)))
    x[2] *= 1e-3  # where eps counts
    want = F.rms_norm(x.float(), (77,), weight.float(), 1e-5)
    exact = {torch.float32: 3e-6, torch.bfloat16: 1.02 * 2**-8}[dtype]  # rounded to nearest, once
    torch.testing.assert_close(kernels(dtype).rms_norm(x, weight, 1e-5).float(), want, rtol=exact, atol=1e-6)
    gate_up[0, :6] = torch.tensor([-1e4, -100.0, -88.0, 88.0, 100.0, 1e4])
    gate, up = gate_up.float().chunk(2, dim=1)
    out = kernels(dtype).swiglu(gate_up).float()
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=exact, atol=1e-6)
    gate_up[1, 0] = x[1, 0] = float("nan")
    assert kernels(dtype).swiglu(gate_up)[1].isnan().tolist() == [True] + 76 * [False]
    assert kernels(dtype).rms_norm(x, weight, 1e-5)[1].isnan().all()


class Cache:
    """Pages of the kernels, and the same entries in fp32 by address."""

    def __init__(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
        num_pages, self.size, self.heads, self.kv_heads = 30, page_size, heads, kv_heads
        self.kernels = kernels(dtype, head_dim, heads // kv_heads, page_size)
        self.k_pages = torch.zeros(num_pages, kv_heads, page_size // LANES, head_dim, LANES, dtype=dtype)
        self.v_pages = torch.zeros(num_pages, page_size, kv_heads, head_dim, dtype=dtype)
        self.pages = PagedKeysValues(self.k_pages, self.v_pages, torch.empty(0), None)
        self.k, self.v = (torch.zeros(num_pages * page_size, kv_heads, head_dim) for _ in "kv")
        self.tables = torch.randperm(num_pages).view(3, -1).int().numpy()

    def addresses(self, owner: int, entries: np.ndarray) -> np.ndarray:
        return self.tables[owner, entries // self.size].astype(np.int64) * self.size + entries % self.size

    def compare(self, owners: list[int], ends: list[int], window: int = 0) -> None:
        """Row i writes entry ends[i] - 1 of its owner, and sees it and those before, with a window only the last."""
        begins = [max(0, end - window) if window else 0 for end in ends]
        where = np.concatenate(
            [self.addresses(*pair) for pair in zip(owners, np.array(ends)[:, None] - 1, strict=True)]
        )
        half = torch.rand(len(owners), 1, self.v_pages.shape[3] // 2) * 6
        angles = RotaryAngles(torch.cat((half.cos(), half.cos()), -1), torch.cat((-half.sin(), half.sin()), -1))
        qkv = torch.randn(len(owners), self.heads + 2 * self.kv_heads, self.v_pages.shape[3]).to(self.v_pages.dtype)
        rotated = angles.rotate(qkv[:, : -self.kv_heads].float()).to(qkv.dtype).float()
        self.k[where], self.v[where] = rotated[:, self.heads :], qkv[:, -self.kv_heads :].float()
        sight = Sight.of(self.tables, where, np.array(owners), np.array(ends), np.array(begins) if window else None)
        out = self.kernels.attend(qkv, angles, sight, self.pages)
        for row, (owner, begin, end) in enumerate(zip(owners, begins, ends, strict=True)):
            seen = self.addresses(owner, np.arange(begin, end))
            keys, values = (store[seen].transpose(0, 1) for store in (self.k, self.v))
            want = attention(rotated[row, : self.heads], keys, values).flatten()
            exact = EXACT[qkv.dtype]
            torch.testing.assert_close(out[row].float(), want, rtol=exact, atol=exact, msg=f"row {row} of {owners}")


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [heads, head_dim], keys and values [kv_heads, T, head_dim]."""
    grouped = q.unflatten(0, (len(keys), -1))
    return F.scaled_dot_product_attention(grouped, keys, values).flatten(0, 1)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 64, 16), (6, 2, 32, 32), (4, 4, 128, 16), (32, 1, 16, 48)], ids=str)
def test_attention_reads_pages_in_place(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    cache = Cache(dtype, *shape)
    full = cache.tables.shape[1] * cache.size
    cache.compare([0] * full, [*range(1, full + 1)])  # a prompt, longer than a task
    cache.compare([1] * 70, [*range(1, 71)])
    cache.compare([2] * 33 + [0], [*range(1, 34), full])  # a prompt beside decoding
    cache.compare([1, 0, 2], [71, full, 34])
    cache.compare([0, 1, 2, *[1] * 20], [full, 72, 35, *range(73, 93)], window=20)
    cache.compare([1], [93])


def test_a_row_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    alone, together = Cache(torch.float32, 8, 2, 64, 16), Cache(torch.float32, 8, 2, 64, 16)
    for cache in (alone, together):
        cache.tables = np.arange(30, dtype=np.int32).reshape(3, 10)
    qkv, angles = torch.randn(40, 12, 64), RotaryAngles(torch.ones(40, 1, 64), torch.zeros(40, 1, 64))
    ends = np.arange(1, 41)

    def outs(cache: Cache, rows: slice) -> Tensor:
        sight = Sight.of(cache.tables, ends[rows] - 1, np.zeros(40, np.int64)[rows], ends[rows])
        own = RotaryAngles(angles.cos[rows], angles.signed_sin[rows])
        return cache.kernels.attend(qkv[rows].clone(), own, sight, cache.pages)

    want = torch.cat([outs(alone, slice(row, row + 1)) for row in range(40)])
    assert torch.equal(outs(together, slice(None)), want)


def served(engine: ServingEngine, prompts: list[list[int]], count: int) -> dict[int, list[RequestOutput]]:
    params = SamplingParams(max_tokens=count, temperature=0, logprobs=0, ignore_eos=True)
    found: dict[int, list[RequestOutput]] = {engine.add_request(prompt, params): [] for prompt in prompts}
    while engine.has_work:
        for output in engine.step():
            found[output.request].append(output)
    return found


KINDS = [(router, kv) for router in SERVED_ROUTERS for kv in ("recursion_wise", "share_first")]


@pytest.mark.parametrize(("router", "kv_policy"), [*KINDS, ("none", "window")])
@pytest.mark.parametrize("recorded", [False, True], ids=["", "graphs"])
def test_the_engine_gives_the_models_log_probabilities(router: str, kv_policy: str, recorded: bool) -> None:
    config = vanilla_config() if router == "none" else tiny_config(ROUTERS[router], kv_policy)
    config = replace(config, model=replace(config.model, head_width=16, max_seq_len=64))
    if router == "none":
        window = replace(config.model, sliding_window=5, sliding_layers=(0, 2, 3), qk_norm=True)
        config = replace(config, model=window)
    model = lively_model(config, dtype=torch.float32).eval()
    options = EngineOptions(kv_memory=1 << 24, chunk_size=8, max_resident=3, prefix_caching=False)
    engine = ServingEngine(model, options)
    assert isinstance(engine.kernels, Kernels)
    if recorded:
        engine.record_graphs(call_again)
    prompts = [tokens(seed=seed, batch=1, length=5 + 6 * seed)[0].tolist() for seed in range(4)]
    for prompt, outputs in zip(prompts, served(engine, prompts, 8).values(), strict=True):
        text = [*prompt, *(token for output in outputs for token in output.tokens)]
        sequence_depths = depths_of(model, text)
        want = replayed_logprobs(model, text, sequence_depths)
        got = [logprob.logprob for output in outputs for logprob in output.logprobs or ()]
        expected = [want[len(prompt) - 1 + step][text[len(prompt) + step]] for step in range(8)]
        assert len(got) == 8
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=2e-4)


def depths_of(model: torch.nn.Module, text: list[int]) -> list[int]:
    """The depths that the model gives each token of `text`; zero without a router."""
    with torch.no_grad():
        out = model(torch.tensor([text]), mode="causal")
    return [0] * len(text) if out.depth is None else out.depth[0].tolist()


def test_without_a_compiler_torch_attends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    model = lively_model(replace(config, model=replace(config.model, head_width=16)), dtype=torch.float32).eval()
    compiled_now = compiled.__wrapped__
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled_now() == "no no-such-compiler; CXX names another compiler"
    monkeypatch.setattr(cpu_kernels, "compiled", compiled_now)
    engine = ServingEngine(model, EngineOptions(kv_memory=1 << 24))
    assert engine.kernels == "no no-such-compiler; CXX names another compiler"
    assert len(next(iter(served(engine, [[3, 4, 5]], 4).values()))) == 4
    broken = tmp_path / "broken.cpp"
    broken.write_text("not C++", encoding="utf-8")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "SOURCE", broken)
    assert "failed: " in str(compiled_now())
    assert [path.name for path in (tmp_path / "megamor").iterdir()] == []


@pytest.mark.parametrize(
    ("dtype", "head_dim", "grouped", "page_size", "cause"),
    [
        (torch.float64, 64, 4, 16, "not for float64"),
        (torch.float32, 24, 4, 16, "heads of 24"),
        (torch.float32, 64, 4, 8, "pages of 8"),
        (torch.float32, 64, 33, 16, "33 heads"),
    ],
)
def test_what_the_kernels_are_not_for(
    dtype: torch.dtype, head_dim: int, grouped: int, page_size: int, cause: str
) -> None:
    assert cause in str(kernels_for(dtype, head_dim, grouped, page_size))
