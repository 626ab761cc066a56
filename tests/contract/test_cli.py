"""The commands as users run them: help with examples, dry runs of every recipe, checkpoints that were moved."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamor.cli import COMMANDS, evaluate, generate, main, pretrain, sweep_depth
from megamor.cli.serve import check_port
from megamor.config import Config
from megamor.corpus.writer import ShardWriter
from megamor.data.shard import TokenShard
from megamor.devices import usable_device
from megamor.errors import ConfigError, telling_status
from megamor.parallel import init_world
from megamor.train import build_trainer
from tests.commands import refusal, status
from tests.resume.runs import directory_of, tiny_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
TEXT = "the quick brown fox jumps over the lazy dog, and then the dog sleeps. " * 400


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: fastest for tiny models, and safe for later tests that fork."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture) -> None:
    assert status(main, command, "--help") == 0
    _, _, example = re.sub(r"\s+", " ", capsys.readouterr().out).partition("example")
    assert f"megamor {command} " in example, f"no example of megamor {command} in its help"


def processor_seconds(*arguments: str) -> float:
    """User and system time of a new Python process that must print its usage."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read().startswith("usage: megamor")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_takes_half_a_second_of_processor_time(command: str) -> None:
    arguments = ["-m", "megamor", *command.split(), "--help"]
    assert min(processor_seconds(*arguments) for _ in range(3)) <= 0.5


@pytest.mark.parametrize("module", ["megamor.evaluate", "megamor.serve"])
def test_modules_that_are_commands_too(module: str) -> None:
    assert processor_seconds("-m", module, "--help") > 0


