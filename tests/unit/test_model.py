"""The model compared with independent implementations of what it should compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megamor.config import ModelConfig
from megamor.config.derive import derive
from megamor.config.segments import segments
from megamor.model import Transformer, build_model, elementwise
from megamor.model import layouts as geometry
from megamor.model import loss as loss_module
from megamor.model.blocks import rotary_angles
from megamor.model.loss import linear_cross_entropy, token_scores
from tests.combinations import (
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    SHARINGS,
    lively_model,
    tiny_config,
    tokens,
    vanilla_config,
)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_schedule_follows_the_papers_formulas(sharing: str) -> None:
    """The block that effective layer l uses, written out as in table 1 of the paper."""
    config = tiny_config(ROUTERS["fixed"], sharing=sharing)
    prelude, stage, coda = segments(config)
    num_layers, num_recursions = config.model.num_layers, 3
    found = [block for recursion in stage.schedule for block in recursion]
    if sharing.startswith("middle"):
        middle = range(1, num_layers - 1)
        per_recursion = (num_layers - 2) // num_recursions
        block = {"middle_cycle": lambda i: (i - 1) % per_recursion, "middle_sequence": lambda i: (i - 1) // 3}[sharing]
        assert (prelude.num_blocks, coda.num_blocks) == (1, 1)
    else:
        middle = range(num_layers)
        per_recursion = num_layers // num_recursions
        block = {"cycle": lambda i: i % per_recursion, "sequence": lambda i: i // 3}[sharing]
        assert (prelude.num_blocks, coda.num_blocks) == (0, 0)
    assert found == [block(i) for i in middle]


@pytest.mark.promise("R10")
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("router", ROUTERS)
def test_unique_parameters_follow_the_formula(router: str, sharing: str) -> None:
    config = tiny_config(ROUTERS[router], sharing=sharing)
    model = build_model(config)
    expected = derive(config, 1).unique_parameters_with_embedding
    assert model.num_parameters() == expected
    stored = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
    assert sum(value.numel() for value in stored.values()) == expected


def gradients(model: Transformer, ids: Tensor, mode: str, autocast: bool = False) -> dict[str, Tensor]:
    model.set_activation_checkpointing(mode, ("sdpa", "mm"))
    model.zero_grad()
    torch.manual_seed(0)  # some routers sample
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids[:, :-1], ids[:, 1:])
    (out.loss_sum / out.num_tokens + sum(out.router_losses.values())).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_recomputation(model: Transformer) -> None:
    """No policy of activation checkpointing changes a gradient."""
    ids = tokens(length=SEQ_LEN + 1)
    plain = gradients(model, ids, "none")
    assert plain
    for mode in ("recursion", "block", "selective"):
        again = gradients(model, ids, mode)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_activation_checkpointing_leaves_gradients_identical(router: str, kv_policy: str, sharing: str) -> None:
    check_recomputation(build_model(tiny_config(ROUTERS[router], kv_policy, sharing)))


@pytest.mark.parametrize("mode", ["recursion", "block", "selective"])
def test_checkpointing_under_autocast(mode: str) -> None:
    """Recomputation isn't disturbed by autocast, which caches casts of shared weights across recursions.

    Without the cache, gradients of the recursions are summed in fp32, so only the forward pass is bit-equal.
    """
    model, ids = build_model(tiny_config(ROUTERS["expert_choice"])), tokens(length=SEQ_LEN + 1)
    plain, again = gradients(model, ids, "none", autocast=True), gradients(model, ids, mode, autocast=True)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("mode", ["recursion", "block"])
def test_activation_checkpointing_keeps_fewer_activations(mode: str) -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    model, ids = build_model(config), tokens(length=SEQ_LEN + 1)

    def saved_bytes(mode: str) -> int:
        model.set_activation_checkpointing(mode)
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(ids[:, :-1], ids[:, 1:])
        assert out.loss_sum is not None
        return sum(kept.values())

    assert saved_bytes(mode) < 0.6 * saved_bytes("none")


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_expert_choice_equals_mask_and_multiply(kv_policy: str) -> None:
    """Gather and scatter compared with an oracle that computes all tokens and masks (attention included)."""
    config = tiny_config(ROUTERS["expert_choice"], kv_policy)
    model, ids = lively_model(config), tokens()
    with torch.no_grad():
        out = model(ids, mode="topk")
        expected = masked_oracle(model, ids, out.depth)
    torch.testing.assert_close(out.logits, expected, atol=1e-10, rtol=0)


def masked_oracle(model: Transformer, ids: Tensor, depth: Tensor) -> Tensor:
    """Logits of full-length passes in which unselected keys are masked out and unselected rows stay unchanged."""
    config, kv_policy = model.config.model, model.config.recursion.kv_policy
    stored: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}
    causal = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()

    def rope(x: Tensor) -> Tensor:
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(SEQ_LEN, dtype=torch.float64)[:, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def block(x: Tensor, layer: torch.nn.Module, visible: Tensor) -> Tensor:
        h = norm(x, layer.attention_norm.weight)
        q, k, v = (
            F.linear(h, getattr(layer.attention, f"{name}_proj").weight)
            .unflatten(-1, (-1, config.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        if kv_policy != "recursion_wise" and layer in stored:
            fresh = visible[..., None] & (kv_policy != "share_first")
            k, v = (torch.where(fresh, new, old) for new, old in zip((k, v), stored[layer], strict=True))
            visible = everything[:, None]
        if kv_policy == "halted_reuse" or layer not in stored:
            stored[layer] = k, v
        repeat = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = rope(q) @ rope(k).transpose(-1, -2) / config.head_dim**0.5
        scores = scores.masked_fill(~(visible[:, None] & causal), float("-inf"))
        attended = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, layer.attention.o_proj.weight)
        h = norm(x, layer.ffn_norm.weight)
        ffn = layer.ffn
        return x + F.linear(
            F.silu(F.linear(h, ffn.gate_proj.weight)) * F.linear(h, ffn.up_proj.weight), ffn.down_proj.weight
        )

    everything = torch.ones(*ids.shape, dtype=torch.bool)
    x = block(model.embed.weight[ids], model.prelude[0], everything[:, None])
    for recursion in range(3):
        selected = depth > recursion
        score = F.linear(x, model.stage.router.heads[recursion].weight).squeeze(-1)
        y = x
        for layer in model.stage.blocks:
            y = block(y, layer, selected[:, None])
        gate = 0.1 * torch.sigmoid(score) * selected
        x = x + gate[..., None] * y
    x = block(x, model.coda[0], everything[:, None])
    return F.linear(norm(x, model.norm.weight), model.embed.weight)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", [name for name in ROUTERS if not name.startswith("expert")])
def test_batch_composition_does_not_matter(router: str, kv_policy: str) -> None:
    """Sequences of a batch don't influence each other; ragged lengths and padding don't change results."""
    model, ids = lively_model(tiny_config(ROUTERS[router], kv_policy)), tokens()
    with torch.no_grad():
        together = model(ids, mode="causal").logits
        alone = torch.cat([model(row[None], mode="causal").logits for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


def test_token_budget_of_fixed_depth() -> None:
    """depth 2 of 3 equals a model with the same blocks repeated twice."""
    model, ids = lively_model(tiny_config(ROUTERS["fixed_2_of_3"])), tokens()
    with torch.no_grad():
        out = model(ids)
    assert out.depth.unique().tolist() == [2]
    assert out.work[:, 0].tolist() == [ids.numel(), ids.numel(), 0]


@pytest.mark.parametrize("chunk_elements", [1, 97 * 7, 1 << 25])
def test_linear_cross_entropy_equals_torch(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(97, (50,), generator=generator)
    labels[::5] = -100
    loss = 2 * linear_cross_entropy(hidden, weight, labels)[0]
    reference = 2 * F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(loss, reference)
    ours = torch.autograd.grad(loss, (hidden, weight))
    for found, wanted in zip(ours, torch.autograd.grad(reference, (hidden, weight)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_loss_is_that_of_the_labels_that_count() -> None:
    model, ids = lively_model(tiny_config(ROUTERS["expert_choice"])), tokens(length=SEQ_LEN + 1)
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[:, ::3] = -100
    with torch.no_grad():
        out, logits = model(inputs, labels, mode="topk"), model(inputs, mode="topk").logits
    assert out.num_tokens.item() == (labels != -100).sum().item() < labels.numel()
    torch.testing.assert_close(out.loss_sum, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))


def test_cross_entropy_of_bf16_sums_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal terms of 2,048 chunks: a sum in bf16 stops growing at 256 of them, and its softmax is off by a percent."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, generator=generator).bfloat16().repeat(2048, 1)
    weight = torch.randn(97, 16, generator=generator).bfloat16().requires_grad_()
    labels = torch.full((2048,), 5)
    loss, *_ = linear_cross_entropy(hidden, weight, labels)
    logits = F.linear(hidden[:1], weight).double()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2048 * F.cross_entropy(logits, labels[:1]).item(), rel=1e-4)
    (found,) = torch.autograd.grad(loss, weight)
    wanted = 2048 * (logits.softmax(1) - F.one_hot(labels[:1], 97)).t() @ hidden[:1].double()
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-3)


def test_logits_are_never_whole_in_memory() -> None:
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(50_000, 8, requires_grad=True)
    peak = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                peak = max(peak, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long))[0].backward()
    assert peak <= loss_module.CHUNK_ELEMENTS < 4096 * 50_000


def test_vanilla_has_no_recursion_stage() -> None:
    model, ids = build_model(vanilla_config()), tokens()
    out = model(ids, ids)
    assert model.stage is None
    assert out.depth is None
    assert out.router_losses == {}
    assert len(model.parallel_plan().units) == 8


def test_weights_depend_on_the_seed_alone() -> None:
    config = tiny_config(ROUTERS["expert_choice"])
    same, other = build_model(config, seed=1), build_model(config, seed=2)
    assert torch.equal(same.embed.weight, build_model(config, seed=1).embed.weight)
    assert not torch.equal(same.embed.weight, other.embed.weight)
    assert same.embed.weight.std().item() == pytest.approx(config.model.init_std, rel=0.1)


@pytest.mark.parametrize("chunk_elements", [1, 1 << 25])
def test_token_scores_of_single_labels(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamor.model.loss.CHUNK_ELEMENTS", chunk_elements)
    hidden, weight = torch.randn(9, 8), torch.randn(12, 8)
    labels = torch.randint(12, (9,))
    labels[0] = (hidden[0] @ weight.t()).argmax()
    labels[4] = -100
    distribution = torch.distributions.Categorical(logits=hidden @ weight.t())

    nll, entropy, correct = token_scores(hidden, weight, labels)

    valid = labels != -100
    torch.testing.assert_close(nll[valid], -distribution.log_prob(labels.clamp_min(0))[valid])
    torch.testing.assert_close(entropy[valid], distribution.entropy()[valid])
    assert (nll[4], entropy[4], correct[4]) == (0, 0, False)
    assert correct[0]
    assert correct.tolist() == (((hidden @ weight.t()).argmax(1) == labels) & valid).tolist()
    torch.testing.assert_close(nll.sum(), linear_cross_entropy(hidden, weight, labels)[0])


def test_a_forward_pass_scores_tokens_on_request() -> None:
    model = build_model(tiny_config(ROUTERS["expert_choice"])).eval()
    inputs, labels = torch.randint(64, (3, 12)), torch.randint(64, (3, 12))

    for lengths in (None, (12, 5, 0), (0, 0, 0)):
        out = model(inputs, labels, mode="causal", lengths=lengths, score_tokens=True)
        assert out.scores is not None
        assert out.scores.nll.shape == (3, 12)
        torch.testing.assert_close(out.scores.nll.sum(), out.loss_sum)
        if lengths:
            assert not out.scores.nll[1, lengths[1] :].any()
    assert model(inputs, labels, mode="causal").scores is None


@pytest.mark.parametrize("function", ["rms_norm", "rotate"])
def test_hand_written_gradients(function: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    if function == "rms_norm":
        arguments = (random(7, 12), random(12))
        assert torch.autograd.gradcheck(lambda x, w: elementwise.rms_norm(x, w, 1e-5), arguments)
        found, wanted = elementwise.rms_norm(*arguments, 1e-5), F.rms_norm(arguments[0], (12,), arguments[1], 1e-5)
    else:
        shape = ModelConfig(head_width=8, rope_theta=10.0)
        x, angles = random(5, 3, 8), rotary_angles(torch.arange(5), shape, torch.float64)
        assert torch.autograd.gradcheck(angles.rotate, (x,))
        found = angles.rotate(x)
        wanted = x * angles.cos + torch.cat((x[..., 4:], x[..., :4]), -1) * angles.signed_sin
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kv_policy", ["share_first", "hybrid", "halted_reuse"])
def test_chunked_queries_change_nothing(kv_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lively_model(tiny_config(ROUTERS["expert_choice"], kv_policy)), tokens()
    found = []
    for rows_per_chunk in (geometry.ROWS_PER_CHUNK, 3):
        monkeypatch.setattr(geometry, "ROWS_PER_CHUNK", rows_per_chunk)
        monkeypatch.setattr(geometry, "KEY_MULTIPLE", 1)
        logits = model(ids, mode="topk").logits
        gradients = torch.autograd.grad(logits.square().mean(), list(model.stage.blocks.parameters()))
        found.append([logits, *gradients])
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=1e-9)
