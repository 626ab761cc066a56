"""Learning from a teacher (`distill.from`): the loss and its gradient, and runs that use it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from megamor.checkpoint.state import MODEL_PREFIX
from megamor.config import Config, FixedDepthConfig, config_to_yaml
from megamor.config.schema import DistillConfig, RecursionConfig
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.interop.depth import convert_depth
from megamor.interop.weights import save_weights
from megamor.load import load_model
from megamor.model import build_model
from megamor.model import loss as loss_module
from megamor.model.flops import executed_flops
from megamor.model.loss import Teacher, linear_cross_entropy
from megamor.parallel import init_world
from megamor.session import Session
from megamor.train import build_trainer
from megamor.train.distill import Distillation
from tests.combinations import lively_model
from tests.distributed.harness import run_ranks
from tests.resume.runs import STEPS, assert_same_run, directory_of, fit, named, tiny_run, trace, until

VOCAB, TOKENS = 97, 50


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def divergence(student: Tensor, teacher: Tensor, top_k: int | None) -> Tensor:
    """KL(teacher || student) [n] of logits [n, vocab]; with `top_k`, of one class for all other tokens."""
    q, p = student.softmax(1), teacher.softmax(1)
    if top_k is not None:
        top = teacher.topk(top_k, dim=1).indices
        q, p = (torch.cat((x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)), 1) for x in (q, p))
    return F.kl_div(q.log(), p, reduction="none").sum(1)


@pytest.mark.parametrize("top_k", [None, 1, 10, VOCAB - 1])
@pytest.mark.parametrize(("temperature", "chunk_elements"), [(1.0, 1 << 25), (2.5, VOCAB * 7)])
def test_the_loss_equals_torch(
    top_k: int | None, temperature: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight = randn(TOKENS, 16, seed=0).requires_grad_(), randn(VOCAB, 16, seed=1).requires_grad_()
    theirs = Teacher(randn(TOKENS, 24, seed=2), randn(VOCAB, 24, seed=3) / 3, 0.7, temperature, top_k)
    labels = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(4))
    labels[::5] = -100
    loss, z_loss, distill_loss = linear_cross_entropy(hidden, weight, labels, 0.1, theirs)
    logits, taught = hidden @ weight.t(), theirs.hidden @ theirs.weight.t()
    wanted_ce = F.cross_entropy(logits, labels, reduction="sum")
    kl = divergence(logits / temperature, taught / temperature, top_k) * (labels != -100)
    wanted = 0.7 * temperature**2 * kl.sum()
    torch.testing.assert_close(loss, wanted_ce)
    torch.testing.assert_close(distill_loss, wanted)
    wanted_z = 0.1 * (logits.logsumexp(1).square() * (labels != -100)).sum()
    torch.testing.assert_close(z_loss, wanted_z)
    expected = torch.autograd.grad(3 * (wanted_ce + wanted_z + wanted), (hidden, weight))
    for found, gradient in zip(torch.autograd.grad(3 * loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_the_own_teacher_adds_nothing() -> None:
    hidden, weight = randn(TOKENS, 16, seed=0).requires_grad_(), randn(VOCAB, 16, seed=1).requires_grad_()
    labels = torch.arange(TOKENS)
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    for top_k in (None, 5):
        own = Teacher(hidden.detach(), weight.detach(), 2.0, 1.5, top_k)
        loss, _, distill_loss = linear_cross_entropy(hidden, weight, labels, 0.0, own)
        assert distill_loss.abs() < 1e-9
        for found, gradient in zip(torch.autograd.grad(loss, (hidden, weight)), plain, strict=True):
            torch.testing.assert_close(found, gradient)


def test_autocast_computes_products_in_bf16() -> None:
    hidden, weight = (randn(TOKENS, 16, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    theirs = Teacher(hidden.detach().bfloat16() + 1, weight.detach().bfloat16())
    labels = torch.arange(TOKENS) % 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, distill_loss = linear_cross_entropy(hidden, weight[:TOKENS], labels, 0.0, replace_rows(theirs))
    assert loss.dtype == distill_loss.dtype == torch.float32
    logits, taught = (h.float() @ w.float().t() for h, w in ((hidden, weight[:TOKENS]), (theirs.hidden, theirs.weight)))
    torch.testing.assert_close(distill_loss, divergence(logits, taught, None).sum(), rtol=0.02, atol=0)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def replace_rows(teacher: Teacher) -> Teacher:
    return replace(teacher, weight=teacher.weight[:TOKENS])


def dense_config(config: Config) -> Config:
    return replace(config, recursion=RecursionConfig(), router=FixedDepthConfig())


def write_teacher(config: Config, directory: Path, **files: Any) -> str:
    """A checkpoint of the model of `config` with weights of some size."""
    weights = lively_model(config, seed=5, dtype=torch.float32).state_dict()
    weights["embed.weight"].mul_(4)  # the head too, so that predictions are far from uniform
    stored = {MODEL_PREFIX + name: weight for name, weight in weights.items()}
    return str(save_weights(directory, stored, {"config.yaml": config_to_yaml(config), **files}).parent)


def taught_run(directory: Path, backend: str = "auto", recursive_teacher: bool = False, **train: Any) -> Config:
    """A tiny run with a teacher: a dense model, or one with an expert-choice router."""
    config = tiny_run(directory, backend, **train)
    theirs = config if recursive_teacher else dense_config(config)
    where = directory / f"teacher_{recursive_teacher}"
    source = str(where) if where.exists() else write_teacher(theirs, where)
    return replace(config, distill=DistillConfig(from_=source, weight=0.5, temperature=2.0, top_k=20))


def records(config: Config) -> list[dict[str, Any]]:
    lines = (directory_of(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "train/loss" in (record := json.loads(line))]


def test_the_divergence_falls(tmp_path: Path) -> None:
    config = taught_run(tmp_path, max_steps=100)
    config = replace(config, optim=replace(config.optim, lr=0.02))
    session = Session(replace(config, distill=replace(config.distill, weight=200.0, top_k=None)))
    tokens = torch.randint(128, (4, 33), generator=torch.Generator().manual_seed(0))
    found = [session.training_step(tokens[:, :-1], tokens[:, 1:]).router for _ in range(15)]
    assert found[-1] < 0.6 * found[0]


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    config = taught_run(tmp_path, recursive_teacher=True, max_steps=4)
    fit(config, world_size=1)
    alone = records(config)
    assert "validation/held_out/loss_causal" in (directory_of(config) / "metrics.jsonl").read_text(encoding="utf-8")
    two = named(config, "two")
    fit(two)
    for one, other in zip(alone, records(two), strict=True):
        for name in ("train/loss", "train/distill_loss", "train/grad_norm", "throughput/executed_flops"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_as_a_straight_one(tmp_path: Path) -> None:
    config = taught_run(tmp_path, recursive_teacher=True)
    fit(config, world_size=1)
    half = named(config, "half")
    fit(until(half, STEPS // 2), world_size=1)
    fit(half, world_size=1)
    assert_same_run(trace(config), trace(half))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_backend(backend: str, policy: str, tmp_path: Path) -> None:
    """Two ranks whose sequences hold a document and padding are as one process."""
    config = with_backend(taught_run(tmp_path, max_steps=4, activation_checkpointing=policy), backend)
    config = replace(config, data=replace(config.data, packing="document", chunk_len=32))
    alone = named(replace(config, parallel=replace(config.parallel, backend="single")), "alone")
    fit(alone, world_size=1)
    fit(config)
    for one, other in zip(records(alone), records(config), strict=True):
        for name in ("train/loss", "train/distill_loss", "train/grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=2e-5), name


def with_backend(config: Config, name: str) -> Config:
    """`config` with a backend; `zero1` to `zero3` are DeepSpeed's."""
    kind, _, stage = name.replace("zero", "deepspeed ").partition(" ")
    parallel: Any = {"backend": kind, "zero_stage": int(stage or 2)}
    return replace(config, parallel=replace(config.parallel, **parallel))