def test_a_command_is_imported_only_when_it_runs() -> None:
    program = (
        "import sys; from megamor.cli import main\n"
        "loaded = lambda: {name for name in sys.modules if name.startswith('megamor.cli.')}\n"
        "main(['--help']); assert not loaded()\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: assert loaded() == {'megamor.cli.generate'}, loaded()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_can_be_dry_run(
    path: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "hsdp":  # for machines of eight processes
        for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
    overlay = [] if re.search(r"max_(steps|tokens)", path.read_text()) else ["train.max_steps=1000"]
    assert status(pretrain.main, "--config", path, "--dry-run", f"run.dir={tmp_path}", *overlay) == 2  # without data
    shown, problems = capsys.readouterr()
    named = "pile_train|stdlib_train|fineweb_edu_train|sst2_train|text_train"
    assert re.search(rf"data.train names no data set|data/({named}).idx doesn't exist", problems)
    for line in ("steps", "layers", "parameters", "FLOPs", "memory"):
        assert re.search(rf"^{line}  +\S", shown, re.MULTILINE), f"no line on {line}"
    assert list(tmp_path.iterdir()) == []


def train_tokenizer(path: Path) -> Tokenizer:
    """Byte-level BPE of 280 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    tokenizer.save(str(path))
    return tokenizer


def write_text(prefix: Path, tokenizer: Tokenizer) -> None:
    """`TEXT` as a shard."""
    with ShardWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(tokenizer.encode(TEXT).ids)
        writer.commit()


PROMPTED = ["--prompt", "a", "--kv-budget"]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint moved away from where it was trained, with only a validation set next to it."""
    torch.set_num_threads(1)
    home, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    base = tiny_run(home, max_steps=6, eval_every=3)
    tokenizer = train_tokenizer(home / "tokenizer.json")
    write_text(home / "data" / "train", tokenizer)
    write_text(elsewhere / "val", tokenizer)
    config: Config = replace(
        base,
        model=replace(base.model, vocab_size=280),
        data=replace(base.data, tokenizer=str(home / "tokenizer.json"), validation={}),
    )
    assert build_trainer(config, init_world(config.parallel)).fit()
    shutil.copytree((directory_of(config) / "checkpoints" / "latest").resolve(), elsewhere / "model")
    shutil.rmtree(home)
    return elsewhere


def test_evaluate_a_moved_checkpoint(moved: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(moved / "model"), "--data", str(moved / "val"), "--json", str(tmp_path / "x.json")]
    evaluate.main([*arguments, "--sequences", "8", "--batch-size", "4", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "step 6" in shown
    assert re.search(r"^│ val *│ causal", shown, re.MULTILINE)
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["schema"], found["step"], found["exit"]) == ("megamor-evaluation/1", 6, None)
    assert found["checkpoint"] == str(moved / "model")
    assert {"commit", "versions"} <= found["origin"].keys()
    figures = found["sets"]["val"]
    assert found["mean"]["loss_causal"] == figures["loss_causal"]
    assert f"{figures['bits_per_byte_causal']:.3f}" in shown
    assert figures["tokens"] == 8 * 32
    assert 2 < figures["loss_topk"] < 6
    assert figures["gap"] == pytest.approx(figures["loss_causal"] - figures["loss_topk"])
    assert figures["mean_depth_topk"] == pytest.approx((32 + 21 + 10) / 32)


def test_several_sets_have_the_shape_of_one(moved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A row for each of three sets, named as briefly as they can be told apart, and the mean."""
    prefixes = [moved / "val", tmp_path / "a" / "val", tmp_path / "a" / "third"]
    for number, prefix in enumerate(prefixes[1:]):
        prefix.parent.mkdir(exist_ok=True)
        shard = TokenShard.open(str(moved / "val"))
        with ShardWriter(prefix, np.dtype("<u2")) as writer:
            writer.add(shard.tokens[100 * number + 7 : 700].tolist())
            writer.commit()
    options = ["--checkpoint", str(moved / "model"), "--device", "cpu", "--json", str(tmp_path / "x.json")]
    evaluate.main([*options, "--data", *map(str, prefixes), "--by-position"])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    names = [f"{moved.name}/val", "a/val", "a/third"]
    assert [*found["sets"]] == names
    assert [figures["data"] for figures in found["sets"].values()] == [str(prefix) for prefix in prefixes]
    for name, value in found["mean"].items():
        assert value == pytest.approx(np.mean([figures[name] for figures in found["sets"].values()]))
    assert {"loss_topk", "loss_causal", "accuracy_causal", "bits_per_byte_causal"} <= found["mean"].keys()
    assert f"│ mean of the sets│ causal│ {found['mean']['loss_causal']:.4f}│" in re.sub(" +│", "│", shown)
    for name in names:
        assert re.search(rf"│ {name} *│ top-k", shown)
        assert f"{name}: positions         0: " in shown
    for prefix in prefixes:
        evaluate.main([*options, "--data", str(prefix), "--by-position"])
        alone = json.loads((tmp_path / "x.json").read_text())
        assert alone.keys() == found.keys()
        (figures,) = alone["sets"].values()
        assert figures in found["sets"].values(), "the same figures alone and beside others"
    message = refusal(capsys, evaluate.main, *options, "--data", prefixes[0], prefixes[1], prefixes[0])
    assert "names a data set twice" in message


def test_sweep_depth(moved: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Entries are those of separate `evaluate` runs; one table, one JSON file, one plot."""
    base = ["--checkpoint", str(moved / "model"), "--data", str(moved / "val"), "--sequences", "8", "--device", "cpu"]
    files = ["--json", str(tmp_path / "sweep.json"), "--plot", str(tmp_path / "sweep.svg")]
    sweep_depth.main([*base, *files, "--thresholds", "0.2,0.8", "--exits", "entropy:4.5,5.5", "kl:0.1"])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert (found["schema"], found["step"], found["data"]) == ("megamor-sweep/1", 6, {"val": str(moved / "val")})
    rules = [(entry["rule"], entry["value"]) for entry in found["entries"]]
    depths = [(rule, n) for rule in ("max_depth", "fixed_depth") for n in (1, 2, 3)]
    thresholds = [("inference_threshold", 0.2), ("inference_threshold", 0.8)]
    assert rules == [("own", None), *depths, *thresholds, ("entropy", 4.5), ("entropy", 5.5), ("kl", 0.1)]
    assert len(re.findall("^│", shown, re.MULTILINE)) == len(rules)
    options = {
        ("own", None): [],
        ("max_depth", 2): ["--max-depth", "2"],
        ("fixed_depth", 2): ["--fixed-depth", "2"],
        ("inference_threshold", 0.2): ["--threshold", "0.2"],
        ("entropy", 5.5): ["--exit", "entropy", "--exit-threshold", "5.5"],
    }
    for rule, chosen in options.items():
        evaluate.main([*base, *chosen, "--json", str(tmp_path / "x.json")])
        figures = json.loads((tmp_path / "x.json").read_text())["sets"]["val"]
        entry = found["entries"][rules.index(rule)]
        for name in ("loss", "accuracy", "mean_depth", "flops_per_token"):
            assert entry[name] == figures[f"{name}_causal"]
    drawn = ElementTree.parse(tmp_path / "sweep.svg").getroot()
    words = {text.strip() for text in drawn.itertext()}
    labels = {"at most n recursions", "exactly n recursions", "router.inference_threshold", "exit: entropy", "exit: kl"}
    axes = {"executed FLOPs per token of a forward pass", "loss (nats/token)"}
    assert labels | axes | {"the model's own rule"} <= words
    for option, told in (
        (["--exits", "entropy"], "invalid rule_and_thresholds value: 'entropy'"),
        (["--exits", "luck:1"], "exit = luck is unknown"),
        (["--thresholds", "1.5"], "inference_threshold = 1.5: give a number between 0 and 1"),
        (["--thresholds", "a"], "invalid numbers value: 'a'"),
        (["--max-depths", "4"], "max_depth = 4: the model has 3 recursions; give 1 to 3"),
        (["--plot", "sweep.png"], "--plot sweep.png: give a name that ends in .svg"),
        (["--routing", "topk"], "--routing topk sees later tokens"),
    ):
        assert told in refusal(capsys, sweep_depth.main, *base, *option)
    for option, told in (
        (["--max-depth", "4"], "max_depth = 4: the model has 3 recursions; give 1 to 3"),
        (["--max-depth", "2", "--fixed-depth", "2"], "--max-depth and --fixed-depth exclude each other"),
        (["--threshold", "2"], "inference_threshold = 2.0: give a number between 0 and 1"),
    ):
        assert told in refusal(capsys, evaluate.main, *base, *option)


def test_loss_against_the_bytes_of_the_cache(moved: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(moved / "model"), "--data", str(moved / "val"), "--json", str(tmp_path / "x.json")]
    evaluate.main([*arguments, "--sequences", "4", "--device", "cpu", "--kv-budgets", "9,32", "--kv-sinks", "1"])
    figures = json.loads((tmp_path / "x.json").read_text())["sets"]["val"]
    free, tight, wide = figures["kv_curve"]
    assert [row["budget"] for row in figures["kv_curve"]] == [None, 9, 32]
    assert free["loss"] == pytest.approx(figures["loss_causal"], rel=1e-5)
    assert wide["loss"] == pytest.approx(free["loss"], rel=1e-5)
    assert wide["kv_bytes"] == free["kv_bytes"] > tight["kv_bytes"] > 0
    assert (
        f"9 keys, {tight['kv_bytes'] / 1e3:,.1f} kB a document: {tight['loss']:.4f} nats/token"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("keep", ["score", "depth", "recent"])
def test_generate_with_a_bounded_cache(moved: Path, keep: str, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", str(moved / "model"), "--prompt", "the quick brown fox", "--temperature", "0"]
    texts = []
    for options in ([], ["--kv-budget", "32", "--kv-keep", keep], ["--kv-budget", "8", "--kv-sinks", "1"]):
        generate.main([*arguments, "--max-tokens", "8", "--device", "cpu", *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[2].startswith("the quick brown fox")


@pytest.mark.parametrize("budget", ["0", "x", "8"])
def test_a_budget_that_is_none_ends_the_command(budget: str, moved: Path, capsys: pytest.CaptureFixture) -> None:
    for run, option in ((evaluate.main, ["--data", str(moved / "val"), "--kv-budgets"]), (generate.main, PROMPTED)):
        with pytest.raises(SystemExit) as ended:
            run(["--checkpoint", str(moved / "model"), *option, budget])
        assert ended.value.code == 2
        assert "budget" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--kv-keep", "depth"], ["--kv-sinks", "2"], ["--kv-recent", "0"]])
def test_cache_options_without_a_budget_are_refused(option: list[str], capsys: pytest.CaptureFixture) -> None:
    for command, own in ((evaluate.main, ["--data", "val"]), (generate.main, ["--prompt", "a"])):
        said = refusal(capsys, command, "--checkpoint", "none", *own, *option)
        assert f"{option[0]} has no effect without a budget" in said


def test_generate_from_a_moved_checkpoint(moved: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    picture = tmp_path / "depth.svg"
    arguments = ["--checkpoint", str(moved / "model"), "--prompt", "the quick", "--max-tokens", "5", "--seed", "3"]
    generate.main([*arguments, "--device", "cpu"])
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    generate.main([*arguments, "--device", "cpu", "--show-depth", "--depth-image", str(picture)])
    shown = capsys.readouterr().out
    assert "recursions" in shown
    assert "mean depth" in shown
    assert picture.read_text().startswith("<svg")
    message = refusal(capsys, generate.main, *arguments, "--depth-png", tmp_path / "depth.png")
    assert f"give --depth-image {picture}" in message


def test_a_checkpoint_that_is_not_there(moved: Path, capsys: pytest.CaptureFixture) -> None:
    message = refusal(capsys, generate.main, "--checkpoint", moved / "modal", "--prompt", "x")
    assert message == f"CheckpointError: there is no checkpoint at {moved / 'modal'}\n"


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        usable_device(name)


def test_a_port_in_use_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1, port {port}"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(list(range(200)))
        writer.commit()
    command = f"{sys.executable} -m megamor inspect-data {tmp_path / 'x'} --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("word", "says"),
    [("evalute", "did you mean `megamor evaluate`?"), ("xyzzy", "`megamor --help` lists the commands")],
)
def test_an_unknown_command_names_the_nearest(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([word])
    assert leaving.value.code == 2
    assert f"unknown command {word!r}; {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([76, 75], 75),  # one worker saved and stopped, the other lost the connection to it
        ([75, 1, 76], 1),  # one failed, one waited for it in vain
        ([75, -9], 75),
        ([-6, 76], 134),
        ([-6, 2], 2),
        ([1, 2], 2),  # what a user can mend is said first
        ([134, 75, 76], 75),
        ([75, 100], 100),
        ([137, 76], 137),
        ([0, -9], 137),  # killed by a signal, as a shell reports it
        ([0, 3], 3),
        ([0, 0], 0),
    ],
)
def test_launch_exits_with_the_status_that_explains_most(codes: list[int], expected: int) -> None:
    assert telling_status(codes) == expected
