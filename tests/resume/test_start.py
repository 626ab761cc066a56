"""A run starts from trained weights: they are the source's bit by bit, and everything else begins anew."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from megamor.checkpoint import TrainerState, load_weights, open_checkpoint
from megamor.cli import export_hf, merge, verify_checkpoint
from megamor.config import (
    CheckpointConfig,
    Config,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    OptimConfig,
    RecursionConfig,
    TokenChoiceConfig,
)
from megamor.config.schema import InitConfig
from megamor.errors import ConfigError, TrainingError
from megamor.files import sha256_of_file
from megamor.interop.depth import convert_depth
from megamor.model import build_model
from megamor.parallel import init_world
from megamor.session import Session
from megamor.train import Trainer, build_trainer
from megamor.train.start import select
from tests.combinations import lively_model, tiny_config
from tests.commands import status
from tests.distributed.runs import stored_tensors
from tests.resume.runs import assert_same_run, directory_of, fit, fit_to_failure, named, tiny_run, trace, until

ROUTER = EmaThresholdConfig()  # a router with weights and buffers
RECURSION = RecursionConfig(num_recursions=3, sharing="middle_cycle", separate_norms=True, lora_rank=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of four steps that keeps a moving average."""
    config = tiny_run(tmp_path_factory.mktemp("source"))
    optim = OptimConfig(lr=3e-2, warmup_steps=0, schedule="constant", average_decay=0.5)
    config = replace(named(config, "source", max_steps=4), router=ROUTER, recursion=RECURSION, optim=optim)
    assert fit(config, world_size=1) == [True]
    return config


def warm(source: Config, name: str = "warm", **init: Any) -> Config:
    """A run of another seed and schedule that starts from `source`."""
    init = {"from_": str(directory_of(source)), **init}
    config = replace(named(source, name, max_steps=3), init=InitConfig(**init), optim=OptimConfig(warmup_steps=1))
    return replace(config, run=replace(config.run, seed=5))


def built(config: Config) -> Trainer:
    """The trainer before its first step; its run's directory is removed."""
    trainer = build_trainer(config, init_world(config.parallel))
    if trainer.lock is not None:
        trainer.lock.release()
    shutil.rmtree(directory_of(config))
    return trainer


