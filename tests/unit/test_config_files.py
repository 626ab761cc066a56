"""The files of `configs/`: recipes are complete, and model overlays have the sizes of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megamor.config import Config, ExpertChoiceConfig, FixedDepthConfig, TokenChoiceConfig, load_config
from megamor.config.derive import derive
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.model.flops import expected_steps

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("bench/*.yaml")])
MODELS = sorted(CONFIGS.glob("model/*.yaml"))
PARALLEL = sorted(CONFIGS.glob("parallel/*.yaml"))

# Paper, tables 1 and 3: unique parameters in millions without the embedding, and effective layers.
TABLE = {
    "135m": ("106", 30), "135m_2": ("57", 30), "135m_3": ("42", 32), "135m_4": ("31.9", 30),
    "360m": ("315", 32), "360m_2": ("167", 32), "360m_3": ("118", 32), "360m_4": ("98", 34),
    "730m": ("654", 26), "730m_2": ("352", 26), "730m_3": ("252", 26), "730m_4": ("201", 26),
    "1.7b": ("1610", 24), "1.7b_2": ("870", 24), "1.7b_3": ("670", 26), "1.7b_4": ("540", 26),
}  # fmt: skip


def load_overlay(path: Path, directory: Path) -> Config:
    """A run of the overlay at `path`."""
    run = directory / "run.yaml"
    run.write_text(yaml.safe_dump({"extends": str(path), "train": {"max_steps": 1000}}))
    return load_config(run)


def test_no_file_is_left_out() -> None:
    assert sorted([*RECIPES, *MODELS, *PARALLEL]) == sorted(CONFIGS.rglob("*.yaml"))
    names = {path.stem for path in RECIPES}
    assert names >= {f"{kind}_{size}" for kind in ("mor", "vanilla", "recursive") for size in ("135m", "360m", "1b")}
    assert {path.stem for path in PARALLEL} == {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete(path: Path) -> None:
    config = load_config(path)
    validate(config, world_size=1)
    assert derive(config, world_size=1).total_steps == config.train.max_steps
    if path.parent == CONFIGS:
        validate(config, world_size=2)
        assert config.run.name == path.stem
        assert config.data.train
        assert config.data.validation
        assert config.data.tokenizer


@pytest.mark.parametrize("path", [*MODELS, *PARALLEL], ids=lambda path: path.stem)
def test_an_overlay_alone_is_not_a_run(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_flops: found none") as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2
    derive(load_overlay(path, tmp_path), world_size=4)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_has_the_size_of_the_table(path: Path, tmp_path: Path) -> None:
    size, _, variant = path.stem.partition("_")
    recursions = int(variant[3:] or 1)
    millions, num_layers = TABLE[f"{size}_{recursions}" if variant else size]
    config = load_overlay(path, tmp_path)
    derived = derive(config, world_size=1)
    step = {"31.9": 0.1}.get(millions, 10 if size == "1.7b" else 1)
    assert round(derived.unique_parameters / 1e6 / step) == round(float(millions) / step)
    assert (config.model.num_layers, config.recursion.num_recursions) == (num_layers, recursions)
    assert config.recursion.sharing == ("middle_cycle" if variant else "none")
    assert isinstance(config.router, ExpertChoiceConfig if variant.startswith("mor") else FixedDepthConfig)


@pytest.mark.parametrize(
    ("name", "steps", "warmup"),
    [
        ("vanilla_360m", 9438, 57),
        ("recursive_360m", 9438, 57),
        ("mor_360m_nr2", 12619, 77),
        ("mor_360m", 14161, 86),
        ("mor_360m_nr4", 14216, 86),
        ("mor_360m_token", 14161, 86),
    ],
)
def test_the_published_settings(name: str, steps: int, warmup: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.train.max_steps, config.optim.warmup_steps) == (steps, warmup)
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (3e-3, 0.9, 0.95)
    assert (config.optim.weight_decay, config.optim.grad_clip, config.optim.decay_fraction) == (0.1, 1.0, 0.2)
    assert (config.train.global_batch_size, config.data.seq_len, config.train.precision) == (1024, 2048, "bf16")


@pytest.mark.parametrize("size", ["135m", "360m", "1b"])
def test_controls_differ_in_the_model_and_length_only(size: str) -> None:
    mor = load_config(CONFIGS / f"mor_{size}.yaml")
    vanilla, recursive = (load_config(CONFIGS / f"{kind}_{size}.yaml") for kind in ("vanilla", "recursive"))
    assert recursive.model == mor.model
    assert recursive.recursion == mor.recursion
    assert vanilla.recursion.num_recursions == 1
    for control in (vanilla, recursive):
        assert control.router == FixedDepthConfig()
        assert (control.data, control.parallel, control.train.global_batch_size) == (
            mor.data,
            mor.parallel,
            mor.train.global_batch_size,
        )
        assert control.optim.lr == mor.optim.lr


def test_token_choice_recipe_keeps_nothing_of_expert_choice() -> None:
    assert load_config(CONFIGS / "mor_360m_token.yaml").router == TokenChoiceConfig()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.max_steps=1e30", r"max_steps: found 1\d{30}, expected a positive integer or null below 2\^63"),
        ("train.max_tokens=1e30", r"max_tokens: found 1\d{30}, expected a positive integer or null below 2\^63"),
        ("train.max_steps=1e18", r"the run's 1e\+18 steps have more tokens than can be counted"),
        ("guard.window=1e30", r"guard.window: found 1\d{30}, expected a positive integer below 2\^63"),
        ("run.seed=9223372036854775808", r"run.seed: found 9223372036854775808, expected zero or .* below 2\^63"),
    ],
)
def test_a_number_that_cannot_be_counted_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(CONFIGS / "quickstart.yaml", [override])


def test_a_budget_that_cannot_be_counted_is_refused() -> None:
    endless = load_config(CONFIGS / "quickstart.yaml", ["train.max_steps=null", "train.max_flops=1e308"])
    with pytest.raises(ConfigError, match=r"train.max_flops asks for more than .* steps, which can't be counted"):
        expected_steps(endless)
