"""Models start at the loss of a uniform guess, routers learn from the LM loss, and routing really skips compute."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, ExpertChoiceConfig
from megamor.model import ModelOutput, Transformer, build_model
from megamor.model.buckets import Buckets
from megamor.model.flops import executed_flops
from tests.combinations import (
    BATCH,
    KV_POLICIES,
    ROUTERS,
    SEQ_LEN,
    STRUCTURES,
    fitted,
    tiny_config,
    tokens,
    vanilla_config,
)

TRAINED = {name: config for name, config in ROUTERS.items() if config.kind != "fixed"}


@pytest.mark.promise("R13")
@pytest.mark.parametrize("sharing", STRUCTURES)
@pytest.mark.parametrize("router", ROUTERS)
def test_initial_loss_is_that_of_a_uniform_guess(router: str, sharing: str) -> None:
    config = tiny_config(ROUTERS[router], sharing=sharing)
    model, ids = build_model(config), tokens(length=SEQ_LEN + 1)
    out = model(ids[:, :-1], ids[:, 1:])
    assert abs(out.loss_sum.item() / out.num_tokens.item() - math.log(config.model.vocab_size)) < 0.3


@pytest.mark.promise("R13")
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", TRAINED)
def test_router_learns_from_the_language_model_loss(router: str, kv_policy: str) -> None:
    """After one step of SGD, each trained router parameter has a gradient from the LM loss alone."""
    model, ids = build_model(tiny_config(TRAINED[router], kv_policy)), tokens(length=SEQ_LEN + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)  # some routers sample, and of three documents all may happen to skip
    for _ in range(2):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
        optimizer.step()
    # Learned thresholds have a straight-through gradient.
    gateless = getattr(TRAINED[router], "gating", "weighted") == "additive" and "learned_threshold" not in router
    for name, parameter in model.stage.router.named_parameters():
        taught_by_lm = "aux_router" not in name and not gateless
        gradient = parameter.grad
        assert (gradient is not None and gradient.abs().max() > 0) == taught_by_lm, name


@pytest.mark.promise("R13")
@pytest.mark.parametrize("router", [name for name in TRAINED if "expert" in name])
def test_auxiliary_loss_teaches_every_predictor(router: str) -> None:
    model, ids = build_model(tiny_config(TRAINED[router])), tokens(length=SEQ_LEN + 1)
    out = model(ids[:, :-1], ids[:, 1:])
    sum(out.router_losses.values()).backward()
    predictors = model.stage.router.aux_router or model.stage.router.heads
    for parameter in predictors.parameters():
        assert parameter.grad.abs().max() > 0


def test_training_makes_the_causal_rule_agree_with_top_k() -> None:
    """The auxiliary loss trains the predictor: agreement rises clearly above chance on a fixed batch."""
    config = tiny_config(ExpertChoiceConfig(aux_coeff=1.0))
    ratio = fitted(build_model(config), 60, lr=1e-2, batch=BATCH).ratios["topk_causal_agreement"]
    assert ratio.numerator / ratio.denominator > 0.9


@pytest.mark.promise("R14")
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("router", ["vanilla", *ROUTERS])
def test_executed_flops_match_the_profiler(router: str, kv_policy: str) -> None:
    """megamor's count, with full attention rectangles as the profiler counts them, is within 1 % of torch's."""
    config = vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router], kv_policy)
    model, ids = build_model(config), tokens()
    out, profiled = profile(model, ids)
    work = [] if out.work is None else rectangular_work(config, out)
    counted = executed_flops(config, BATCH, work).forward
    # The profiler counts the whole S x S rectangle in the unshared layers as well.
    num_unshared = config.model.num_layers if router == "vanilla" else 2
    counted += num_unshared * 4 * config.model.dim * BATCH * (SEQ_LEN**2 - SEQ_LEN * (SEQ_LEN + 1) / 2)
    assert profiled == pytest.approx(counted, rel=0.01)


def profile(model: Transformer, ids: Tensor) -> tuple[ModelOutput, int]:
    """A forward pass and torch's count of its FLOPs, with attention as matrix products so that torch counts it."""
    torch.manual_seed(0)  # some routers sample
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(ids)
    return out, counter.get_total_flops()


def rectangular_work(config: Config, out: ModelOutput) -> list[tuple[float, float]]:
    """(tokens, query-key pairs in the padded rectangles that SDPA is given) per recursion, from the depths."""
    work = []
    for recursion in range(out.work.shape[0]):
        lengths = (out.depth > recursion).sum(1)
        if recursion == 0 or config.recursion.kv_policy == "recursion_wise":
            keys = int(lengths.max())
            buckets = Buckets.of(F.pad(lengths.cumsum(0), (1, 0)))
            pairs = sum(segments * length**2 for segments, length in buckets.shapes)
        else:
            pairs = len(lengths) * int(lengths.max()) * keys
        work.append((float(lengths.sum()), float(pairs)))
    return work


@pytest.mark.promise("R14")
def test_flops_fall_in_proportion_to_capacity() -> None:
    ids = tokens()
    totals = []
    for capacity in ((1.0, 1.0, 1.0), (1.0, 0.5, 0.5), (1.0, 0.25, 0.25)):
        model = build_model(tiny_config(ExpertChoiceConfig(capacity=capacity)))
        totals.append(profile(model, ids)[1])
    full, half, quarter = totals
    assert (full - quarter) / (full - half) == pytest.approx(1.5, rel=0.1)