def _steps_where_one_rank_pads(config: Config) -> list[tuple[float, ...]]:
    session = Session(config)
    tokens = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
    padding = session.world.rank == 1
    targets = torch.full_like(tokens, -100) if padding else tokens
    lengths = torch.tensor([0, 0] if padding else [32, 20])
    targets[1, 21:] = -100
    found = [session.training_step(tokens[:, :-1], targets[:, 1:], lengths=lengths) for _ in range(2)]
    return [(losses.language_model, losses.router, losses.grad_norm) for losses in found]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_rank_with_padding_alone(backend: str, tmp_path: Path) -> None:
    config = taught_run(tmp_path)
    alone = run_ranks(_steps_where_one_rank_pads, config, world_size=1)[0]
    for found in run_ranks(_steps_where_one_rank_pads, with_backend(config, backend)):
        assert found == [pytest.approx(losses, rel=2e-5) for losses in alone]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["single", "fsdp2", "deepspeed"])
def test_bf16(backend: str, tmp_path: Path) -> None:
    config = taught_run(tmp_path, backend, max_steps=2, precision="bf16")
    exact = named(taught_run(tmp_path, "single", max_steps=2), "exact")
    fit(exact, world_size=1)
    fit(config, world_size=1 if backend == "single" else 2)
    for one, other in zip(records(exact), records(config), strict=True):
        assert other["train/distill_loss"] == pytest.approx(one["train/distill_loss"], rel=0.03)


