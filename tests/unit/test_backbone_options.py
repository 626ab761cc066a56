"""QK-norm, the z-loss of the logits, input injection, residual scaling and truncated backpropagation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, DiagnosisConfig, FixedDepthConfig, GuardConfig, RandomConfig
from megamor.config.derive import derive
from megamor.model import Transformer, build_model
from megamor.model import loss as loss_module
from megamor.model.flops import executed_flops, nominal_flops
from megamor.model.loss import linear_cross_entropy
from megamor.optim import build_param_groups
from megamor.plan.memory import step_memory
from megamor.serve.options import POLICIES
from megamor.train.diagnosis import Diagnosis
from megamor.train.guard import Guard
from megamor.train.step_statistics import StepSummary
from tests.combinations import BATCH, KV_POLICIES, ROUTERS, SEQ_LEN, lively_model, tiny_config, tokens, vanilla_config
from tests.decoding.test_cached_decoding import check as check_decoding
from tests.serve.test_equality import Schedule, expected
from tests.serve.test_equality import check as check_serving
from tests.unit.test_memory_model import assert_close, measured_peak, step_config

NOISY: dict[str, Any] = {"input_injection": True, "residual_scaling": "inverse_sqrt", "separate_norms": True}


def config_with(router: str, kv_policy: str = "recursion_wise", qk_norm: bool = True, **recursion: Any) -> Config:
    config = tiny_config(ROUTERS[router], kv_policy)
    model = replace(config.model, qk_norm=qk_norm)
    return replace(config, model=model, recursion=replace(config.recursion, **recursion))


def shaken(model: Transformer) -> Transformer:
    """Give norms and injections values that differ from their initial ones, each its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "router" not in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_qk_norm_by_hand() -> None:
    """A model of one layer, computed anew: heads are normalised before they are rotated."""
    config = vanilla_config(1)
    config = replace(config, model=replace(config.model, qk_norm=True, num_kv_heads=4))
    model, ids = shaken(lively_model(config)), tokens()
    (block,), shape = model.prelude, config.model

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:  # [B, S, heads, 8]
        angles = torch.outer(torch.arange(SEQ_LEN).double(), 1e4 ** -(torch.arange(4).double() / 4)).unsqueeze(1)
        first, second = x.chunk(2, -1)
        turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.cat(turned, -1)

    x = model.embed(ids)
    attention, normed = block.attention, norm(x, block.attention_norm.weight)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = ((normed @ projection.weight.t()).unflatten(-1, (4, 8)) for projection in projections)
    q, k = rotated(norm(q, attention.q_norm.weight)), rotated(norm(k, attention.k_norm.weight))
    out = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)), is_causal=True)
    x = x + out.transpose(1, 2).flatten(2) @ attention.o_proj.weight.t()
    hidden = norm(x, block.ffn_norm.weight)
    hidden = F.silu(hidden @ block.ffn.gate_proj.weight.t()) * (hidden @ block.ffn.up_proj.weight.t())
    x = norm(x + hidden @ block.ffn.down_proj.weight.t(), model.norm.weight)
    torch.testing.assert_close(model(ids).logits, x @ model.embed.weight.t())


@pytest.mark.parametrize("router", ["vanilla", "expert_choice"])
def test_qk_norm_adds_what_the_formula_says(router: str) -> None:
    base = vanilla_config() if router == "vanilla" else config_with(router, qk_norm=False, separate_norms=True)
    config = replace(base, model=replace(base.model, qk_norm=True))
    model = build_model(config)
    assert model.num_parameters() == derive(config, 1).unique_parameters_with_embedding
    # Two weights of 8 in each of 8 blocks, or in 2 + 2 · 3 of them.
    assert model.num_parameters() - build_model(base).num_parameters() == 8 * 2 * 8
    undecayed = [group for group in build_param_groups(model, config.optim) if not group["weight_decay"]]
    assert all(parameter.ndim == 1 for group in undecayed for parameter in group["params"])


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_cached_decoding(kv_policy: str) -> None:
    model = shaken(lively_model(config_with("expert_choice", kv_policy, **NOISY)))
    check_decoding(model, [9] + [1] * (SEQ_LEN - 9))


def test_the_future_is_invisible() -> None:
    model, ids = shaken(lively_model(config_with("token_choice", **NOISY))), tokens()
    changed = torch.cat((ids[:, :15], (ids[:, 15:] + 1) % 97), 1)
    with torch.no_grad():
        before, after = (model(x, mode="causal").logits[:, :15] for x in (ids, changed))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "act_hard"])
