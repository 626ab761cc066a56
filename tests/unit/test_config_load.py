"""Reading configurations: overlays, overrides, types and error messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megamor.cli import pretrain
from megamor.config import (
    Config,
    ExpertChoiceConfig,
    FixedDepthConfig,
    ModelConfig,
    OptimConfig,
    RecursionConfig,
    SourceConfig,
    TokenChoiceConfig,
    TrainConfig,
    config_from_dict,
    config_from_yaml,
    config_to_dict,
    config_to_yaml,
    load_config,
)
from megamor.errors import ConfigError

LENGTH = "train: {max_steps: 1000}\n"
MOR = "recursion: {num_recursions: 3, sharing: middle_cycle}\nmodel: {num_layers: 32}\n"


def write(directory: Path, **files: str) -> Path:
    """Write NAME.yaml for each keyword, and return the last path."""
    for name, text in files.items():
        path = directory / f"{name}.yaml"
        path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The error message of loading."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_and_nested_values(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, a=LENGTH + "optim: {lr: 1e-4}\n"))
    assert config == Config(optim=OptimConfig(lr=1e-4), train=config.train)
    assert config.train.max_steps == 1000


def test_extends_in_order_then_the_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", one="optim: {lr: 1, eps: 1, beta1: 0.1, weight_decay: 1}\n")
    write(tmp_path / "parts", two="optim: {eps: 2, beta1: 0.2, weight_decay: 2}\n")
    own = "extends: [parts/one.yaml, parts/two.yaml]\noptim: {beta1: 0.3, weight_decay: 3}\n"
    path = write(tmp_path, a=LENGTH + own)
    optim = load_config(path, ["optim.weight_decay=4"]).optim
    assert (optim.lr, optim.eps, optim.beta1, optim.weight_decay) == (1, 2, 0.3, 4)


def test_extends_goes_through_several_files_and_settings_replace(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        a="data: {train: [one, two], validation: {x: one}}\n" + LENGTH,
        b="extends: a.yaml\ndata: {train: [three]}\n",
        c="extends: b.yaml\ndata: {validation: {y: two}}\n",
    )
    data = load_config(path).data
    assert data.train == (SourceConfig("three"),)
    assert data.validation == {"y": "two"}


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, a=LENGTH + MOR)
    data = ["data.train=[a, {prefix: b, weight: 3}]", "data.validation.pile=p", "data.tokenizer=null"]
    router = ["router={kind: expert_choice}", "router.capacity=[1, 0.5, 0.25]"]
    config = load_config(path, [*router, *data, "optim.lr=1", "optim.lr=2e-3", "run.name='123'"])
    assert config.router == ExpertChoiceConfig(capacity=(1.0, 0.5, 0.25))
    assert config.data.train == (SourceConfig("a"), SourceConfig("b", 3.0))
    assert config.data.validation == {"pile": "p"}
    assert (config.optim.lr, config.data.tokenizer, config.run.name) == (2e-3, None, "123")


def test_another_router_kind_discards_the_old_options(tmp_path: Path) -> None:
    write(tmp_path, base=LENGTH + MOR + "router: {kind: expert_choice, alpha: 0.5, z_coeff: 0.5}\n")
    same = write(tmp_path, same="extends: base.yaml\nrouter: {z_coeff: 0.25}\n")
    assert load_config(same).router == ExpertChoiceConfig(alpha=0.5, z_coeff=0.25)
    other = write(tmp_path, other="extends: base.yaml\nrouter: {kind: token_choice, balance_coeff: 0.2}\n")
    assert load_config(other).router == TokenChoiceConfig(balance_coeff=0.2)
    overridden = load_config(same, ["router.z_coeff=0.125", "router.kind=token_choice"])
    assert overridden.router == TokenChoiceConfig(z_coeff=0.125)


def test_the_default_router_kind_is_fixed(tmp_path: Path) -> None:
    path = write(tmp_path, a=LENGTH + MOR + "router: {depth: 2}\n", b="extends: a.yaml\nrouter: {kind: token_choice}\n")
    assert load_config(tmp_path / "a.yaml").router == FixedDepthConfig(depth=2)
    assert load_config(path).router == TokenChoiceConfig()


def test_every_mistake_is_reported_with_its_place(tmp_path: Path) -> None:
    optim = "optim: {learning_rate: 1, weightdecay: 0, lr: on, beta1: []}\n"
    write(tmp_path, base=optim + "train: {add_shared_gradients_in_fp32: 1, max_steps: true}\n")
    path = write(tmp_path, run="extends: base.yaml\nmodle: {dim: 3}\nlr: 3\n")
    lines = refused(path, "train.precision=fp16", "data.train=[{weight: 2}]", "run.seed=1.5", "run.name=7").splitlines()
    expected = [
        ("base.yaml: optim.learning_rate", "unknown key; the keys here are kind, lr, beta1,"),
        ("base.yaml: optim.weightdecay", "unknown key; did you mean optim.weight_decay?"),
        ("base.yaml: optim.lr", "found 'on', expected a positive number"),
        ("base.yaml: optim.beta1", "found [], expected a number from 0 to just below 1"),
        ("base.yaml: train.add_shared_gradients_in_fp32", "found 1, expected true or false"),
        ("base.yaml: train.max_steps", "found True, expected a positive integer or null"),
        ("run.yaml: modle", "unknown key; did you mean model?"),
        ("run.yaml: lr", "unknown key; did you mean optim.lr?"),
        ("override: train.precision", "found 'fp16', expected one of bf16, fp32"),
        ("override: data.train[0].prefix", "missing; give a string"),
        ("override: run.seed", "found 1.5, expected zero or a positive integer"),
        ("override: run.name", "found 7, expected a string; quote it"),
    ]
    for place, message in expected:
        assert any(f"{place}: " in line and message in line for line in lines), f"{place}: {message}"
    assert len(lines) == 1 + len(expected)


def test_a_key_of_another_router_kind_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a=LENGTH + MOR + "router: {kind: token_choice, capacity: [1, 1, 1]}\n")
    message = refused(path)
    assert "router.capacity: unknown key; it belongs to router.kind expert_choice" in message
    kinds = "fixed, expert_choice, token_choice, ema_threshold, learned_threshold, random, skip_forward_recurse, act, "
    kinds += "monotone, pondernet, custom"
    expected = f"router.kind: found 'token', expected one of {kinds}; did you mean token_choice?"
    assert expected in refused(write(tmp_path, b=LENGTH), "router.kind=token")


def test_numbers_are_what_they_look_like(tmp_path: Path) -> None:
    path, read = write(tmp_path, a=LENGTH), {}
    values = {"1e-3": 1e-3, "1E5": 1e5, ".5": 0.5, "3": 3.0, "1.0e-05": 1e-5, "+2.": 2.0, "010": 10.0, "1_000": 1e3}
    for text in values:
        read[text] = load_config(path, [f"model.rope_theta={text}"]).model.rope_theta
    assert read == values
    assert {type(value) for value in read.values()} == {float}


@pytest.mark.promise("R21")
def test_whole_floats_are_integers(tmp_path: Path) -> None:
    """In files, overrides, lists and for every kind of integer; nothing is rounded."""
    path = write(
        tmp_path, a="train: {max_tokens: 30e9, ramp: [{until_step: 1e1, seq_len: 1.28e2}]}\nrun: {seed: 1.0}\n"
    )
    config = load_config(path, ["parallel.zero_stage=3.0", "model.vocab_size=5e4", "train.stop_at_step=1e3"])
    found = [config.train.max_tokens, config.train.ramp[0].until_step, config.train.ramp[0].seq_len, config.run.seed]
    found += [config.parallel.zero_stage, config.model.vocab_size, config.train.stop_at_step]
    assert found == [30_000_000_000, 10, 128, 1, 3, 50_000, 1000]
    assert {type(value) for value in found} == {int}
    for text in ("1.5", "1e-3", ".inf", ".nan", "-1e3", "true", "'1e3'"):
        assert "train.max_tokens: found" in refused(path, f"train.max_tokens={text}")
    assert "train.max_tokens: found 1.5, expected a positive integer or null" in refused(path, "train.max_tokens=1.5")


@pytest.mark.parametrize("text", ["on", "1:30", "2001-01-01", "0x10", "1e", "'3'", "true", "null", "{a: 1}"])
def test_what_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    assert "optim.lr: found" in refused(write(tmp_path, a=LENGTH), f"optim.lr={text}")


@pytest.mark.parametrize(
    "name",
    [
        *("1e3", "on", "null", "true", "12", "010", "1_0", "~", "a: b", "naïve", "0x1", ".inf", "<<", "1:30", "=", "y"),
        *("2001-01-01", "2001-01-01T10:00:00Z", "1_000.5", "-", "#", "'", '"', "[a]", "*a", "a #b"),
    ],
)
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    config = Config(
        model=ModelConfig(num_layers=32),
        recursion=RecursionConfig(3, "middle_cycle"),
        router=ExpertChoiceConfig(capacity=(1.0, 2 / 3, 1e-17), alpha=0.1),
        train=TrainConfig(max_tokens=10**13),
        optim=OptimConfig(lr=1 / 3, eps=1e-300),
    )
    values = config_to_dict(config) | {"data": {"train": [name], "validation": {name: name}, "tokenizer": name}}
    config = config_from_dict(values)
    text = config_to_yaml(config)
    again = load_config(write(tmp_path, document=text))
    assert again == config_from_yaml(text, "here") == config
    assert config_from_dict(yaml.safe_load(text)) == config  # a YAML 1.1 reader gets the same strings
    assert config_from_dict(config_to_dict(config)) == config
    assert config_to_yaml(again) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: a.yaml", "extends itself (a.yaml -> a.yaml)"),
        ("extends: missing.yaml", "missing.yaml: no such configuration file"),
        ("extends: {a: b}", "expected a file name or a list of file names"),
        ("- 1\n- 2", "found list, expected a mapping"),
        ("a: [", "not valid YAML"),
        ("run: {name: a}\nrun: {seed: 1}", "key 'run' is given twice"),
        ("run:\n", "run: found None, expected a mapping; remove the section to take its defaults"),
        ("router: 3\n", "router: found 3, expected a mapping with kind: fixed | expert_choice | token_choice"),
        ("1: 2\n", "1: unknown key"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)), "repeat"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(write(tmp_path, a=text))


def test_files_that_extend_each_other_in_a_circle_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, a="extends: b.yaml", b="extends: c.yaml", c="extends: b.yaml")
    assert "c.yaml -> b.yaml -> c.yaml" in refused(path)
    files = {"top": LENGTH, "left": "extends: top.yaml", "right": "extends: top.yaml"}
    diamond = write(tmp_path, **files, low="extends: [left.yaml, right.yaml]")
    assert load_config(diamond).train.max_steps == 1000


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", "optim.lr=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert repr(override) in refused(write(tmp_path, a=LENGTH), override)


def test_a_section_below_a_value_is_a_type_error(tmp_path: Path) -> None:
    assert "optim.lr: found {'x': 3}, expected a positive number" in refused(write(tmp_path, a=LENGTH), "optim.lr.x=3")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("router.depth=0", "found 0, expected a positive integer or null"),
        ("optim.beta2=1.0", "found 1.0, expected a number from 0 to just below 1"),
        ("optim.decay_fraction=1.1", "found 1.1, expected a number from 0 to 1"),
        ("optim.lr=.nan", "found nan, expected a positive number"),
        ("optim.lr=.inf", "found inf, expected a positive number"),
        ("optim.weight_decay=-0.1", "found -0.1, expected zero or a positive number"),
        ("model.num_heads=0", "found 0, expected a positive integer"),
        ("parallel.zero_stage=true", "found True, expected an integer from 0 to 3"),
        ("router={kind: expert_choice, capacity: [1, 0.5, 0]}", "found 0, expected a number above 0 and at most 1"),
        ("router={kind: expert_choice, inference_threshold: 0}", "found 0, expected a number between 0 and 1"),
        ("router={kind: custom, target: a:B, options: {x: y}}", "found 'y', expected a number"),
        ("train.ramp=[{until_step: 5, seq_len: 0}]", "found 0, expected a positive integer or null"),
        ("train.ramp=[5]", "found 5, expected {until_step, global_batch_size, micro_batch_size, seq_len}"),
        ("data.train=[{prefix: x, tokens: 0}]", "found 0, expected a positive number or null"),
        ("data.train=[3]", "found 3, expected {prefix, weight, tokens} or a bare prefix"),
        ("data.chunk_len=0", "found 0, expected a positive integer or null"),
    ],
)
def test_a_value_out_of_range_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    first, line = refused(write(tmp_path, a=LENGTH + MOR), override).splitlines()
    assert first == "the configuration can't be read:"
    assert line.startswith("  override: ")
    assert line.endswith(expected)


def test_reading_the_schema_needs_no_pydantic() -> None:
    """An exported model contains the schema, and `--help` should not wait for imports that it doesn't need."""
    code = "import sys, megamor.config; assert not {'pydantic', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_print_config_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, a=LENGTH + MOR + "run: {name: '2001-01-01'}\nrouter: {kind: token_choice}\n")
    overrides = ["optim.lr=1e-5", "data.train=[a]"]
    pretrain.main(["--config", str(path), "--print-config", *overrides])
    printed = write(tmp_path, printed=capsys.readouterr().out)
    assert load_config(printed) == load_config(path, overrides)