def state(config: Config) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in built(config).model.state_dict().items()}


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        built(config)
    return str(caught.value)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_the_weights_are_the_sources_and_everything_else_is_new(
    source: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = directory_of(source) / "checkpoints" / "step_00000004"
    trainer = built(warm(source))
    assert not differing(load_weights(checkpoint), dict(trainer.model.state_dict()))
    assert (trainer.progress.step, trainer.progress.tokens_seen, trainer.progress.flops) == (0, 0, 0)
    assert trainer.loader.state_dict()["consumed_samples"] == 0
    moments = [value for state in trainer.backend.optimizer.state.values() for value in state.values()]
    assert moments
    assert not any(moment.any() for moment in moments)
    digest = sha256_of_file(checkpoint / "manifest.json")
    assert trainer.progress.started_from == {
        "kind": "init", "source": str(checkpoint), "sha256": digest, "step": 4
    }  # fmt: skip
    assert f"warm: starting from {checkpoint} (init, step 4, sha256 {digest})\n" in capsys.readouterr().out


def test_the_run_is_that_of_a_model_with_these_weights(source: Config) -> None:
    """Every step equals that of a run whose weights are set by hand: schedule and data begin at the beginning."""
    config = warm(source, "by_init")
    weights = load_weights(directory_of(source) / "checkpoints" / "latest")
    by_hand = replace(named(config, "by_hand"), init=InitConfig())
    fit(by_hand, 1, lambda trainer: trainer.model.load_state_dict(weights) and None)
    fit(config, 1)
    found = trace(config)
    assert_same_run(trace(by_hand), found)
    assert [step["train/lr"] for step in found.steps] == [0, pytest.approx(3e-3), pytest.approx(3e-3)]


def test_the_source_may_go_once_there_is_a_checkpoint(source: Config, tmp_path: Path) -> None:
    """Provenance survives a resume, an export's name and a merge, and `verify-checkpoint` shows it."""
    copy = tmp_path / "copy"
    shutil.copytree(directory_of(source), copy, symlinks=True)
    config = warm(source, "gone", from_=str(copy))
    fit(until(config, 2), 1)
    before = TrainerState.read(directory_of(config) / "checkpoints" / "latest").started_from
    assert before["source"] == str(copy / "checkpoints" / "step_00000004")
    shutil.rmtree(copy)
    assert fit(config, 1) == [True]
    assert TrainerState.read(directory_of(config) / "checkpoints" / "latest").started_from == before
    shutil.rmtree(directory_of(config))
    assert "copy" in fit_to_failure(config, 1)[0]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_source_again(source: Config) -> None:
    def die(trainer: Trainer) -> None:
        update = trainer.backend.step

        def failing(norm: float) -> Tensor:
            if trainer.progress.step == 1:
                raise TrainingError("dead")
            return update(norm)

        trainer.backend.step = failing  # type: ignore[method-assign]

    straight, killed = warm(source, "straight"), warm(source, "killed")
    fit(straight, 1)
    assert "dead" in fit_to_failure(killed, 1, die)[0]
    fit(killed, 1)
    assert_same_run(trace(straight), trace(killed))


def test_the_moving_average_takes_the_place_of_the_weights(source: Config) -> None:
    stored = stored_tensors(directory_of(source) / "checkpoints" / "latest")
    averages = {name[8:]: value for name, value in stored.items() if name.startswith("average.")}
    found = state(warm(source, average=True))
    parameters = averages.keys() - {"updates"}
    assert not differing({n: found[n] for n in parameters}, {n: averages[n] for n in parameters})
    assert differing(found, load_weights(directory_of(source) / "checkpoints" / "latest")) == parameters
    kept = built(replace(warm(source), optim=OptimConfig(warmup_steps=1, average_decay=0.9))).backend.average
    assert kept is not None
    weights = load_weights(directory_of(source) / "checkpoints" / "latest")
    assert all(torch.equal(value, weights[n[8:]]) for n, value in kept.tensors.items() if n != "average.updates")
    assert kept.updates == 0


@pytest.mark.parametrize(
    ("init", "anew"),
    [
        ({"router": "weights"}, ["stage.router.quantiles", "stage.router.num_updates"]),
        ({"router": "fresh"}, ["stage.router."]),
        ({"lora": "fresh"}, [".down.", ".up."]),
    ],
)
def test_routers_and_low_rank_updates_begin_anew_on_request(
    source: Config, init: dict[str, Any], anew: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = warm(source, **init)
    found, given = state(config), load_weights(directory_of(source) / "checkpoints" / "latest")
    drawn = build_model(config).state_dict()
    names = {name for name in found if any(part in name for part in anew)}
    assert names
    assert not differing({n: found[n] for n in names}, {n: drawn[n] for n in names})
    assert not differing({n: found[n] for n in found.keys() - names}, {n: given[n] for n in found.keys() - names})
    assert "  drawn anew: stage." in capsys.readouterr().out


def test_another_router_is_drawn_and_told(source: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(warm(source), router=TokenChoiceConfig())
    assert refusal(config).endswith("set init.router=fresh")
    found = state(replace(config, init=replace(config.init, router="fresh")))
    drawn = build_model(config).state_dict()
    assert torch.equal(found["stage.router.head.weight"], drawn["stage.router.head.weight"])
    shown = capsys.readouterr().out
    assert "  warning: the source had another router.kind: ema_threshold -> token_choice" in shown
    assert "  not used: stage.router.quantiles, stage.router.num_updates, stage.router.heads" in shown
    without = replace(warm(source), router=FixedDepthConfig())  # the source has routers, this run has none
    assert "stage.router.heads.0.weight (1, 32) is not in the model" in refusal(without)
    state(replace(without, init=replace(without.init, router="fresh")))


def test_everything_that_does_not_fit_is_in_one_error(source: Config) -> None:
    model = replace(source.model, ffn_dim=48, vocab_size=100)
    config = replace(warm(source), model=model, recursion=replace(RECURSION, recursion_embedding=True, lora_rank=3))
    message = refusal(config)
    assert "embed.weight is (128, 32) instead of (100, 32)" in message
    assert "stage.recursion_embedding.2 (32,) is missing" in message
    assert "prelude.0.ffn.down_proj.weight is (32, 64) instead of (32, 48)" in message
    assert "stage.blocks.0.attention.q_proj.up.1.weight is (32, 2) instead of (32, 3)" in message
    assert "attention_norm" not in message
    fix = "init.lora=fresh init.allow_missing=[embed,prelude.0.ffn,"
    assert fix in message
    names = message.rpartition("allow_missing=[")[2].rstrip("]").split(",")
    assert "stage.recursion_embedding" in names
    allowed = replace(config, init=replace(config.init, lora="fresh", allow_missing=tuple(names)))
    found, drawn = state(allowed), build_model(allowed).state_dict()
    given = load_weights(directory_of(source) / "checkpoints" / "latest")
    assert torch.equal(found["embed.weight"], drawn["embed.weight"])  # fewer rows are other tokens
    assert torch.equal(found["coda.0.attention.q_proj.weight"], given["coda.0.attention.q_proj.weight"])
    unknown = warm(source, allow_missing=("stage.ruoter",))
    assert refusal(unknown) == "init.allow_missing names stage.ruoter, which neither model has: correct it"


def test_a_larger_vocabulary_keeps_the_rows_of_the_source(source: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(warm(source, allow_missing=("embed",)), model=replace(source.model, vocab_size=130))
    found, drawn = state(config)["embed.weight"], build_model(config).state_dict()["embed.weight"]
    given = load_weights(directory_of(source) / "checkpoints" / "latest")["embed.weight"]
    assert torch.equal(found[:128], given)
    assert torch.equal(found[128:], drawn[128:])
    assert "  drawn anew from row 128: embed\n" in capsys.readouterr().out


def test_more_recursions_begin_as_copies_of_the_last(source: Config, capsys: pytest.CaptureFixture[str]) -> None:
    grown = replace(RECURSION, num_recursions=4)
    config = replace(warm(source), model=replace(source.model, num_layers=6), recursion=grown)
    config = replace(config, init=replace(config.init, router="weights"))
    found, given = state(config), load_weights(directory_of(source) / "checkpoints" / "latest")
    for name, last in {
        "stage.blocks.0.ffn_norm.others.2": "stage.blocks.0.ffn_norm.others.1",
        "stage.blocks.0.ffn.up_proj.down.3.weight": "stage.blocks.0.ffn.up_proj.down.2.weight",
        "stage.blocks.0.ffn.up_proj.up.3.weight": "stage.blocks.0.ffn.up_proj.up.2.weight",
        "stage.router.heads.3.weight": "stage.router.heads.2.weight",
    }.items():
        assert torch.equal(found[name], given[last]), name
    assert "  copied from the recursion before: " in capsys.readouterr().out


def test_heads_of_the_inference_rule_are_copied_too() -> None:
    config = tiny_config(ExpertChoiceConfig(sampling="aux_router"))
    model = lively_model(config, dtype=torch.float32)
    weights, last = dict(model.state_dict()), "stage.router.aux_router.2."
    fewer = {name: weight for name, weight in weights.items() if not name.startswith(last)}
    taken, _ = select(fewer, config, model, config)
    for name in weights.keys() - fewer.keys():
        assert torch.equal(taken[name], weights[name.replace("aux_router.2", "aux_router.1")])
    assert taken.keys() == weights.keys() != fewer.keys()


def test_norms_of_their_own_begin_as_the_shared_ones(tmp_path: Path) -> None:
    """So the function is the source's."""
    plain = named(tiny_run(tmp_path), "plain", max_steps=1)
    fit(replace(plain, optim=OptimConfig(warmup_steps=0)), 1)
    config = replace(warm(plain), recursion=replace(plain.recursion, separate_norms=True))
    found = state(config)
    for r in (0, 1):
        assert torch.equal(
            found[f"stage.blocks.0.ffn_norm.others.{r}"],
            load_weights(directory_of(plain) / "checkpoints" / "latest")["stage.blocks.0.ffn_norm.weight"],
        )


def test_settings_that_shapes_do_not_show_are_told(source: Config, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(source.model, rope_theta=1e5, norm_eps=1e-6)
    state(replace(warm(source), model=model, recursion=replace(RECURSION, kv_policy="share_first")))
    shown = capsys.readouterr().out
    for change in ("model.rope_theta: 10000.0 -> 100000.0", "model.norm_eps: 1e-05 -> 1e-06", "recursion.kv_policy: "):
        assert f"  warning: the source had another {change}" in shown


def test_an_export_is_a_source(source: Config, tmp_path: Path) -> None:
    out = tmp_path / "export"
    assert status(export_hf.main, "--checkpoint", str(directory_of(source)), "--output", str(out)) == 0
    trainer = built(warm(source, from_=str(out)))
    weights = load_weights(directory_of(source) / "checkpoints" / "latest")
    assert not differing(weights, dict(trainer.model.state_dict()))
    digest = sha256_of_file(out / "model.safetensors")
    assert trainer.progress.started_from == {"kind": "init", "source": str(out.resolve()), "sha256": digest}
    assert "has no moving average (optim.average_decay): set false" in refusal(
        warm(source, from_=str(out), average=True)
    )


def test_a_dense_run_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_run(tmp_path)
    dense = replace(named(base, "dense", max_steps=2), router=FixedDepthConfig(), recursion=RecursionConfig())
    fit(dense, 1)
    config = replace(warm(dense, convert="average"), router=ROUTER, recursion=base.recursion)
    with monkeypatch.context() as patched:
        patched.setattr("megamor.train.start._SHOWN", 24)
        lines = refusal(replace(config, init=warm(dense).init)).splitlines()
    assert len(lines) == 1 + 24 + 4  # the headline, weights, how many more, settings, conversion, the fix
    assert re.fullmatch(r"  and \d+ more", lines[25])
    assert "; recursion.sharing: none -> middle_cycle" in lines[26]
    assert "init.convert: stepwise" in lines[27]
    trainer = built(config)
    found, drawn = trainer.model.state_dict(), build_model(config).state_dict()
    weights = load_weights(directory_of(dense) / "checkpoints" / "latest")
    expected = convert_depth(dense, weights, config, "average")
    assert found.keys() - expected.keys() == {name for name in found if ".router." in name}
    for name, value in found.items():
        assert torch.equal(value, expected.get(name, drawn[name])), name
    layers = [weights[f"prelude.{n}.ffn.up_proj.weight"] for n in (1, 2, 3)]
    torch.testing.assert_close(found["stage.blocks.0.ffn.up_proj.weight"], torch.stack(layers).mean(0))
    assert trainer.progress.started_from["convert"] == "average"
    assert "  drawn anew: stage.router\n" in capsys.readouterr().out
    assert "is missing" in refusal(replace(config, init=replace(config.init, convert=None)))


def test_another_tokenizer_is_refused_unless_it_gives_the_same_ids(source: Config, tmp_path: Path) -> None:
    def written(name: str, *words: str) -> Path:
        Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "a")).save(str(tmp_path / name))
        return tmp_path / name

    first, other = written("first.json", "a", "cat"), written("other.json", "cat", "a")
    based = replace(named(source, "text", max_steps=1), optim=OptimConfig(warmup_steps=1))
    based = replace(based, data=replace(source.data, tokenizer=str(first)))
    fit(based, 1)
    same = json.loads(first.read_text())
    same["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    (tmp_path / "same.json").write_text(json.dumps(same, indent=4))
    for tokenizer in (tmp_path / "same.json", None):
        state(replace(warm(based), data=replace(based.data, tokenizer=tokenizer and str(tokenizer))))
    changed = replace(warm(based), data=replace(based.data, tokenizer=str(other)))
    assert "isn't the tokenizer that the weights were trained with" in refusal(changed)
    added = {**same, "added_tokens": [{"id": 2, "content": "<|im_end|>", "single_word": False, "lstrip": False,
                                       "rstrip": False, "normalized": False, "special": True}]}  # fmt: skip
    (tmp_path / "added.json").write_text(json.dumps(added))
    longer = replace(warm(based), data=replace(based.data, tokenizer=str(tmp_path / "added.json")))
    assert ": added_tokens differ." in refusal(longer)
    assert "allow it: checkpoint.allow_changes=[data.tokenizer]" in refusal(changed)
    state(replace(changed, checkpoint=CheckpointConfig(allow_changes=("data.tokenizer",))))


def test_a_damaged_source_is_refused_and_an_older_one_taken(
    source: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory_of(source), copy, symlinks=True)
    shard = next((copy / "checkpoints" / "step_00000004" / "state").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # of the same size
    shard.write_bytes(content)
    failure = fit_to_failure(warm(source, "damaged", from_=str(copy)), 1)[0]
    assert "no checkpoint in" in failure
    assert "is whole" in failure


def test_provenance_is_a_chain_that_is_shown(
    source: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = warm(source, "first")
    fit(config, 1)
    second = replace(warm(source, "second"), init=InitConfig(from_=str(directory_of(config))))
    fit(second, 1)
    capsys.readouterr()
    assert status(verify_checkpoint.main, str(directory_of(second))) == 0
    first, root = (directory_of(each) / "checkpoints" / f"step_0000000{n}" for each, n in ((config, 3), (source, 4)))
    hashes = [sha256_of_file(each / "manifest.json") for each in (first, root)]
    assert capsys.readouterr().out.splitlines()[1] == (
        f"  started from {first} (init, step 3, sha256 {hashes[0]}), which started from {root} (init, step 4, sha256 "
        f"{hashes[1]})"
    )
    assert status(merge.main, str(first), "--out", str(tmp_path / "merged")) == 0
    merged = TrainerState.read(open_checkpoint(tmp_path / "merged").directory).started_from
    assert (merged["kind"], merged["source"], merged["started_from"]["source"]) == ("merge", str(first), str(root))


def test_a_session_starts_from_weights_and_loads_without_their_source(source: Config, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory_of(source), copy, symlinks=True)
    session = Session(warm(source, from_=str(copy)))
    weights = load_weights(directory_of(source) / "checkpoints" / "latest")
    assert not differing(weights, dict(session.model.state_dict()))
    saved = session.save(tmp_path / "session")
    shutil.rmtree(copy)
    loaded = Session.load(saved)
    assert loaded.started_from["source"] == str(copy / "checkpoints" / "step_00000004")
    assert loaded.config.init.from_ == str(copy)
    with pytest.raises(ConfigError, match=r"init\.branch_from is for `megamor pretrain`"):
        Session(replace(source, init=InitConfig(branch_from="runs/x@3")))


@pytest.mark.parametrize(
    "backend",
    [
        "fsdp2",
        pytest.param("ddp", marks=pytest.mark.slow),
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_every_backend_gives_every_backend_its_weights(source: Config, backend: str | int) -> None:
    """The first step of a warm-up has learning rate 0, so the weights of its checkpoint are those it started from."""
    settings = {"backend": "deepspeed", "zero_stage": backend} if isinstance(backend, int) else {"backend": backend}
    on_two = replace(warm(source, f"on_{backend}"), parallel=replace(source.parallel, **settings))
    on_two = named(on_two, f"on_{backend}", max_steps=1)
    assert fit(on_two) == [True, True]
    weights = load_weights(directory_of(source) / "checkpoints" / "latest")
    found = load_weights(directory_of(on_two) / "checkpoints" / "latest")
    buffers = {"stage.router.quantiles", "stage.router.num_updates"}
    assert differing(weights, found) <= buffers
    back = warm(on_two, "back")
    assert not differing(found, state(replace(back, parallel=source.parallel)))