def test_serving(router: str, limit: int | None) -> None:
    model = shaken(lively_model(config_with(router, **NOISY)))
    model.limit_recursions(limit)
    wanted = expected(model)
    for policy in POLICIES:
        check_serving(model, Schedule(policy, page_size=3, chunk_size=4), wanted)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("inverse_sqrt", 3**-0.5), ("inverse", 1 / 3)])
def test_residual_scaling_scales_what_shared_blocks_add(scaling: str, factor: float) -> None:
    """The same as projections to the stream with scaled weights; unshared blocks stay as they are."""
    model = lively_model(config_with("fixed", qk_norm=False, residual_scaling=scaling))
    plain = lively_model(config_with("fixed", qk_norm=False))
    with torch.no_grad():
        for block in plain.stage.blocks:
            block.attention.o_proj.weight.mul_(factor)
            block.ffn.down_proj.weight.mul_(factor)
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


def test_injection_by_hand() -> None:
    """Each recursion's core sees (1 + w0) · x + w1 · x0; a zero core that keeps its input shows it."""
    model = lively_model(config_with("fixed", qk_norm=False, input_injection=True))
    weights = [(0.5, -0.25), (-0.5, 2.0), (1.0, 0.125)]
    with torch.no_grad():
        for block in model.stage.blocks:
            block.attention.o_proj.weight.zero_()
            block.ffn.down_proj.weight.zero_()
        for parameter, values in zip(model.stage.injection, weights, strict=True):
            parameter.copy_(torch.tensor(values))
    seen: list[Tensor] = []
    model.stage.register_forward_hook(lambda stage, inputs, output: seen.extend((inputs[0], output.stream)))
    model(tokens())
    share = 1.0
    for own, first in weights:
        share = (1 + own) * share + first
    torch.testing.assert_close(seen[1], share * seen[0])


