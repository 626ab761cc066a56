"""A checkpoint, an export or weights from somebody else are data: nothing in them runs, and each attempt is named."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties

from megamor.checkpoint import load_weights, restore_rng
from megamor.checkpoint.manifest import create_manifest, manifest_json, read_manifest
from megamor.checkpoint.trainer_state import TrainerState
from megamor.cli import convert_checkpoint, evaluate, export_hf, generate, import_weights, serve, verify_checkpoint
from megamor.cli.bench import main as bench
from megamor.config import Config
from megamor.errors import CheckpointError
from megamor.load import load_model, read_end_of_text
from megamor.ranks import Ranks
from megamor.routing import custom
from tests.commands import status
from tests.resume.runs import directory_of, fit, fit_to_failure, tiny_run, until
from tests.serve.fake import byte_tokenizer

pytestmark = pytest.mark.promise("R26")


@dataclass
class Call:
    """Pickled as a call of `function`; unpickled by anything careless, it leaves a directory."""

    marker: Path
    function: Callable[..., Any] = os.mkdir

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.function, (str(self.marker),)


@dataclass
class Victim:
    """A copy of a trained checkpoint to tamper with, and what must not appear."""

    checkpoint: Path
    marker: Path

    @property
    def metadata(self) -> Path:
        return self.checkpoint / "state" / ".metadata"

    def seal(self) -> Path:
        """Put the manifest right."""
        (self.checkpoint / "manifest.json").unlink()
        (self.checkpoint / "manifest.json").write_text(manifest_json(create_manifest(self.checkpoint, Ranks())))
        return self.checkpoint

    def change(self, change: Callable[[Metadata], None]) -> None:
        metadata = pickle.loads(self.metadata.read_bytes())
        change(metadata)
        self.metadata.write_bytes(pickle.dumps(metadata))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of four steps with a checkpoint of each second."""
    directory = tmp_path_factory.mktemp("foreign")
    config = tiny_run(directory, max_steps=4)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    data = replace(config.data, tokenizer=str(directory / "tokenizer.json"))
    config = replace(config, model=replace(config.model, vocab_size=256), data=data)
    assert all(fit(until(config, 2), world_size=1))
    return config


@pytest.fixture
def victim(run: Config, tmp_path: Path) -> Victim:
    source = directory_of(run) / "checkpoints" / "step_00000002"
    return Victim(Path(shutil.copytree(source, tmp_path / "step_00000002")), tmp_path / "marker")


# --- the checkpoint's files -------------------------------------------------------------------------------------------


def metadata_is_a_call(victim: Victim) -> str:
    victim.metadata.write_bytes(pickle.dumps(Call(victim.marker)))
    return "posix.mkdir"


def metadata_hold_a_call(victim: Victim) -> str:
    """Right in every other respect: reading it gives weights that work."""
    victim.change(lambda metadata: setattr(metadata, "planner_data", Call(victim.marker)))
    assert pickle.loads(victim.metadata.read_bytes()).state_dict_metadata
    victim.marker.rmdir()
    return "posix.mkdir"


def metadata_call_in_the_oldest_protocol(victim: Victim) -> str:
    victim.metadata.write_bytes(b"cos\nmkdir\n(S'%s'\ntR." % str(victim.marker).encode())
    return "os.mkdir"


def metadata_reach_through_getattr(victim: Victim) -> str:
    """builtins.getattr, which some versions of Python need for enumerations."""
    victim.metadata.write_bytes(
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nS'__init__'\ntR."
    )
    return "getattr"