def test_a_resumed_run_tells_of_another_teacher(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = taught_run(tmp_path)
    world = init_world(config.parallel)
    plain = replace(config, train=replace(config.train, loss_kernel="reference"))
    build_trainer(until(plain, 1), world).fit()
    told = capsys.readouterr().out
    assert "another teacher" not in told
    assert "\nloss: plain operations (as configured)\n" in told
    other = build_model(dense_config(config), seed=1).state_dict()
    shutil.rmtree(config.distill.from_)
    stored = {MODEL_PREFIX + name: weight for name, weight in other.items()}
    save_weights(Path(config.distill.from_), stored, {"config.yaml": config_to_yaml(dense_config(config))})
    build_trainer(config, world)
    assert "warning: another teacher than before: sha256" in capsys.readouterr().out


def test_flops_of_the_teacher_are_executed(tmp_path: Path) -> None:
    config = taught_run(tmp_path)
    plain = named(replace(config, distill=DistillConfig()), "plain")
    for each in (config, plain):
        fit(until(each, 1), world_size=1)
    fixed = replace(config, router=FixedDepthConfig())
    recursive = named(taught_by(config, write_teacher(fixed, tmp_path / "fixed")), "recursive")
    fit(until(recursive, 1), world_size=1)
    # Expert choice selects as many tokens in each run, so the difference is the teacher.
    base, *flops = (records(each)[0]["throughput/executed_flops"] for each in (plain, config, recursive))
    every = (4 * 32, 4 * 32 * 33 / 2)  # tokens and pairs of each recursion of four windows
    for found, (teacher, work) in zip(flops, ((dense_config(config), ()), (fixed, (every,) * 3)), strict=True):
        assert found - base == pytest.approx(executed_flops(teacher, 4, work, 32).forward, rel=1e-3)


@torch.no_grad()
def test_the_teacher_reads_each_document_alone_and_in_the_precision_of_the_run(tmp_path: Path) -> None:
    config, cpu = taught_run(tmp_path), torch.device("cpu")
    teacher = Distillation.load(config, cpu)
    assert teacher is not None
    tokens = torch.randint(128, (1, 32), generator=torch.Generator().manual_seed(0))
    packed = {"inputs": tokens, "documents": (torch.arange(32) >= 20).long()[None], "lengths": None}
    model = load_model(str(config.distill.from_), "cpu").model
    alone = [model(part, mode="causal", predict=False).hidden for part in tokens.split((20, 12), 1)]
    torch.testing.assert_close(teacher.teach(packed).hidden, torch.cat(alone), rtol=0, atol=1e-5)
    half = Distillation.load(replace(config, train=replace(config.train, precision="bf16")), cpu)
    assert half is not None
    assert half.model.embed.weight.dtype == torch.bfloat16


def test_a_session_learns_from_a_teacher(tmp_path: Path) -> None:
    config = taught_run(tmp_path)
    tokens = torch.randint(128, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = [Session(each).training_step(tokens[:, :-1], tokens[:, 1:]) for each in (config, without(config))]
    assert losses[0].language_model == losses[1].language_model
    assert losses[0].total == losses[0].language_model + losses[0].router
    teacher, student = load_model(str(config.distill.from_), "cpu").model, build_model(config)
    with torch.no_grad():
        out = student(tokens[:, :-1], mode="train")
        kl = divergence(
            out.logits.flatten(0, 1) / 2, teacher(tokens[:, :-1], mode="causal").logits.flatten(0, 1) / 2, 20
        )
    assert losses[0].router - losses[1].router == pytest.approx(0.5 * 4 * float(kl.mean()), rel=1e-4)


def without(config: Config) -> Config:
    return replace(config, distill=DistillConfig())


def test_padding_alone_is_learned_from_by_nobody(tmp_path: Path) -> None:
    """Rows of padding have no teacher; the figures are those of the batch without them."""
    config = taught_run(tmp_path)
    tokens = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((tokens, torch.zeros_like(tokens)))
    targets = padded[:, 1:].clone()
    targets[2:] = -100
    whole = Session(config).training_step(tokens[:, :-1], tokens[:, 1:])
    lengths = torch.tensor([32, 32, 0, 0])
    found = Session(config).training_step(padded[:, :-1], targets, lengths=lengths)
    assert found == pytest.approx(whole, rel=1e-5)


def word_level(words: int) -> str:
    from tokenizers import models

    return Tokenizer(models.WordLevel({f"w{n}": n for n in range(words)}, "w0")).to_str()


def test_refusals(tmp_path: Path) -> None:
    config = taught_run(tmp_path)
    with pytest.raises(ConfigError, match=r"distill.temperature = 3.0 without a teacher: set distill.from"):
        validate(replace(config, distill=DistillConfig(temperature=3.0)))
    with pytest.raises(ConfigError, match=r"distill.top_k = 128 is all of model.vocab_size = 128"):
        validate(replace(config, distill=replace(config.distill, top_k=128)))
    other = replace(config, model=replace(config.model, vocab_size=100))
    with pytest.raises(ConfigError, match=r"has a vocabulary of 100 tokens, and model\.vocab_size is 128"):
        Session(taught_by(config, write_teacher(dense_config(other), tmp_path / "other")))
    (tmp_path / "ours.json").write_text(word_level(128))
    own = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "ours.json")))
    theirs = write_teacher(dense_config(config), tmp_path / "words", **{"tokenizer.json": word_level(127)})
    with pytest.raises(ConfigError, match="isn't the tokenizer that the weights were trained with"):
        Session(taught_by(own, theirs))


