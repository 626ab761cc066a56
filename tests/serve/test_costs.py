"""The prediction of speed from measured costs of calls, and the bench around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamor.bench.tables import regenerate
from megamor.cli.bench import main
from megamor.serve.engine.costs import SAMPLES_PER_WIDTH, Costs, LineFit
from tests.commands import refusal, status

A, B, R, NR, D = 1.0, 0.05, 32, 3, 1.75


def costs(x: float) -> Costs:
    """A boundary call costs x core calls of the same width."""
    return Costs((A, B), (x * A, x * B))


def test_the_formulas() -> None:
    x = 0.3
    launch = A + B * R
    predict = costs(x).token_seconds
    assert predict("full", R, NR, D) == pytest.approx((NR + x) * launch / R)
    assert predict("shrink", R, NR, D) == pytest.approx((NR * A + B * R * D + x * launch) / R)
    assert predict("depthwise", R, NR, D) == pytest.approx((D * launch + x * (D * A + B * R)) / R)


@pytest.mark.parametrize("x", [0.1, 0.5, 1.0, 1.6, 1.8, 3.0])
def test_depthwise_beats_shrink_exactly_where_it_should(x: float) -> None:
    predict = costs(x).token_seconds
    assert (predict("depthwise", R, NR, D) < predict("shrink", R, NR, D)) == (x < (NR - D) / (D - 1))


def test_holding_pays_when_boundaries_are_expensive() -> None:
    assert costs(0.1).best_hold(R, NR, D) == 1
    assert costs(1.2).best_hold(R, NR, D) == 2
    assert costs(9.0).best_hold(R, NR, D) == 3
    predict = costs(9.0).token_seconds
    assert predict("depthwise", R, NR, D, NR) == predict("shrink", R, NR, D), "lock-step"


def test_a_line_through_medians() -> None:
    fit = LineFit()
    for width in (4, 8, 16):
        for error in (-0.1, 0.0, 0.1, 50.0, -0.1):
            fit.add(width, 2 + 0.5 * width + error)
    assert fit.line() == pytest.approx((2, 0.5))
    one = LineFit()
    one.add(3, 7.0)
    assert one.line() == (7.0, 0.0)


def test_the_line_follows_a_machine_that_becomes_faster() -> None:
    fit = LineFit()
    for seconds in (9.0, 1.0):
        for _ in range(SAMPLES_PER_WIDTH):
            fit.add(4, seconds)
    assert fit.line() == (1.0, 0.0)


TINY = """
model: {vocab_size: 64, dim: 32, num_layers: 8, num_heads: 4, num_kv_heads: 2, ffn_dim: 64, max_seq_len: 32}
recursion: {num_recursions: 3, sharing: middle_cycle}
router: {kind: expert_choice}
data: {seq_len: 32}
optim: {warmup_steps: 0}
train: {global_batch_size: 2, micro_batch_size: 2, max_steps: 2, precision: fp32}
"""


VANILLA = TINY.replace("{num_recursions: 3, sharing: middle_cycle}", "{num_recursions: 1, sharing: none}")


def test_the_offline_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, vanilla, out = tmp_path / "tiny.yaml", tmp_path / "vanilla.yaml", tmp_path / "serve_offline_tiny.json"
    config.write_text(TINY)
    vanilla.write_text(VANILLA.replace("expert_choice", "fixed"))
    arguments = ["serve", "--config", str(config), "--residents", "4", "--turns", "3"]
    main([*arguments, "--vanilla", str(vanilla), "--new-tokens", "6-10", "--device", "cpu", "--json", str(out)])
    (setting,) = json.loads(out.read_text())["settings"]
    cases = {case["case"]: case for case in setting["cases"]}
    assert list(cases) == ["full", "shrink", "depthwise", "vanilla", "depthwise, equal KV bytes"]
    assert cases["vanilla"]["over_vanilla"] == 1
    assert cases["vanilla"]["scheduler_over_core"] is None
    assert cases["full"]["over_full"] == 1
    assert cases["depthwise"]["mixed_launches"] > 0.5
    assert cases["shrink"]["mixed_launches"] == 0
    assert cases["depthwise, equal KV bytes"]["residents"] > 4
    assert "predicted" in capsys.readouterr().out
    block = "<!-- generated: bench-serve -->\n<!-- /generated -->\n"
    rows = [line for line in regenerate(block, tmp_path).splitlines() if line.startswith("| ")]
    assert len(rows) == 6
    assert f"| depthwise | 4 | {cases['depthwise']['mean_depth']:.2f} |" in rows[3]


def test_what_the_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    assert status(main, "serve") == 2
    assert "context of 32" in refusal(capsys, main, "serve", "--config", config, "--new-tokens", "40-60")
