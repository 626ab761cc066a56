"""The engine on torch's meta device, as a stand-in for a GPU.

There, a tensor left on the host and any read of the device's data is an error. The results that the host needs (which
rows continue, which tokens were sampled) are invented.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megamor.load import cast
from megamor.model import build_model
from megamor.routing import plan
from megamor.serve.engine import attention, gpu_kernels, paged_kernel, runner
from megamor.serve.engine import engine as engine_module
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.flight import RECURSION
from megamor.serve.engine.request import SamplingParams
from megamor.serve.options import POLICIES, EngineOptions
from tests.combinations import ROUTERS, SERVED_ROUTERS, tiny_config
from tests.serve.test_equality import SERVED

PROMPT = [1, 2, 3, 4, 5, 6, 7]
REQUESTS = (
    SamplingParams(max_tokens=6, temperature=0, logprobs=2),
    SamplingParams(max_tokens=6, temperature=0.8, seed=1, top_k=5, top_p=0.9, min_p=0.1, n=2),
    SamplingParams(max_tokens=6, temperature=1, seed=2, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(max_tokens=6, temperature=0, min_tokens=3, stop_token_ids=(5,), prompt_logprobs=1),
)


class Looks:
    """Replaces `Tensor.tolist` and counts its calls."""

    def __init__(self) -> None:
        self.count = 0
        self.continues = True

    def at(self, tensor: Tensor) -> Any:
        """Numbers of the right shape: most rows continue, token 1 is sampled."""
        assert tensor.device.type == "meta"
        self.count += 1
        if tensor.dtype == torch.bool:
            return [self.continues and (row + self.count) % 3 > 0 for row in range(len(tensor))]
        return torch.ones(tensor.shape).int().numpy().tolist()


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    owners: Tensor,
    ends: Tensor,
    begins: Tensor | None,
    splits: int | None,
    starts: Tensor | None,
) -> Tensor:
    """Replaces the paged kernel; checks what the kernel relies on."""
    assert {tensor.device.type for tensor in (q, k, v, tables, owners, ends)} == {"meta"}
    assert {tensor.dtype for tensor in (tables, owners, ends)} == {torch.int64}
    assert tables.is_contiguous()
    assert begins is None  # without a sliding window
    assert splits is None
    if starts is not None:
        assert (starts.device.type, starts.dtype) == ("meta", torch.int64)
        assert 1 < len(starts) <= len(owners)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert q.shape[0] == len(owners) == len(ends)
    return torch.empty_like(q)


class Launches:
    """Replaces a kernel that is launched as `kernel[grid](...)`; checks where its tensors are, and counts launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert all(tensor.is_contiguous() for tensor in tensors)
        self.count += 1


@pytest.mark.parametrize("recorded", [False, True], ids=["alone", "recorded"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_the_host_waits_only_for_rows_and_tokens(
    router: str, policy: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads from the device once per core batch, however many depths it contains.

    Where tokens are read late, it reads those of the last exit too, and of prompts whether they are numbers. Both have
    arrived long before.
    """
    looks = Looks()

    class Arrived(NamedTuple):
        numbers: Tensor

        def tolist(self) -> Any:
            return looks.at(self.numbers)

    class Drawn(Arrived):
        def tolist(self) -> Any:
            """Rows are numbers, and token 1 is drawn."""
            found = super().tolist()
            return [True] * len(found) if self.numbers.dtype == torch.bool else found

    monkeypatch.setattr(Tensor, "tolist", lambda tensor: looks.at(tensor))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no support for the meta device
    monkeypatch.setattr(plan, "Incoming", lambda numbers: None)  # its copy is never waited for
    monkeypatch.setattr(runner, "Incoming", Arrived)
    monkeypatch.setattr(engine_module, "Incoming", Drawn)
    monkeypatch.setattr(attention, "reads_in_place", lambda device: True)
    monkeypatch.setattr(paged_kernel, "paged_attention", kernel)
    launches = {name: Launches() for name in ("norm_row", "gate_row", "rotate_and_store")}
    for name, launch in launches.items():
        monkeypatch.setattr(gpu_kernels, name, launch)
    kv_policy = SERVED[POLICIES.index(policy) % 2]
    model = cast(build_model(tiny_config(ROUTERS[router], kv_policy), device="meta"), torch.bfloat16)
    options = EngineOptions(policy, max_resident=3, chunk_size=4, kv_memory=1 << 22, read_late=recorded)  # type: ignore[arg-type]
    engine = ServingEngine(model, options)
    if recorded:
        engine.record_graphs(lambda run: (run(), lambda: None))
    for params in REQUESTS:
        engine.add_request(PROMPT, params)
    outputs, depths = [], set[int]()
    while engine.has_work:
        before = looks.count
        depths.add(len({*engine.scheduler.flight.rows[RECURSION, engine.scheduler.core].tolist()}))
        batches = engine.accounting.total.launches["core"]
        outputs += engine.step()
        if engine.accounting.total.launches["core"] > batches:
            assert looks.count - before <= 1 + 2 * engine.reads_late
    assert sum(len(output.tokens) for output in outputs) == 5 * 6
    blocks = launches["gate_row"].count
    assert (launches["norm_row"].count, launches["rotate_and_store"].count) == (2 * blocks, blocks)
    assert blocks > 0
    looks.continues = False  # invented rows don't respect bounds
    engine.add_request(PROMPT, SamplingParams(max_tokens=6, temperature=0, max_depth=2))
    while engine.has_work:
        engine.step()
    assert policy != "depthwise" or router.startswith(("fixed", "act_soft")) or max(depths) > 1