@pytest.mark.parametrize("chunk_elements", [97 * 7, 1 << 25])
def test_z_loss_equals_torch(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(97, (50,), generator=generator)
    labels[::5] = -100
    loss, z_loss, *_ = linear_cross_entropy(hidden, weight, labels, z_coeff=0.3)
    logits = hidden @ weight.t()
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    wanted_z = 0.3 * (logits.logsumexp(1).square() * (labels != -100)).sum()
    torch.testing.assert_close(loss, cross_entropy)
    torch.testing.assert_close(z_loss, wanted_z)
    wanted = torch.autograd.grad(2 * (cross_entropy + wanted_z), (hidden, weight))
    for found, gradient in zip(torch.autograd.grad(2 * loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_z_loss_is_one_of_training() -> None:
    config = config_with("fixed")
    config = replace(config, train=replace(config.train, z_loss_coeff=0.1))
    model, ids = lively_model(config), tokens()
    with torch.no_grad():
        trained, evaluated = model(ids, ids), model(ids, ids, mode="causal")
    assert trained.z_loss_sum > 0
    assert evaluated.z_loss_sum is None
    torch.testing.assert_close(trained.loss_sum, evaluated.loss_sum)


def test_the_stream_is_watched() -> None:
    """Its RMS before and after each recursion, and an alarm when one is too many times as large as at first."""
    model, ids = lively_model(config_with("fixed", qk_norm=False)), tokens()
    seen: list[Tensor] = []
    model.stage.register_forward_hook(lambda stage, inputs, output: seen.extend((inputs[0], output.stream)))
    with torch.no_grad():
        ratios = model(ids, ids).ratios
        assert not any("stream" in name for name in model(ids, ids, mode="causal").ratios)
    for name, stream in (("stream_rms_0", seen[0]), ("stream_rms_3", seen[1])):
        found = ratios[name].numerator / ratios[name].denominator
        torch.testing.assert_close(found, stream.square().mean(-1).sqrt().mean().float())
    settings = DiagnosisConfig(steps=2, stream_factor=10.0, dead_router="off")
    diagnosis = Diagnosis(replace(model.config, diagnosis=settings), {}, torch.device("cpu"))
    guard, warned = Guard(GuardConfig()), []
    for step, largest in enumerate((19.9, 20.1, 19.9, 20.1, 20.1, 20.1), start=1):
        rms = {"stream_rms_0": 2.0, "stream_rms_1": largest, "stream_rms_3": 1.0}
        summary = StepSummary(1.0, 1, {}, rms, [], [], grad_norm=1.0)
        warned += [(step, warning) for warning in diagnosis.observe(step, summary, guard, [])]
    assert [step for step, _ in warned] == [5]
    assert "stream norm (the stream's RMS grows 10.1-fold)" in warned[0][1]


def truncated(last: int | None, router: Any = None, **recursion: Any) -> Config:
    config = tiny_config(router or FixedDepthConfig(), sharing="cycle")
    return replace(config, recursion=replace(config.recursion, backprop_recursions=last, **recursion))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_truncated_gradients_are_those_of_the_last_layers(last: int) -> None:
    """A vanilla model with the same blocks one after another tells the gradient of each application apart."""
    tied, untied, ids = lively_model(truncated(last)), lively_model(vanilla_config(6)), tokens(length=SEQ_LEN + 1)
    with torch.no_grad():
        untied.embed.weight.copy_(tied.embed.weight)
        for number, block in enumerate(untied.prelude):
            block.load_state_dict(tied.stage.blocks[number % 2].state_dict())
    first_tracked, inputs = 6 - 2 * last, list[Tensor]()
    untied.prelude[first_tracked].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    losses = [model(ids[:, :-1], ids[:, 1:]).loss_sum for model in (tied, untied)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    (at_input,) = torch.autograd.grad(losses[1], inputs[0], retain_graph=True)
    for loss in losses:
        loss.backward()
    for number, block in enumerate(tied.stage.blocks):
        copies = [untied.prelude[layer] for layer in range(first_tracked + number, 6, 2)]
        for name, parameter in block.named_parameters():
            wanted = sum(copy.get_parameter(name).grad for copy in copies)
            torch.testing.assert_close(parameter.grad, wanted)
    # What comes before learns as if the recursions without gradients were the identity.
    rows = torch.zeros_like(tied.embed.weight).index_add_(0, ids[:, :-1].flatten(), at_input)
    if last < 3:
        hidden = untied.norm(untied_stream(untied, ids[:, :-1])).detach()
        head = torch.zeros_like(untied.embed.weight, requires_grad=True)
        weight = untied.embed.weight.detach() + head
        F.cross_entropy(hidden @ weight.t(), ids[:, 1:].flatten(), reduction="sum").backward()
        torch.testing.assert_close(tied.embed.weight.grad, rows + head.grad)


def untied_stream(model: Transformer, ids: Tensor) -> Tensor:
    """The stream [T, dim] before the final norm."""
    found: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda norm, args: found.append(args[0]))
    model(ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", [FixedDepthConfig(), RandomConfig(gates="open")])
@pytest.mark.parametrize("policy", ["none", "recursion", "block"])
def test_truncation_trains_all_blocks(router: Any, precision: str, policy: str) -> None:
    """Under autocast too, which could hand a weight's copy made without gradients to the recursions that have some."""
    model, ids = build_model(truncated(1, router)), tokens(length=SEQ_LEN + 1)
    model.set_activation_checkpointing(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


class Saved:
    """The bytes that a forward pass saves for the backward pass."""

    bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor


def test_truncation_saves_memory_and_flops() -> None:
    kept, counted, estimated = [], [], []
    ids = tokens(length=SEQ_LEN + 1)
    for last in (1, 2, 3):
        config = truncated(last)
        model, saved = build_model(config), Saved()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                out = model(ids[:, :-1], ids[:, 1:])
            out.loss_sum.backward()
        kept.append(saved.bytes)
        flops = executed_flops(config, BATCH, out.work.tolist())
        square = BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2) * 4 * config.model.dim
        counted.append((counter.get_total_flops(), flops.training + square * (6 + 2 * 2 * last)))
        big = replace(config, model=replace(config.model, dim=512, ffn_dim=1024, num_layers=30))
        estimated.append(step_memory(big, 1, on_gpu=False).activations)
    assert kept[1] - kept[0] == pytest.approx(kept[2] - kept[1], rel=0.02)
    assert kept[0] < 0.5 * kept[2]
    assert estimated[0] < 0.4 * estimated[2]
    for profiled, ours in counted:
        assert profiled == pytest.approx(ours, rel=0.01)
    plain, shallow = nominal_flops(truncated(None)), nominal_flops(truncated(1))
    assert shallow.forward == plain.forward
    for policy in ("recursion", "block", "selective"):
        train = replace(truncated(1).train, activation_checkpointing=policy)  # type: ignore[arg-type]
        assert shallow.recomputed(train) == pytest.approx(plain.recomputed(train) / 3)


@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "changes"), [("expert_choice", {"input_injection": True}), ("fixed", {"backprop_recursions": 1})]
)
def test_the_plan_knows_the_memory(model: str, changes: dict[str, Any], precision: str, policy: str) -> None:
    config = step_config("wide", model, policy, precision)
    qk_norm = replace(config.model, qk_norm="input_injection" in changes)
    config = replace(config, model=qk_norm, recursion=replace(config.recursion, **changes))
    assert_close(step_memory(config, 1, on_gpu=False), measured_peak(config))
