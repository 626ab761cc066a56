"""Settings survive their file: every value of every setting reads back equal, whichever way it is written and read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megamor.cli import bench, plan, pretrain, verify_resume
from megamor.config import (
    Config,
    CustomRouterConfig,
    DataConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    config_from_dict,
    config_from_yaml,
    config_to_dict,
    config_to_yaml,
    expand_paths,
    literal,
    load_config,
    override,
    read_mapping,
)
from megamor.config.constraints import Location, Range
from megamor.config.convert import field_types
from megamor.config.load import parse_mapping
from megamor.config.routers import RouterConfig
from megamor.errors import ConfigError
from tests.commands import Command, refusal

pytestmark = pytest.mark.promise("R25")

LENGTH = "train: {max_steps: 1000}\n"
AMBIGUOUS = [
    *("2026-11-24", "2026-11-24T10:00:00Z", "on", "off", "yes", "No", "y", "true", "TRUE", "null", "~", "", "=", "<<"),
    *(
        "1:30:00",
        "190:20:30.15",
        "0x10",
        "0o17",
        "0b11",
        "012",
        "1e3",
        "1.0e+3",
        "1E5",
        ".5",
        "5.",
        "+1",
        "-0",
        "1_000",
    ),
    *(".inf", "-.INF", ".nan", "nan", "inf", "-", "?", ":", "a: b", "a #b", "#", "&a", "*a", "!x", "!!int 3", "%", "@"),
    *("`", "|", ">", "[", "{a: 1}", "'", '"', "\\", "---", "...", "a\nb", "\n", "a\r\nb", "\t", "a\x85b", "\u2028"),
    *("\x85", "\ufeff", "\x00", "\x7f", "\x1b[0m", " ", " a ", "😀", "naïve", "$HOME", "~/x", "1" * 400, "a b " * 60),
]
TEXT = st.sampled_from(AMBIGUOUS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a setting of type `hint` accepts."""
    arguments = get_args(hint)
    if type(None) in arguments:
        return st.none() | st.one_of([values_of(each) for each in arguments if each is not type(None)])
    if hint == RouterConfig:
        return st.one_of([values_of(each) for each in arguments])
    if get_origin(hint) is Annotated:
        limits = hint.__metadata__[0]
        if not isinstance(limits, Range):
            return TEXT if isinstance(limits, Location) else values_of(arguments[0])
        low, high = (limits.ge if limits.gt is None else limits.gt), (limits.le if limits.lt is None else limits.lt)
        if arguments[0] is int:
            return st.integers(int(low or 0) + (limits.gt is not None), sys.maxsize if high is None else int(high))
        return st.floats(
            low, high, exclude_min=limits.gt is not None, exclude_max=limits.lt is not None, allow_infinity=False
        )
    if get_origin(hint) is Literal:
        return st.sampled_from(arguments)
    if get_origin(hint) is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if get_origin(hint) is Mapping:
        return st.dictionaries(TEXT, values_of(arguments[1]), max_size=3)
    if is_dataclass(hint):
        kept = {name: each for name, each in field_types(hint).items() if name != "kind"}
        return st.builds(hint, **{name: values_of(each) for name, each in kept.items()})
    return {
        str: TEXT,
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }[hint]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to override. Rules between settings aren't what is tested here."""
    monkeypatch.setattr("megamor.config.load.validate", lambda config, world_size, run: None)
    (tmp_path / "base.yaml").write_text(LENGTH)
    return tmp_path / "base.yaml"


@given(config=values_of(Config))
@QUICK
def test_any_configuration_reads_back_equal(base: Path, config: Config) -> None:
    """From a file, from a checkpoint's record, from an export's JSON, and as overrides."""
    text = config_to_yaml(config)
    file = base.with_name("run.yaml")
    file.write_text(text, encoding="utf-8")
    assert load_config(file) == config
    assert config_from_yaml(text, "a checkpoint") == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    sections = [override(name, value) for name, value in config_to_dict(config).items()]
    assert load_config(base, sections) == config
    assert parse_mapping(text, "here") == read_mapping(file) == config_to_dict(config)


@given(text=TEXT, name=TEXT)
@example(text="2026-11-24", name="2026-11-24")
@QUICK
def test_any_string_reads_back_equal_by_itself(base: Path, text: str, name: str) -> None:
    config = Config(
        run=RunConfig(name=text, dir=text),
        router=CustomRouterConfig(target=text, options={name: 1.5}),
        data=DataConfig(train=(SourceConfig(text),), validation={name: text}, tokenizer=text),
        train=TrainConfig(max_steps=1000),
    )
    given = {"run.name": text, "run.dir": text, "data.train": [text], "data.validation": {name: text}}
    given |= {"data.tokenizer": text, "router": {"kind": "custom", "target": text, "options": {name: 1.5}}}
    assert load_config(base, [override(key, value) for key, value in given.items()]) == config
    assert config_from_yaml(config_to_yaml(config), "a checkpoint") == config


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_readers_of_yaml_1_1_get_the_same_strings(text: str) -> None:
    values = config_to_dict(Config()) | {"data": {"validation": {text: text}, "tokenizer": text}}
    config = config_from_dict(values)
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize("text", ["2026-11-24", "on", "yes", "1:30:00", "0x10", "0o17", "y", "=", "1e", "off", "12:30"])
def test_a_string_of_yaml_1_2_needs_no_quotes(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"run: {{name: {text}}}\n{LENGTH}")
    named, overridden = load_config(tmp_path / "a.yaml"), load_config(tmp_path / "a.yaml", [f"run.name={text}"])
    assert named.run.name == overridden.run.name == text
    assert config_from_yaml(config_to_yaml(named), "a checkpoint") == named