def taught_by(config: Config, source: str) -> Config:
    return replace(config, distill=replace(config.distill, from_=source))


def test_a_converted_model_grows_and_learns(tmp_path: Path) -> None:
    """Uptraining: converted with low-rank updates, trained with growing depth and the dense model as its teacher."""
    base = tiny_run(tmp_path, max_steps=6)
    recursion = replace(base.recursion, schedule="linear", lora_rank=4, separate_norms=True, recursion_embedding=True)
    config = replace(base, recursion=recursion)
    dense, source = dense_config(base), write_teacher(dense_config(base), tmp_path / "dense")
    weights = load_model(source, "cpu").model.state_dict()
    converted = convert_depth(dense, weights, config, "svd_lora:4")
    stored = {MODEL_PREFIX + n: converted.get(n, w) for n, w in build_model(config).state_dict().items()}
    start = save_weights(tmp_path / "start", stored, {"config.yaml": config_to_yaml(config)})
    config = replace(config, init=replace(config.init, from_=str(start.parent)), distill=DistillConfig(from_=source))
    fit(config, world_size=1)
    assert [record["train/recursions"] for record in records(config)] == [1, 1, 2, 2, 3, 3]
    trained = load_model(directory_of(config), "cpu").model.state_dict()
    changed = ("others.1", "up.2.weight", "down.2.weight", "recursion_embedding.2")
    for name in (name for name in trained if name.endswith(changed)):
        assert not torch.equal(trained[name], stored[MODEL_PREFIX + name]), name
