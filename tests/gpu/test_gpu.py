"""What only a GPU can show: bf16 kernels, packed attention, compiled blocks, memory, and no synchronisation.

Run `python -m pytest tests/gpu` on a machine with a CUDA device; it takes a few minutes, mostly compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from megamor.config import Config, OptimConfig, ParallelConfig, TrainConfig
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model import layouts as geometry
from megamor.model.attention import AttentionLayout, Grid, Segments, has_packed_kernel, packed_attention
from megamor.model.loss import linear_cross_entropy
from megamor.optim import build_adamw
from megamor.parallel import World, build_backend, close_world, init_world
from megamor.routing import TokenSet
from megamor.routing.plan import Incoming
from megamor.train.step_statistics import StepStatistics
from tests.combinations import KV_POLICIES, ROUTERS, SEQ_LEN, tiny_config, tokens, vanilla_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 24, [0] + [1] * 11 + [2] * 12])
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_compiled_code_from_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.cuda.set_sync_debug_mode("default")


def model_of(config: Config) -> Transformer:
    """A model on the CPU whose activations are of order one."""
    model = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "router" not in name:
                parameter.mul_(4)
    return model


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(CUDA)


def in_bf16(model: Transformer, inputs: Tensor, *rest: Any, **more: Any) -> ModelOutput:
    with torch.autocast("cuda", torch.bfloat16):
        return model(inputs.to(CUDA), *rest, **more)


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    return float((got - want).norm() / want.norm())


def gradients(model: Transformer, out: ModelOutput) -> dict[str, Tensor]:
    (out.loss_sum / out.num_tokens + sum(out.router_losses.values())).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_logits_are_close_to_fp32_on_the_cpu(router: str, kv_policy: str, documents: Tensor | None) -> None:
    model = model_of(tiny_config(ROUTERS[router], kv_policy))
    with torch.no_grad():
        want = {mode: model(tokens(), mode=mode, documents=documents) for mode in ("topk", "causal")}
        model.to(CUDA)
        got = {mode: in_bf16(model, tokens(), mode=mode, documents=on_gpu(documents)) for mode in ("topk", "causal")}
    for mode, reference in want.items():
        # Rounding may flip a close routing decision, which changes the token and all tokens that attend to it.
        turned = int((got[mode].depth.cpu() != reference.depth).sum())
        assert turned <= 5, f"{mode}: {turned} of {reference.depth.numel()} tokens took another depth"
        assert relative_error(got[mode].logits, reference.logits) < (0.2 if turned else 0.025), mode


@pytest.mark.parametrize(
    "router", ["token_choice", "ema_threshold", "expert_choice", "skip_forward_recurse", "act_hard"]
)
def test_gradients_are_finite_and_close(router: str) -> None:
    model = model_of(tiny_config(ROUTERS[router]))
    torch.manual_seed(0)
    want = gradients(model, model(tokens(), tokens(1)))
    model.to(CUDA)
    got = gradients(model, in_bf16(model, tokens(), tokens(1).to(CUDA)))
    assert got.keys() == want.keys()
    assert all(gradient.isfinite().all() for gradient in got.values())
    if router != "skip_forward_recurse":  # draws noise on the device
        blocks = [name for name in want if ".ffn." in name or ".attention." in name]
        stacked = [torch.cat([found[name].cpu().flatten() for name in blocks]) for found in (got, want)]
        assert F.cosine_similarity(*stacked, dim=0) > 0.99


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("router", ["token_choice", "ema_threshold", "expert_choice", "act_hard"])
def test_packed_equals_padded_and_masked(
    router: str, documents: Tensor | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(ROUTERS[router])
    windows = replace(config.model, sliding_window=window, sliding_layers=(0, 2) if window else ())
    model = model_of(replace(config, model=windows)).to(CUDA)

    def run() -> tuple[ModelOutput, dict[str, Tensor]]:
        out = in_bf16(model, tokens(), tokens(1).to(CUDA), documents=on_gpu(documents))
        return out, gradients(model, out)

    packed, packed_gradients = run()
    monkeypatch.setattr(geometry, "has_packed_kernel", lambda *_: False)
    masked, masked_gradients = run()
    assert relative_error(packed.loss_sum, masked.loss_sum) < 0.01
    name = "stage.blocks.0.attention.q_proj.weight"
    assert relative_error(packed_gradients[name], masked_gradients[name]) < 0.1


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["each_its_own", "grouped"])
def test_the_kernel_alone(heads: tuple[int, int]) -> None:
    """Forward and backward compared with a padded grid in fp32: empty segments, odd lengths, and a loose bound."""
    lengths = [1, 130, 0, 77, 256, 0]
    total, (num_heads, num_kv_heads) = sum(lengths), heads
    assert has_packed_kernel(CUDA, torch.bfloat16, 64)
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(total, count, 64, device=CUDA, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for count in (num_heads, num_kv_heads, num_kv_heads)
    )
    bounds = F.pad(torch.tensor(lengths, device=CUDA).cumsum(0), (1, 0)).int()
    out = packed_attention(q, k, v, Segments(bounds, 512))
    weights = torch.randn(out.shape, device=CUDA, generator=generator)
    got = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))

    length = max(lengths)
    slots = torch.cat([torch.arange(n, device=CUDA) + length * place for place, n in enumerate(lengths)])
    grid = Grid(len(lengths), length, slots)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want_out = AttentionLayout(grid, grid).attend(*exact)
    want = torch.autograd.grad((want_out * weights.flatten(1)).sum(), exact)
    assert relative_error(out.flatten(1), want_out) < 0.01
    for mine, reference in zip(got, want, strict=True):
        assert relative_error(mine, reference) < 0.02


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "token_choice_loss_free"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_a_step_never_waits_for_the_device(router: str, kv_policy: str, documents: Tensor | None) -> None:
    """Token-choice waits once for its sizes: for the event of a copy that was queued before the first recursion."""
    config = tiny_config(ROUTERS[router], kv_policy)
    config = replace(config, parallel=ParallelConfig(backend="single"), train=replace(config.train, precision="bf16"))
    backend = build_backend(
        model_of(config), config, World(0, 1, 0, CUDA), lambda module: build_adamw(module, config.optim)
    )
    given = {"inputs": tokens().to(CUDA), "labels": tokens(1).to(CUDA), "documents": on_gpu(documents)}
    for mode in ("default", "error"):  # the first step loads kernels and creates workspaces
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)  # waits raise an error
        with backend.forward_context():
            out = backend.model(**given, num_documents=6)
        backend.backward(out.loss_sum + sum(out.router_losses.values()), last_micro_batch=True)
        norm = backend.step(1.0)
        statistics = StepStatistics(3)
        statistics.add(out)
        figures = statistics.reduce(norm, backend.router_square)
    torch.cuda.set_sync_debug_mode("default")
    assert figures.wait().grad_norm > 0


def test_incoming_numbers_are_those_of_their_time() -> None:
    numbers = torch.zeros(3, dtype=torch.int64, device=CUDA)
    busy = torch.randn(4096, 4096, device=CUDA)
    for value in range(5):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        numbers.fill_(value)
        incoming = Incoming(numbers + 1)
        numbers.fill_(-7)
        assert incoming.tolist() == [value + 1] * 3


def test_where_on_the_device() -> None:
    keep = torch.rand(2, SEQ_LEN * 3, generator=torch.Generator().manual_seed(0)) < 0.5
    want, want_indices = TokenSet.all(2, SEQ_LEN * 3).where(keep.flatten())
    got, indices = TokenSet.all(2, SEQ_LEN * 3).where(keep.flatten().to(CUDA))
    assert torch.equal(got.index.cpu(), want.index)
    assert torch.equal(indices.cpu(), want_indices)
    assert (got.max_length, got.lengths.tolist()) == (want.max_length, want.lengths.tolist())


@pytest.mark.parametrize(
    ("router", "kv_policy"),
    [
        ("expert_choice", "recursion_wise"),
        ("expert_choice", "share_first"),
        ("token_choice", "recursion_wise"),
        ("token_choice", "share_first"),
    ],
)
def test_compiled_blocks_are_compiled_once(router: str, kv_policy: str) -> None:
    config = tiny_config(ROUTERS[router], kv_policy)
    model = model_of(config).to(CUDA)
    batches = [(tokens(seed).to(CUDA), tokens(seed + 100).to(CUDA)) for seed in range(8)]
    with torch.no_grad():
        want = [in_bf16(model, *batch).loss_sum for batch in batches]
    for target in model.parallel_plan().compile_targets:
        target.compile()
    graphs = []
    for batch, expected in zip(batches, want, strict=True):
        out = in_bf16(model, *batch)
        gradients(model, out)
        assert relative_error(out.loss_sum, expected) < 0.02
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[3:] == [graphs[3]] * 5, graphs
    assert not any("limit exceeded" in reason for reason in [*counters["unimplemented"], *counters["graph_break"]])


def test_compiled_documents() -> None:
    """Use the packed attention kernel inside a compiled block."""
    model = model_of(vanilla_config()).to(CUDA)
    documents = DOCUMENTS.to(CUDA)
    with torch.no_grad():
        want = in_bf16(model, tokens(), tokens(1).to(CUDA), documents=documents).loss_sum
    for target in model.parallel_plan().compile_targets:
        target.compile(fullgraph=True)
    out = in_bf16(model, tokens(), tokens(1).to(CUDA), documents=documents)
    assert relative_error(out.loss_sum, want) < 0.02
    assert all(gradient.isfinite().all() for gradient in gradients(model, out).values())


@pytest.fixture
def alone() -> Iterator[World]:
    yield init_world(ParallelConfig(backend="fsdp2"))
    close_world()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_fsdp2_on_one_device(router: str, compiled: bool, alone: World) -> None:
    config = replace(
        tiny_config(ROUTERS[router]),
        parallel=ParallelConfig(backend="fsdp2"),
        train=TrainConfig(max_steps=10, compile=compiled, precision="bf16"),
        optim=OptimConfig(lr=1e-3),
    )
    backend = build_backend(
        build_model(config, seed=0), config, alone, lambda module: build_adamw(module, config.optim)
    )
    inputs, labels = tokens().to(CUDA), tokens(1).to(CUDA)
    losses = []
    for step in range(12):
        with backend.forward_context():
            out = backend.model(inputs, labels, step=step)
        backend.backward(out.loss_sum / out.num_tokens + sum(out.router_losses.values()), last_micro_batch=True)
        assert backend.step(1.0).isfinite()
        losses.append(float(out.loss_sum.detach() / out.num_tokens))
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("kernel", ["reference", "triton", "torch"])
def test_the_loss_never_holds_all_logits(kernel: str) -> None:
    """And all ways to compute it agree with fp32."""
    if kernel == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has it from 2.13 on")
    num_tokens, dim, vocab = 32768, 256, 49152
    hidden = torch.randn(num_tokens, dim, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    # Logits of size 1: larger ones are rounded to bf16 with errors that the softmax magnifies.
    weight = (torch.randn(vocab, dim, device=CUDA) / dim**0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (num_tokens,), device=CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    linear_cross_entropy(hidden, weight, labels, kernel=kernel)[0].backward()
    assert torch.cuda.max_memory_allocated(CUDA) - before < 2 * num_tokens * vocab, "more than the logits in bf16"
    exact = [tensor.detach()[:n].float().requires_grad_() for tensor, n in ((hidden, 512), (weight, vocab))]
    want = F.cross_entropy(exact[0] @ exact[1].t(), labels[:512], reduction="sum")
    got, *_ = linear_cross_entropy(hidden[:512], weight, labels[:512], kernel=kernel)
    assert relative_error(got, want) < 0.01
    for ours, theirs in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, exact), strict=True):
        assert relative_error(ours[: len(theirs)], theirs) < 0.01


def test_padding_costs_no_memory_where_rows_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vanilla_config(4)
    model = model_of(replace(config, model=replace(config.model, max_seq_len=4096))).to(CUDA)
    inputs = tokens(batch=4, length=4096).to(CUDA)
    documents = (torch.arange(4096, device=CUDA) // 700).expand(4, -1)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats(CUDA)
        before = torch.cuda.memory_allocated(CUDA)
        with torch.no_grad():
            in_bf16(model, inputs, inputs, documents=documents)
        return torch.cuda.max_memory_allocated(CUDA) - before

    packed = peak()
    monkeypatch.setattr(geometry, "has_packed_kernel", lambda *_: False)
    assert packed < peak() / 2