def metadata_change_a_class(victim: Victim) -> str:
    content = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n(N(dS'__hash__'\nctorch\nSize\nstb0" + (
        victim.metadata.read_bytes()
    )
    victim.metadata.write_bytes(content)
    return "change <class"


def metadata_are_something_else(victim: Victim) -> str:
    victim.metadata.write_bytes(pickle.dumps({"model.embed.weight": 1}))
    return "of another kind"


def object_in_place_of_a_tensor(victim: Victim) -> str:
    """What `dcp.save` makes of an object, which `dcp.load` would run."""
    tensors: dict[str, Any] = {f"model.{name}": value for name, value in load_weights(victim.checkpoint).items()}
    shutil.rmtree(victim.checkpoint / "state")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(tensors | {"model.norm.weight": Call(victim.marker)}, checkpoint_id=victim.checkpoint / "state")
    return "model.norm.weight is an object, not a tensor"


def object_in_a_tensor_s_bytes(victim: Victim) -> str:
    buffer = io.BytesIO()
    torch.save(Call(victim.marker), buffer)
    (victim.checkpoint / "state" / "evil.distcp").write_bytes(buffer.getvalue())

    def point_there(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.norm.weight":
                info.relative_path, info.offset, info.length = "evil.distcp", 0, len(buffer.getvalue())

    victim.change(point_there)
    return "can't read the weights"


def tensor_in_another_file(victim: Victim) -> str:
    def point_elsewhere(metadata: Metadata) -> None:
        index = next(each for each in metadata.storage_data if each.fqn == "model.norm.weight")
        metadata.storage_data[index].relative_path = "../../elsewhere.distcp"

    victim.change(point_elsewhere)
    return "'../../elsewhere.distcp', which is no file of this directory"


def manifest_names_another_file(victim: Victim) -> str:
    (victim.checkpoint.parent / "elsewhere").write_text("secret")
    content = json.loads((victim.checkpoint / "manifest.json").read_text())
    content["files"]["../elsewhere"] = {"size": 6, "sha256": "0"}
    (victim.checkpoint / "manifest.json").write_text(json.dumps(content))
    return "elsewhere is outside the checkpoint"


def link_to_another_file(victim: Victim) -> str:
    (victim.checkpoint.parent / "elsewhere").write_text("secret")
    (victim.checkpoint / "tokenizer.json").unlink()
    (victim.checkpoint / "tokenizer.json").symlink_to(victim.checkpoint.parent / "elsewhere")
    return "tokenizer.json is outside the checkpoint"


def link_to_another_directory(victim: Victim) -> str:
    (victim.checkpoint / "state").rename(victim.checkpoint.parent / "state")
    (victim.checkpoint / "state").symlink_to("../state")
    return "is outside the checkpoint"


def tag_in_the_configuration(victim: Victim) -> str:
    path = victim.checkpoint / "config.yaml"
    path.write_text(path.read_text() + f"x: !!python/object/apply:os.mkdir ['{victim.marker}']\n")
    return "python/object/apply:os.mkdir"


def router_in_the_configuration(victim: Victim) -> str:
    """A module that the process could import, with a class that is a `Router`."""
    source = "from megamor.routing.fixed import FixedDepthRouter\nclass Evil(FixedDepthRouter): pass\n"
    module = f"evil_{victim.checkpoint.parent.name.replace('-', '_')}"
    (victim.checkpoint.parent / f"{module}.py").write_text(f"import os\nos.mkdir({str(victim.marker)!r})\n{source}")
    path = victim.checkpoint / "config.yaml"
    head, _, rest = path.read_text().partition("router:\n")
    rest = rest[rest.index("\ndata:") :]
    path.write_text(f"{head}router: {{kind: custom, target: '{module}:Evil'}}{rest}")
    return f"router.target = {module}:Evil. It was not imported"


ATTACKS = [
    metadata_is_a_call,
    metadata_hold_a_call,
    metadata_call_in_the_oldest_protocol,
    metadata_reach_through_getattr,
    metadata_change_a_class,
    metadata_are_something_else,
    object_in_place_of_a_tensor,
    object_in_a_tensor_s_bytes,
    tensor_in_another_file,
    manifest_names_another_file,
    link_to_another_file,
    link_to_another_directory,
    tag_in_the_configuration,
    router_in_the_configuration,
]
SEALED = {manifest_names_another_file, link_to_another_file, link_to_another_directory}
"""Attacks on the manifest itself, which can't be put right."""

COMMANDS: dict[str, Callable[[Path, Path], int]] = {
    "generate": lambda path, _: status(generate.main, "--checkpoint", path, "--prompt", "a", "--max-tokens", 1),
    "evaluate": lambda path, data: status(evaluate.main, "--checkpoint", path, "--data", data),
    "serve": lambda path, _: status(serve.main, "--checkpoint", path, "--port", 0),
    "export-hf": lambda path, _: status(export_hf.main, "--checkpoint", path, "--output", path.parent / "export"),
    "convert-checkpoint": lambda path, _: status(
        convert_checkpoint.main, path, "--output", path.parent / "converted.safetensors"
    ),
    "verify-checkpoint": lambda path, _: status(verify_checkpoint.main, path),
    "bench": lambda path, _: status(bench, "serve", "--checkpoint", path),
}
RUNS_NO_MODEL = {("convert-checkpoint", tag_in_the_configuration), ("convert-checkpoint", router_in_the_configuration)}
"""It copies weights and the text of the configuration, and reads neither."""


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_and_runs_nothing(
    command: str,
    attack: Callable[[Victim], str],
    victim: Victim,
    run: Config,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(victim.checkpoint.parent))
    message = attack(victim)
    if attack not in SEALED:
        victim.seal()
    expected = 0 if (command, attack) in RUNS_NO_MODEL else 2
    assert COMMANDS[command](victim.checkpoint, Path(run.data.validation["held_out"])) == expected
    captured = capsys.readouterr()
    assert not victim.marker.exists()
    assert not (victim.checkpoint.parent / "export").exists()
    if expected:
        assert message in captured.out + captured.err
        assert "Traceback" not in captured.err


def test_the_same_commands_accept_the_untouched_checkpoint(victim: Victim, run: Config) -> None:
    victim.seal()
    assert MetadataIndex("a") == MetadataIndex("a")
    assert hash(MetadataIndex("a")) == hash(MetadataIndex("a"))  # no attack before has changed the class
    for command in ("generate", "evaluate", "export-hf", "convert-checkpoint", "verify-checkpoint"):
        assert COMMANDS[command](victim.checkpoint, Path(run.data.validation["held_out"])) == 0


def test_the_attacks_work_where_nothing_is_checked(victim: Victim) -> None:
    """Without this, a test that sees no directory would prove nothing."""
    metadata_is_a_call(victim)
    pickle.loads(victim.metadata.read_bytes())
    assert victim.marker.is_dir()


@pytest.mark.parametrize("attack", [metadata_hold_a_call, object_in_place_of_a_tensor, object_in_a_tensor_s_bytes])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_a_run_refuses_on_every_rank(
    world_size: int, attack: Callable[[Victim], str], run: Config, tmp_path: Path
) -> None:
    config = replace(run, run=replace(run.run, dir=str(tmp_path)))
    shutil.copytree(directory_of(run), directory_of(config), symlinks=True)
    victim = Victim(directory_of(config) / "checkpoints" / "step_00000002", tmp_path / "marker")
    message = attack(victim)
    victim.seal()
    for found in fit_to_failure(config, world_size=world_size):
        assert found.startswith("CheckpointError")
        assert message in found
    assert not victim.marker.exists()


def test_random_states(victim: Victim) -> None:
    path = victim.checkpoint / "rng" / "rank_00000.pt"
    torch.save(Call(victim.marker), path)
    contents = [path.read_bytes(), pickle.dumps(Call(victim.marker)), pickle.dumps({"world_size": 1})]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"rank_00000\.pt"):
            restore_rng(victim.checkpoint, rank=0, world_size=1, seed=0, step=0)
    for wrong in ([1], {"world_size": 1, "python": 3, "numpy": 4}, {"world_size": 1, "numpy": ("MT19937", "x")}):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match=r"rank_00000\.pt"):
            restore_rng(victim.checkpoint, rank=0, world_size=1, seed=0, step=0)
    assert not victim.marker.exists()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"token": "a", "id": 1e999, "format": 1, "files": {"a": {"size": 1e999}}}']
)
@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "end_of_text.json"])
def test_json_that_python_refuses_to_convert(name: str, content: str, victim: Victim) -> None:
    (victim.checkpoint / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        {"manifest.json": read_manifest, "trainer.json": TrainerState.read, "end_of_text.json": read_end_of_text}[name](
            victim.checkpoint
        )


def test_files_that_no_reader_expects(victim: Victim) -> None:
    """Each is refused with an error that names the file; none is passed over as if it were absent."""
    checkpoint = victim.checkpoint
    for name in ("a\0b", "a\ud800"):
        text = json.dumps({"format": 1, "files": {name: {"size": 1, "sha256": "0"}}})
        (checkpoint / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read_manifest(checkpoint)
    victim.seal()
    (checkpoint / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop"):
        load_model(checkpoint, "cpu")
    (checkpoint / "loop").unlink()
    config = (checkpoint / "config.yaml").read_text()
    for content in (b"\xff", config.replace("vocab_size: 256", f"vocab_size: {10**18}").encode()):
        (checkpoint / "config.yaml").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.yaml can't be read|can't be built"):
            load_model(victim.seal(), "cpu")
    record = checkpoint / "end_of_text.json"
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("gone", path)):
        record.unlink(missing_ok=True)
        make(record)
        with pytest.raises(CheckpointError, match=r"end_of_text\.json"):
            read_end_of_text(checkpoint)
        if record.is_dir():
            record.rmdir()


def test_chunks_make_up_the_whole_tensor(victim: Victim) -> None:
    """A gap would be filled with whatever the memory held before."""
    original = victim.metadata.read_bytes()
    size = pickle.loads(original).state_dict_metadata["model.embed.weight"].size
    half, huge = torch.Size([size[0] // 2, size[1]]), torch.Size([2**40, 2**20])
    start, outside = torch.Size([0, 0]), torch.Size([size[0], 0])
    for whole, chunks in (
        (size, []),
        (size, [(start, half)]),
        (size, [(start, half), (start, half)]),
        (size, [(start, half), (outside, half)]),
        (size, [(torch.Size([0]), torch.Size([size.numel()]))]),
        (size, [(start, (*size,))]),
        (torch.Size([-1, 3]), [(start, torch.Size([-1, 3]))]),
        (huge, [(start, size)]),
        (huge, [(start, huge)]),
    ):

        def change(metadata: Metadata, whole: torch.Size = whole, chunks: Any = chunks) -> None:
            entry = metadata.state_dict_metadata["model.embed.weight"]
            entry.size, entry.chunks = whole, [ChunkStorageMetadata(*chunk) for chunk in chunks]  # type: ignore[union-attr]

        victim.change(change)
        with pytest.raises(CheckpointError, match=r"model\.embed\.weight|no memory"):
            load_weights(victim.checkpoint)
        victim.metadata.write_bytes(original)
    assert load_weights(victim.checkpoint)["embed.weight"].isfinite().all()


def test_a_tensor_s_properties_keep_their_types(victim: Victim) -> None:
    """An entry that says it is a tensor and isn't described as one."""
    for wrong in (
        lambda entry: setattr(entry, "size", (3, 4)),
        lambda entry: setattr(entry, "properties", "fp32"),
        lambda entry: setattr(entry, "chunks", ["all"]),
        lambda entry: setattr(entry.properties, "dtype", torch.Size((1,))),
    ):
        original = victim.metadata.read_bytes()
        victim.change(lambda metadata, wrong=wrong: wrong(metadata.state_dict_metadata["model.embed.weight"]))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=r"model\.embed\.weight"):
            load_weights(victim.checkpoint)
        victim.metadata.write_bytes(original)
    assert TensorProperties(torch.float32) == TensorProperties(torch.float32)


def test_nothing_in_the_package_opens_files_that_can_run_code() -> None:
    """Every call that would, or that needs an argument in order not to."""
    forbidden = re.compile(
        r"pickle\.loads?$|marshal\.loads?$|shelve\.open$|^eval$|^exec$|np\.load$|numpy\.load$|joblib\.load$|"
        r"yaml\.(unsafe|full)_load|yaml\.load$|torch\.load$|FileSystemReader$|torch\.(jit|hub|package)\.|unpack_archive$"
    )
    allowed = {"torch.load": "weights_only=True", "yaml.load": "Loader=_Loader"}
    package = Path(custom.__file__).parents[1]
    for path in [*package.rglob("*.py"), *package.parent.joinpath("tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and forbidden.search(name := ast.unparse(node.func)):
                keywords = [ast.unparse(keyword) for keyword in node.keywords]
                assert allowed.get(name) in keywords, f"{path}:{node.lineno}: {ast.unparse(node)}"


# --- exports and imports ----------------------------------------------------------------------------------------------


@pytest.fixture
def export(run: Config, tmp_path: Path) -> Path:
    assert status(export_hf.main, "--checkpoint", directory_of(run), "--output", tmp_path / "hf") == 0
    return tmp_path / "hf"


def test_an_export_runs_neither_its_code_nor_a_pickle(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    for module in export.glob("*.py"):
        module.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.chdir(export)
    assert status(generate.main, "--checkpoint", export, "--prompt", "a", "--max-tokens", 1) == 0  # reads data only
    weights = export / "model.safetensors"
    content = weights.read_bytes()
    torch.save({"model.embed.weight": Call(marker)}, export / "pytorch_model.bin")
    shutil.copyfile(export / "pytorch_model.bin", weights)
    assert status(generate.main, "--checkpoint", export, "--prompt", "a") == 2
    weights.unlink()
    assert status(generate.main, "--checkpoint", export, "--prompt", "a") == 2
    weights.write_bytes(content)
    settings = json.loads((export / "config.json").read_text())
    settings["megamor"]["router"] = {"kind": "custom", "target": "modeling_megamor:MegamorForCausalLM"}
    (export / "config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert status(generate.main, "--checkpoint", export, "--prompt", "a") == 2
    assert "router.target = modeling_megamor:MegamorForCausalLM. It was not imported" in capsys.readouterr().err
    assert not marker.exists()


def test_imported_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, weights, settings = tmp_path / "marker", tmp_path / "pytorch_model.bin", tmp_path / "run.yaml"
    settings.write_text("mor: {enable: true}\n")
    arguments = ("--state-dict", weights, "--config", settings, "--output", tmp_path / "out")
    torch.save({"model.embed_tokens.weight": Call(marker)}, weights)
    for content in (weights.read_bytes(), pickle.dumps({"a": Call(marker)})):
        weights.write_bytes(content)
        assert status(import_weights.main, *arguments) == 2
        assert f"{weights} holds something else than tensors" in capsys.readouterr().err
    for wrong in ({1: torch.ones(1)}, {"a": "b"}, [torch.ones(1)]):
        torch.save(wrong, weights)
        assert status(import_weights.main, *arguments) == 2
        assert "is not a state dict" in capsys.readouterr().err
    settings.write_text(f"mor: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert status(import_weights.main, *arguments) == 2
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


# --- custom routers ---------------------------------------------------------------------------------------------------

NO_ROUTERS = {
    "a plain class": "class Thing: pass",
    "a class of something else": "from collections import OrderedDict\nclass Thing(OrderedDict): pass",
    "a function": "def Thing(*_): pass",
    "a name of another module": "from os import mkdir as Thing",
    "nothing": "",
    "a circle": "class Other(Thing): pass\nclass Thing(Other): pass",
    "not Python": "class Thing(:",
}


@pytest.mark.parametrize("name", NO_ROUTERS)
def test_a_target_that_is_no_router_is_not_even_imported(
    name: str, run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the user's own configuration either, and in a package its parents are not imported."""
    package = f"package_{abs(hash((name, str(tmp_path))))}"
    (tmp_path / package).mkdir()
    trap = f"import os\nos.makedirs({str(tmp_path / 'marker')!r})\n"
    (tmp_path / package / "__init__.py").write_text(trap)
    (tmp_path / package / "inside.py").write_text(trap + NO_ROUTERS[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(custom.ConfigError, match=rf"router\.target = {package}\.inside:Thing"):
        custom.import_router(f"{package}.inside:Thing")
    assert not (tmp_path / "marker").exists()
    assert package not in sys.modules


ROUTER_SOURCES = {
    "megamor's protocol": "from megamor.routing import Router\nclass Mine(Router): pass",
    "by attribute": "import megamor.routing as routing\nclass Mine(routing.Router): pass",
    "by full name": "import megamor.routing.router\nclass Mine(megamor.routing.router.Router): pass",
    "a shipped router": "from megamor.routing.fixed import FixedDepthRouter as Base\nclass Mine(Base, object): pass",
    "two steps": "from megamor.routing import Router\nclass Own(Router): pass\nclass Mine(Own): pass",
    "from a neighbour": "from .base import Own\nclass Mine(Own): pass",
    "a neighbour's": "from .base import Own as Mine",
}


@pytest.mark.parametrize("name", ROUTER_SOURCES)
def test_routers_are_recognised_from_their_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"routers_{abs(hash((name, str(tmp_path))))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "base.py").write_text("from megamor.routing import Router\nclass Own(Router): pass\n")
    (tmp_path / package / "mine.py").write_text(ROUTER_SOURCES[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(custom.import_router(f"{package}.mine:Mine"), type)


def test_the_user_can_allow_a_checkpoint_s_router_by_name(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(victim.checkpoint.parent))
    named = router_in_the_configuration(victim)
    victim.seal()
    target = named.removeprefix("router.target = ").partition(". ")[0]
    load = partial(load_model, victim.checkpoint, "cpu")
    monkeypatch.setenv(custom.TRUSTED, "some:Other")
    with pytest.raises(custom.ConfigError, match="asks for code"):
        load()
    assert not victim.marker.exists()
    monkeypatch.setenv(custom.TRUSTED, f"some:Other,{target}")
    with pytest.raises(AttributeError):  # the class, now imported, is called with options that it doesn't know
        load()
    assert victim.marker.exists()
    monkeypatch.delenv(custom.TRUSTED)
    with pytest.raises(AttributeError):  # imported by this process: nothing would run that hasn't
        load()
