"""Every file in `studies/` is a valid study with the sizes that it states, and can be planned without data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamor.cli import study as command
from megamor.model.flops import nominal_flops
from megamor.study import load_study
from megamor.study.jobs import expected_flops, jobs_of

ROOT = Path(__file__).parents[2]
# The others are bases: configurations that studies have in common.
YAML = sorted((ROOT / "studies").glob("*.yaml"))
FILES = [path for path in YAML if re.search("^(axes|arms):", path.read_text(), re.M)]
NAMES = {
    *("routing", "growth", "isoflop_cpu", "isoflop_gpu", "paper_135m", "paper_360m", "uptrain", "uptrain_small"),
    "cooldowns",
    *("seed000_tinystories", "seed000_wikitext2", "seed001_large", "seed001_medium", "seed001_small"),
    *("seed002_exp1", "seed002_exp1_wikitext2", "seed002_exp2", "seed002_exp2_wikitext2", "seed003", "seed003_small"),
}
COSTS = {path: found for path in FILES if (found := re.search(r"^# Cost: (\S+) FLOPs", path.read_text(), re.MULTILINE))}
# Unique parameters with and without the embedding.
PARAMETERS = {
    "seed000_tinystories": {"dense": (29_893_120, 25_698_816), "mor": (29_896_192, 25_701_888)},
    "seed001_small": {"vanilla": (33_847_808, 20_982_016), "mor": (21_259_520, 8_393_728)},
    "seed001_medium": {"vanilla": (89_977_856, 64_246_272), "mor": (51_431_936, 25_700_352)},
    "seed001_large": {"vanilla": (288_745_472, 237_282_304), "mor": (146_379_776, 94_916_608)},
    "seed003": {"standard": (416_417_792, 364_954_624), "mor": (416_689_153, 365_225_985)},
    "seed003_small": {"standard": (1_689_216, 1_427_072), "mor": (1_690_625, 1_428_481)},
    "paper_360m": {"vanilla": (361_821_120, 314_635_200), "mor_nr3": (165_177_600, 117_991_680)},
    "uptrain": {"loop2_uptrained": (84_953_664, 56_642_112), "loop3_uptrained": (70_793_280, 42_481_728)},
    "uptrain_small": {"loop2_uptrained": (1_447_296, 923_008), "mor3_uptrained": (1_263_104, 738_816)},
    "paper_135m": {"vanilla": (134_515_008, 106_203_456), "mor": (70_795_008, 42_483_456)},
}


def test_the_announced_studies_are_there() -> None:
    assert {path.stem for path in FILES} >= NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_can_be_planned(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study(path)
    for arm in study.arms:
        assert arm.parameters == PARAMETERS.get(study.name, {}).get(arm.name, arm.parameters)
    assert study.question.endswith("?")
    for expected in study.expected:
        assert expected.keys() == {"what", "value", "source"}
        assert isinstance(expected["value"], float | int)
    command.main(["run", str(path), "--dry-run", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert all(arm.name in shown for arm in study.arms)
    assert f"matched by {study.match}" in shown
    assert not (tmp_path / "out").exists()
    assert re.search(rf"\b{path.name}\b", (ROOT / "docs/studies.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", COSTS, ids=lambda path: path.stem)
def test_the_cost_that_a_file_states_is_its_cost(path: Path) -> None:
    """FLOPs of all jobs at nominal depth; the runs that extend a grid come on top."""
    study = load_study(path)
    total = sum(expected_flops(study, job) for job in jobs_of(study))
    assert float(COSTS[path][1]) == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("corpus", ["", "_wikitext2"])
@pytest.mark.parametrize(("number", "depth"), [(1, 8), (2, 6)])
def test_effective_depths_are_the_ones_announced(number: int, depth: int, corpus: str) -> None:
    """The target of each layer times twelve layers is the E in the arm's name."""
    study = load_study(ROOT / f"studies/seed002_exp{number}{corpus}.yaml")
    config = study.arm(f"skip_forward_recurse_e{depth}").config
    assert len(config.recursion.router_layers) * config.router.target_depth == pytest.approx(depth, abs=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "steps"), [("paper_360m", 9438), ("paper_135m", 25408)])
def test_budgets_of_the_paper_are_those_of_its_vanilla_runs(name: str, steps: int) -> None:
    study = load_study(ROOT / f"studies/{name}.yaml")
    vanilla = study.arm("vanilla").config
    assert study.budgets[0] == pytest.approx(
        steps * vanilla.train.global_batch_size * nominal_flops(vanilla).training, rel=0.01
    )