@pytest.mark.parametrize("text", ["1e3", "1.0e+3", "012", ".inf", "7", "null", "~", "true"])
def test_what_is_no_string_is_refused_where_a_string_belongs(tmp_path: Path, text: str) -> None:
    """Never read as another string than the one that was written."""
    (tmp_path / "a.yaml").write_text(LENGTH)
    with pytest.raises(ConfigError, match=r"run\.name: found .*, expected a string"):
        load_config(tmp_path / "a.yaml", [f"run.name={text}"])
    assert load_config(tmp_path / "a.yaml", [f"run.name='{text}'"]).run.name == text


@pytest.mark.parametrize("name", ["1e3", "1.0", "010", "null", "true", "2026", "0x10", ".inf"])
def test_names_are_strings_whatever_they_look_like(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {{validation: {{{name}: data/x}}}}\n{LENGTH}")
    assert load_config(tmp_path / "a.yaml").data.validation == {name: "data/x"}
    if "." not in name:
        assert load_config(tmp_path / "a.yaml", [f"data.validation.{name}=y"]).data.validation[name] == "y"


@pytest.mark.parametrize(
    "text", ["!!timestamp 2001-01-01", "!!python/name:os.system", "!!binary aGk=", "&a [*a]", "9" * 5000, "[" * 3000]
)
def test_values_that_json_has_not_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(LENGTH)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "a.yaml", [f"run.name={text}"])


def test_a_string_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ConfigError, match="isn't Unicode text"):
        config_from_dict({"run": {"dir": "a\udcff"}})


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    text = "optim: &a {lr: 1e-4, eps: 1e-9}\nrun: {name: x}\n"
    assert parse_mapping(text + "other: {<<: *a, lr: 2}\n", "here")["other"] == {"lr": 2, "eps": 1e-9}


# --- inheritance ------------------------------------------------------------------------------------------------------

INHERITED = (
    "data: {train: [a, b], validation: {pile: p, owt: o}, tokenizer: t}\nrouter: {kind: custom, target: 'm:A', "
    "options: {x: 1, y: 2}}\ntrain: {max_steps: 1000, ramp: [{until_step: 5}], selective_ops: [mm]}\n"
)


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ("data: {validation: null}", [], {}),
        ("", ["data.validation=null"], {}),
        ("data: {validation: {mine: m}}", [], {"mine": "m"}),
        ("", ["data.validation={mine: m}"], {"mine": "m"}),
        ("", ["data={validation: {mine: m}}"], {"mine": "m"}),
        ("data: {validation: {}}", [], {}),
        ("", ["data.validation.mine=m"], {"pile": "p", "owt": "o", "mine": "m"}),
        ("", ["data.validation.pile=null"], {"owt": "o"}),
        ("data: {validation: {pile: null, mine: m}}", [], {"mine": "m"}),
        ("data: {validation: null}", ["data.validation.mine=m"], {"mine": "m"}),
        ("data: {validation: {mine: m}}", ["data.validation.more=n"], {"mine": "m", "more": "n"}),
        ("", ["data.validation={mine: m}", "data.validation.more=n"], {"mine": "m", "more": "n"}),
        ("data: {tokenizer: u}", [], {"pile": "p", "owt": "o"}),
    ],
)
def test_inherited_validation_sets(base: Path, file: str, overrides: list[str], expected: dict[str, str]) -> None:
    base.write_text(INHERITED)
    child = base.with_name("child.yaml")
    child.write_text(f"extends: base.yaml\n{file}\n")
    assert load_config(child, overrides).data.validation == expected


def test_null_and_replacement_of_other_settings_that_hold_several_values(base: Path) -> None:
    base.write_text(INHERITED)

    def load(*overrides: str) -> Config:
        return load_config(base, overrides)

    default = Config()
    assert load("data.train=null").data.train == ()
    assert load("data.train=[c]").data.train == (SourceConfig("c"),)
    assert load("train.ramp=null").train.ramp == ()
    assert load("train.selective_ops=null").train.selective_ops == default.train.selective_ops
    assert load("data.tokenizer=null").data.tokenizer is None
    assert load("router.options=null").router == CustomRouterConfig(target="m:A")
    assert load("router.options={z: 3}").router == CustomRouterConfig(target="m:A", options={"z": 3})
    assert load("router.options.z=3").router == CustomRouterConfig(target="m:A", options={"x": 1, "y": 2, "z": 3})
    assert load("router.options.x=null").router == CustomRouterConfig(target="m:A", options={"y": 2})
    assert load("router.target=m:B").router == CustomRouterConfig(target="m:B")  # A's options mean nothing to B
    assert load("router.target=m:B", "router.options.z=3").router == CustomRouterConfig(target="m:B", options={"z": 3})


