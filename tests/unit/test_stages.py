"""Models of several recursion stages: layers, numbers, statistics, and what refuses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamor.cli.verify_checkpoint import faults_of
from megamor.config import (
    Config,
    EmaThresholdConfig,
    FixedDepthConfig,
    ParallelConfig,
    RandomConfig,
    RecursionConfig,
    SkipForwardRecurseConfig,
    StageConfig,
    TokenChoiceConfig,
    config_from_dict,
    config_from_yaml,
    config_to_yaml,
)
from megamor.config.derive import derive
from megamor.config.segments import max_depth, segments, stages
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.evaluate.loss import dataset_losses
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from megamor.model import KVCache, build_model
from megamor.model.flops import executed_flops, nominal_flops
from megamor.plan.memory import step_memory, unit_parameters
from megamor.serve.engine.layers import Layers
from megamor.train.step_statistics import StepStatistics
from tests.combinations import ROUTERS, lively_model, staged_config, tiny_config, tokens
from tests.resume.runs import assert_same_run, directory_of, fit, named, tiny_run, trace, until


def listed(**settings: object) -> Config:
    """A model of 8 unique layers whose `recursion` has these settings, and expert-choice as its router."""
    return config_from_dict(
        {
            "model": {"num_layers": 8},
            "recursion": {"num_recursions": 3, **settings},
            "router": {"kind": "expert_choice", "alpha": 0.5},
            "train": {"max_steps": 100},
        }
    )


def test_router_layers_are_stages_of_one_block_with_settings_of_their_own() -> None:
    config = listed(
        router_layers=[0, 1, 2, 3, 5, 7],
        stages=[
            {"first_layer": 3, "num_recursions": 2, "router": {"head": "mlp"}},
            {"first_layer": 5, "kv_policy": "share_first", "router": {"kind": "token_choice"}},
        ],
    )
    validate(config)
    found = {segment.name: segment for segment in segments(config)}
    assert [*found] == [f"layers_{layer}" for layer in range(8)]
    assert [len(segment.schedule) for segment in found.values()] == [3, 3, 3, 2, 0, 3, 0, 3]
    # A router without a kind adds to the model's; one of another kind replaces it.
    assert found["layers_3"].config.router == replace(config.router, head="mlp")  # type: ignore[call-arg]
    assert found["layers_5"].config.router == TokenChoiceConfig()
    assert found["layers_5"].config.recursion.kv_policy == "share_first"
    assert found["layers_7"].config.router == config.router
    assert max_depth(config) == 17
    assert config_from_yaml(config_to_yaml(config), "test") == config


def test_a_listed_stage_is_the_model_with_one_stage() -> None:
    """Prelude 1, core 2 x 3, coda 1: written as a list, the same weights give the same numbers."""
    one = tiny_config(ROUTERS["expert_choice"])
    stage = StageConfig(first_layer=1, num_layers=2)
    many = replace(
        one, model=replace(one.model, num_layers=4), recursion=RecursionConfig(num_recursions=3, stages=(stage,))
    )
    model, other = lively_model(one), build_model(many).double()
    names = {"prelude": "layers_0", "stage": "layers_1", "coda": "layers_3"}
    weights = {
        name.replace(a, b, 1): w for name, w in model.state_dict().items() for a, b in names.items() if a in name
    }
    other.load_state_dict({**model.state_dict(), **weights}, strict=False)
    ids = tokens()
    before, after = model(ids, ids), other(ids, ids)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert before.loss_sum == after.loss_sum
    assert torch.equal(before.work, after.work)
    assert after.ratios.keys() == {f"layers_1/{name}" for name in before.ratios}
    assert derive(one, 1).unique_parameters == derive(many, 1).unique_parameters
    assert derive(one, 1).effective_parameters == derive(many, 1).effective_parameters
    assert nominal_flops(one) == nominal_flops(many)
    assert step_memory(one, 2).total == step_memory(many, 2).total


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "act_hard", "skip_forward_recurse"])
def test_parameters_and_flops_are_counted_stage_by_stage(router: str) -> None:
    config = staged_config(ROUTERS[router])
    model, ids = build_model(config), tokens(batch=1)
    assert model.num_parameters() == derive(config, 1).unique_parameters_with_embedding
    counts = unit_parameters(config)
    assert sum(counts.values()) == model.num_parameters()
    assert [*counts] == ["layers_0", "layers_1.0", "layers_2", "layers_4", "layers_5.0", "root"]
    # Attention aside, which the profiler doesn't see in fused kernels: rows that are really computed.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, mode="causal")
    work = [(float(tokens), 0.0) for tokens, _ in out.work.tolist()]
    counted = executed_flops(config, 1, work, pairs=0.0).forward
    profiled = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    assert profiled == pytest.approx(counted, rel=0.01)


def test_statistics_are_by_stage_and_reach_each_router() -> None:
    config = staged_config(EmaThresholdConfig())
    model, ids = build_model(config), tokens()
    out = model(ids, ids)
    assert {name for name in out.totals if name.startswith("layers_0/")} == {
        "layers_0/threshold_quantiles",
        "layers_0/threshold_batches",
    }
    assert out.depth.max() <= max_depth(config) == 8
    statistics = StepStatistics(max_depth(config))
    statistics.add(out)
    figures = statistics.reduce(torch.zeros(()))
    metrics = figures.wait().stage_metrics(stages(config))
    own = {
        prefix: [metrics[f"depth/{prefix}{d}"] for d in range(n)] for prefix, n in (("layers_0/", 4), ("layers_2/", 3))
    }
    for prefix, shares in own.items():
        assert sum(shares) == pytest.approx(1)
        assert metrics[f"routing/{prefix}mean_depth"] == pytest.approx(sum(d * s for d, s in enumerate(shares)))
    total = sum(metrics[f"routing/layers_{n}/mean_depth"] for n in (0, 2, 4))
    assert total == pytest.approx(out.depth.double().mean().item())
    model.update_routers(figures.totals)
    updates = [model.stages[f"layers_{n}/"].router.num_updates for n in (0, 2)]
    # The first recursion takes all, so it has no threshold to move.
    assert [update.tolist() for update in updates] == [[0, 1, 1], [0, 1]]


def test_random_stages_have_patterns_of_their_own() -> None:
    config = staged_config(RandomConfig(capacity=(0.5, 0.5, 0.5)))
    config = replace(config, recursion=replace(config.recursion, stages=(), router_layers=(0, 2)))
    model, taken = lively_model(config), []
    for stage in model.stages.values():
        stage.register_forward_hook(lambda module, inputs, output: taken.append(output.depth))
    for mode in ("train", "causal"):
        model(tokens(), mode=mode)
        assert not torch.equal(taken.pop(), taken.pop()), mode


def test_a_stage_of_one_recursion_may_be_skipped() -> None:
    config = listed(stages=[{"first_layer": 2, "num_recursions": 1, "router": {"kind": "skip_forward_recurse"}}])
    validate(config)
    assert isinstance(stages(config)[0].config.router, SkipForwardRecurseConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_layers": [1, 1]}, "router_layers names a layer twice"),
        ({"router_layers": [8]}, "exceeds model.num_layers = 8"),
        ({"stages": [{"first_layer": 1, "num_layers": 3}], "router_layers": [2]}, "overlaps the one before it"),
        ({"router_layers": [1], "sharing": "cycle"}, "recursion.sharing = cycle with"),
        ({"router_layers": [1], "num_recursions": 1}, "layers 1 to 1: router.kind = expert_choice with"),
        ({"stages": [{"first_layer": 1, "num_recursions": 2, "router": {"capacity": [1.0]}}]}, "has 1 entries"),
    ],
)
def test_contradictions_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(listed(**settings))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"first_layer": 1, "router": {"kind": "token_choise"}},
            r"recursion.stages\[0\].router.kind: found 'token_choise'",
        ),
        ({"first_layer": 1, "router": {"depth": 2}}, "it belongs to router.kind fixed"),
        ({"first": 1}, "did you mean recursion.stages"),
        ({}, "first_layer: missing"),
    ],
)
def test_bad_items_are_named(stage: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(stages=[stage])


def test_serving_says_what_to_use_instead() -> None:
    with pytest.raises(ConfigError, match=r"can't be served.*megamor generate"):
        Layers.of(build_model(staged_config(FixedDepthConfig())))


SLOW = pytest.mark.slow
BACKENDS = [
    pytest.param(ParallelConfig("single"), "fp32", id="single"),
    pytest.param(ParallelConfig("fsdp2"), "bf16", id="fsdp2"),
    pytest.param(ParallelConfig("ddp"), "fp32", marks=SLOW, id="ddp"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=2), "bf16", marks=SLOW, id="zero 2"),
    pytest.param(ParallelConfig("deepspeed", zero_stage=3), "bf16", id="zero 3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("parallel", "precision"), BACKENDS)
def test_a_run_of_several_stages_resumes_bitwise(tmp_path: Path, parallel: ParallelConfig, precision: str) -> None:
    run = tiny_run(tmp_path, eval_every=4, precision=precision)
    structure = staged_config(run.router)
    run = replace(run, model=replace(run.model, num_layers=6), recursion=structure.recursion, parallel=parallel)
    stopped, world_size = named(run, "stopped"), 1 if parallel.backend == "single" else 2
    assert all(fit(run, world_size))
    assert all(fit(until(stopped, 3), world_size))
    assert all(fit(stopped, world_size))
    straight = trace(run)
    assert_same_run(straight, trace(stopped))
    last = straight.steps[-1]
    assert last["train/loss"] < straight.steps[0]["train/loss"]
    assert last["routing/mean_depth"] == pytest.approx(sum(last[f"routing/layers_{n}/mean_depth"] for n in (0, 2, 4)))
    assert {"depth/layers_4/3", "routing/layers_2/gate_2", "routing/layers_2/topk_causal_agreement"} <= last.keys()
    assert "validation/held_out/layers_4/mean_depth_causal" in straight.validation[-1]
    assert [*faults_of(directory_of(run) / "checkpoints" / "latest", quick=False)] == []


def test_a_trained_model_of_several_stages_is_used(tmp_path: Path) -> None:
    """From its checkpoint and from its export: the same losses, and cached decoding equals the full pass."""
    run = tiny_run(tmp_path)
    structure = staged_config(run.router)
    run = replace(run, model=replace(run.model, num_layers=6), recursion=structure.recursion)
    assert all(fit(run, 1))
    loaded = load_model(directory_of(run))
    export_huggingface(loaded.model, tmp_path / "export")
    exported = load_model(tmp_path / "export")
    validation = run.data.validation["held_out"]
    assert dataset_losses(exported, validation) == dataset_losses(loaded, validation)
    ids = tokens(batch=1)
    cache = KVCache(loaded.config.model, 1, ids.shape[1])
    with torch.no_grad():
        steps = [loaded.model(ids[:, [i]], mode="causal", cache=cache) for i in range(ids.shape[1])]
        whole = loaded.model(ids, mode="causal")
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), whole.logits, atol=1e-4, rtol=0)
    assert torch.equal(torch.cat([step.depth for step in steps], 1), whole.depth)