def test_null_where_nothing_was_inherited_is_no_validation_set(base: Path) -> None:
    base.write_text(INHERITED)
    with pytest.raises(ConfigError, match=r"data\.validation\.pille: found None"):
        load_config(base, ["data.validation.pille=null"])
    with pytest.raises(ConfigError, match="remove the section to take its defaults"):
        load_config(base, ["optim=null"])


def test_a_router_without_a_kind_inherits_from_one_without(base: Path) -> None:
    base.write_text("router: {depth: 2}\n" + LENGTH)
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nrouter: {}\n")
    assert load_config(child).router == load_config(base).router


# --- paths ------------------------------------------------------------------------------------------------------------


def path_settings(section: Any, key: str = "") -> set[str]:
    """Dotted names of all settings that are paths, found by their types."""
    found = set()
    for name, hint in field_types(section).items():
        inner = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
        if "Location" in repr(hint):
            found.add(f"{key}{name}")
        for each in inner:
            found |= path_settings(each, f"{key}{name}.")
    return found


def test_paths_are_expanded_by_their_type_and_recorded_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    paths = path_settings(Config)
    assert paths >= {"run.dir", "data.train.prefix", "data.validation", "data.tokenizer"}
    written = Config(
        run=RunConfig(name="$SCRATCH", dir="~"),
        data=DataConfig(
            train=(SourceConfig("$SCRATCH/a"), SourceConfig("x~/${SCRATCH}b")),
            validation={"$SCRATCH": "~/c$$d"},
            tokenizer="a$1.json",
        ),
    )
    monkeypatch.setenv("1", "one")
    expanded = expand_paths(written)
    assert (expanded.run.name, expanded.run.dir) == ("$SCRATCH", "/home/me")
    assert [source.prefix for source in expanded.data.train] == ["/scratch/a", "x~//scratchb"]
    assert (expanded.data.validation, expanded.data.tokenizer) == ({"$SCRATCH": "/home/me/c$d"}, "aone.json")
    assert config_from_yaml(config_to_yaml(written), "a checkpoint") == written
    assert replace(expanded, run=written.run, data=written.data) == written


@pytest.mark.parametrize("path", ["$NOT_SET/x", "a/${NOT_SET}", "~nobody_of_this_name/x"])
def test_what_cannot_be_expanded_is_named(path: str) -> None:
    config = Config(data=DataConfig(validation={"v": path}))
    assert config_from_yaml(config_to_yaml(config), "a checkpoint") == config  # readable where a variable isn't set
    with pytest.raises(ConfigError, match=r"data\.validation\.v = .*(NOT_SET isn't set|no user)"):
        expand_paths(config)


@given(text=TEXT)
@QUICK
def test_a_literal_path_stays_as_it_is(text: str) -> None:
    assert expand_paths(RunConfig(dir=literal(f"/{text}"))).dir == f"/{text}"


def test_extends_expands_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES", str(base.parent))
    child = base.with_name("child.yaml")
    child.write_text("extends: $RECIPES/base.yaml\n")
    assert load_config(child).train.max_steps == 1000


def test_every_field_is_covered() -> None:
    """`values_of` knows every type of the schema: a new one fails here and not by chance."""
    for name, hint in field_types(Config).items():
        assert values_of(hint) is not None, name
    assert {item.name for item in fields(Config)} == set(field_types(Config))


# --- what the command line says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lr=1e-3"], "write optim.lr=1e-3, without dashes and spaces"),
        (["--optim.lr", "1e-3"], "write optim.lr=VALUE, without dashes and spaces"),
        (["-optim.lr=1e-3"], "write optim.lr=1e-3, without dashes and spaces"),
        (["optim.lr", "1e-3"], "override 'optim.lr': expected optim.lr=1e-3, without spaces"),
        (["optim.lr", "=", "1e-3"], "override 'optim.lr': expected optim.lr=1e-3, without spaces"),
        (["optim.lr=", "1e-3"], "override '1e-3': expected dotted.key=value"),
        (["optim.learningrate=1"], "unknown key"),
        (["optim.wieght_decay=1"], "did you mean optim.weight_decay?"),
        (["data.weight_decay=1"], "did you mean optim.weight_decay?"),
        (["lr=1"], "did you mean optim.lr?"),
    ],
)
@pytest.mark.parametrize("command", [pretrain.main, plan.main, verify_resume.main])
def test_a_setting_written_as_an_option_gets_a_hint(
    base: Path, capsys: pytest.CaptureFixture, command: Command, words: list[str], said: str
) -> None:
    options = ["--gpus", "1", "--gpu", "h100"] if command is plan.main else []
    assert said in refusal(capsys, command, "--config", base, *options, *words)


def test_benchmarks_give_the_hint_too(capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, bench.main, "train", "--config", "x.yaml", "--optim.lr=1e-3")
    assert "write optim.lr=1e-3, without dashes and spaces" in said
