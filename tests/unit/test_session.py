"""`import megamor`: a session's step is the trainer's, whatever backend; names, keywords and errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import megamor
from megamor.config import Config, DataConfig, FixedDepthConfig, HaltingConfig, ParallelConfig, TokenChoiceConfig
from megamor.config.schema import RampConfig
from megamor.corpus.bpe import train_bpe
from megamor.errors import ConfigError, DataError
from tests.combinations import ROUTERS, staged_config, tiny_config, tokens
from tests.distributed.harness import run_ranks
from tests.distributed.runs import stored_tensors
from tests.resume.runs import fit, tiny_run, trace

ROOT = Path(__file__).parents[2]


def test_names_are_imported_on_first_use_and_documented() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in megamor.__all__:
        assert getattr(megamor, name).__doc__
        assert f"`{name}" in page, name
    assert {*megamor.__all__} <= {*dir(megamor)}
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        megamor.Sesion  # noqa: B018
    code = "import sys, megamor; megamor.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


def test_keywords_are_sections_or_unique_settings() -> None:
    config = megamor.make_config(
        dim=64,
        num_heads=4,
        num_kv_heads=2,
        num_recursions=2,
        num_layers=4,
        sharing="cycle",
        router={"kind": "act"},
        lr=1e-4,
    )
    assert (config.model.dim, config.recursion.num_recursions, config.optim.lr) == (64, 2, 1e-4)
    assert config.router.kind == "act"
    assert config.optim.schedule == "constant"
    steered = megamor.make_config(num_recursions=2, router_layers=[0], router={"kind": "act"}, target_depth=1.5)
    assert isinstance(steered.router, HaltingConfig)
    assert steered.router.target_depth == 1.5
    assert megamor.make_config(max_steps=100, model={"dim": 72}, num_layers=2).optim.schedule == "wsd"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimm": 64}, "dimm is no setting"),
        ({"dim": 65}, "model.dim"),
        ({"model": {"dmi": 64}}, "did you mean model.dim"),
        ({"num_recursions": 3}, "recursion.sharing = none"),
    ],
)
def test_bad_keywords_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        megamor.make_config(**settings)


def session_run(config: Config, steps: int) -> list[float]:
    """Train on the configured shards; the losses."""
    session = megamor.Session(config)
    found = []
    for batch in session.batches():
        losses = session.training_step(batch.inputs, batch.labels, documents=batch.documents, lengths=batch.lengths)
        assert losses.total == losses.language_model + losses.router
        found.append(losses.language_model)
        if session.step == steps:
            break
    session.save(Path(config.run.dir) / f"session_{config.run.name}")
    assert session.routing_stats()["stage"].tokens > 0
    return found


@pytest.mark.parametrize("backend", ["single", "fsdp2", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_session_takes_the_trainers_steps(tmp_path: Path, backend: str) -> None:
    """Same batches, same losses, same weights and moments."""
    world_size = 1 if backend == "single" else 2
    config = tiny_run(tmp_path, backend, micro_batch_size=4 // world_size)
    assert all(fit(config, world_size))
    expected = trace(config)
    losses = run_ranks(session_run, config, 8, world_size=world_size)
    assert losses[0] == [step["train/loss"] for step in expected.steps]
    saved = stored_tensors(tmp_path / "session_tiny" / "latest")
    assert saved.keys() == expected.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.tensors.items())


def test_save_and_load_continue_bitwise(tmp_path: Path) -> None:
    config = replace(staged_config(ROUTERS["ema_threshold"]), parallel=ParallelConfig("single"))
    config = replace(config, train=replace(config.train, precision="fp32"), optim=replace(config.optim, warmup_steps=2))
    straight, stopped = megamor.Session(config), megamor.Session(config)

    def train(session: megamor.Session, steps: range) -> list[megamor.Losses]:
        return [session.training_step(tokens(step)[:, :-1], tokens(step)[:, 1:]) for step in steps]

    expected = train(straight, range(6))
    train(stopped, range(3))
    stopped.save(tmp_path)
    assert train(megamor.Session.load(tmp_path), range(3, 6)) == expected[3:]
    assert megamor.load_model(tmp_path).step == 3


def test_a_checkpoint_has_its_tokenizer(tmp_path: Path) -> None:
    """As one of `megamor pretrain` does; loaded and saved again it keeps it, wherever the file has gone."""
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(["some text"], 300, ["</s>"]).save(str(tokenizer))
    config = replace(tiny_config(TokenChoiceConfig()), parallel=ParallelConfig("single"))
    session = megamor.Session(replace(config, data=DataConfig(tokenizer=str(tokenizer))))
    session.save(tmp_path / "first")
    expected = tokenizer.read_text(encoding="utf-8")
    tokenizer.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
        session.save(tmp_path / "second")
    megamor.Session.load(tmp_path / "first").save(tmp_path / "second")
    loaded = megamor.load_model(tmp_path / "second")
    assert loaded.tokenizer_path.read_text(encoding="utf-8") == expected
    assert loaded.codec().encode("text", "here")


def test_a_step_without_targets_is_refused() -> None:
    session = megamor.Session(replace(tiny_config(TokenChoiceConfig()), parallel=ParallelConfig("single")))
    with pytest.raises(ConfigError, match="no target of this step counts"):
        session.training_step(tokens(), torch.full_like(tokens(), -100))
    assert session.step == 0


def test_statistics_are_reset() -> None:
    session = megamor.Session(replace(tiny_config(TokenChoiceConfig()), parallel=ParallelConfig("single")))
    assert session.routing_stats() == {}
    session.training_step(tokens()[:, :-1], tokens()[:, 1:])
    once = session.routing_stats()["stage"]
    assert once.tokens == tokens()[:, 1:].numel()
    assert sum(once.depth_shares) == pytest.approx(1)
    assert once.mean_depth == pytest.approx(sum(d * share for d, share in enumerate(once.depth_shares)))
    assert once.recursion_rate == pytest.approx(sum(once.depth_shares[2:]))
    assert session.routing_stats(reset=True)["stage"] == once
    assert session.routing_stats() == {}


def test_batches_go_on_where_the_session_is(tmp_path: Path) -> None:
    """In the same session and in one that was loaded, across a change of the length of sequences."""
    config = tiny_run(tmp_path)
    config = replace(config, train=replace(config.train, ramp=(RampConfig(until_step=2, seq_len=16),)))
    session, seen, again = megamor.Session(config), [], []
    for batch in session.batches():
        session.training_step(batch.inputs, batch.labels)
        seen.append(batch.inputs)
        if session.step in (1, 3):
            session.save(tmp_path / "saved")
            again += [next(session.batches()).inputs, next(megamor.Session.load(tmp_path / "saved").batches()).inputs]
        if session.step == 4:
            break
    assert [inputs.shape[1] for inputs in seen] == [16, 16, 32, 32]
    for inputs, expected in zip(again, (seen[1], seen[1], seen[3], seen[3]), strict=True):
        assert torch.equal(inputs, expected)


def scheduled_session(steps: int, router: str = "token_choice", **target: float) -> megamor.Session:
    """Two of six steps each with 1, 2 and 3 recursions, in several stages."""
    config = replace(staged_config(replace(ROUTERS[router], **target)), parallel=ParallelConfig("single"))
    config = replace(config, recursion=replace(config.recursion, schedule="linear"))
    train = replace(config.train, precision="fp32", max_steps=6)
    session = megamor.Session(replace(config, train=train, optim=replace(config.optim, warmup_steps=1)))
    for step in range(steps):
        session.training_step(tokens(step)[:, :-1], tokens(step)[:, 1:])
    return session


def test_a_session_follows_the_schedule(tmp_path: Path) -> None:
    session, deepest = scheduled_session(0, "fixed"), []
    for step in range(6):
        session.training_step(tokens(step)[:, :-1], tokens(step)[:, 1:])
        found = session.routing_stats(reset=step < 5)
        deepest.append(max(depth for depth, share in enumerate(found["layers_0"].depth_shares) if share))
        if step == 2:
            session.save(tmp_path)
    assert deepest == [1, 1, 2, 2, 3, 3]
    assert megamor.load_model(tmp_path).model.recursions == 2
    resumed = megamor.Session.load(tmp_path)
    assert resumed.model.recursions == 2  # at inference
    for step in range(3, 6):
        resumed.training_step(tokens(step)[:, :-1], tokens(step)[:, 1:])
    assert all(torch.equal(a, b) for a, b in zip(session.model.parameters(), resumed.model.parameters(), strict=True))


def test_statistics_are_added_up_over_depths() -> None:
    found = scheduled_session(4).routing_stats()
    assert {stage.tokens for stage in found.values()} == {4 * tokens()[:, 1:].numel()}
    assert found["layers_0"].depth_shares[1] >= 0.5  # all of the first two steps
    assert found["layers_0"].depth_shares[3] == 0


def test_a_step_of_padding_alone_leaves_no_statistics() -> None:
    session, ids = scheduled_session(0), tokens()
    labels = torch.full_like(ids[:, 1:], -100)
    with pytest.raises(ConfigError, match="no target"):
        session.training_step(ids[:, :-1], labels, lengths=torch.zeros(len(ids), dtype=torch.int64))
    assert session.routing_stats() == {}


def test_targets_of_several_stages_are_loaded(tmp_path: Path) -> None:
    session = scheduled_session(1, "skip_forward_recurse", target_depth=1.5)
    session.save(tmp_path)
    loaded = megamor.load_model(tmp_path).model
    assert torch.equal(loaded.get_buffer("layers_0.router.shifts"), session.model.get_buffer("layers_0.router.shifts"))


class Shift(nn.Module):
    """Adds the row of the token before: a layer that mixes tokens, causally."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, rows: Tensor, padding: Tensor) -> Tensor:
        assert padding.shape == rows.shape[:2]
        return rows + self.scale * torch.cat((torch.zeros_like(rows[:, :1]), rows[:, :-1]), 1)


def test_a_layer_of_ones_own_is_applied_to_the_selected_tokens() -> None:
    layer = megamor.RecursiveLayer(Shift(), 8, 3, FixedDepthConfig(depth=2))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    out = layer(x)
    torch.testing.assert_close(out.stream, Shift()(Shift()(x, x[..., 0]), x[..., 0]))
    assert out.depth.tolist() == [[2] * 5] * 2
    routed = megamor.RecursiveLayer(Shift(), 8, 3, TokenChoiceConfig())
    for module in routed.router.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    out = routed(x)
    assert len(out.depth.unique()) > 1
    # Recursion r mixes tokens of depth > r only.
    rows = x
    for recursion in range(3):
        for b in range(2):
            chosen = out.depth[b] > recursion
            rows = rows.clone()
            rows[b, chosen] = Shift()(rows[b, chosen][None], rows[b, chosen][None, :, 0])[0]
    gates = (out.stream - x) / rows
    torch.testing.assert_close(gates, gates[..., :1].expand_as(gates), atol=1e-4, rtol=1e-4)
    (out.stream.sum() + sum(out.losses.values())).backward()
    assert routed.layer.scale.grad is not None
    assert routed.router.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "act"}, "router is a section"),
        ({"kind": "muon"}, r"kind is in optim and router: write optim=\{'kind': ...\}"),
        ({"dim": 64, "model": {"dim": 48}}, "model.dim is given twice"),
        (
            {"recursion": {"num_recursions": 2, "sharing": "cycle", "schedule": "linear"}, "num_layers": 2},
            "needs a len",
        ),
    ],
)
def test_keywords_that_would_be_lost_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        megamor.make_config(**settings)


@pytest.mark.parametrize(("inputs", "targets"), [((2, 9), (2, 8)), ((9,), (9,)), ((1, 999), (1, 999))])
def test_batches_of_other_shapes_are_refused(inputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    session = megamor.Session(replace(tiny_config(TokenChoiceConfig()), parallel=ParallelConfig("single")))
    with pytest.raises(ConfigError, match="give both as"):
        session.training_step(torch.zeros(inputs, dtype=torch.int64), torch.zeros(targets, dtype=torch.int64))
    assert session.step == 0


def test_a_session_follows_the_schedule_of_depth(tmp_path: Path) -> None:
    """Depths 1, 2, 3 in thirds of six steps; a checkpoint knows the depth that it has reached. Sampled: all of it."""
    config = replace(tiny_config(TokenChoiceConfig()), parallel=ParallelConfig("single"))
    config = replace(
        config,
        recursion=replace(config.recursion, schedule="linear"),
        train=replace(config.train, max_steps=6, max_tokens=None, max_flops=None, precision="fp32"),
        optim=replace(config.optim, warmup_steps=0),
    )
    session, deepest = megamor.Session(config), []
    for step in range(6):
        session.training_step(tokens(step)[:, :-1], tokens(step)[:, 1:])
        shares = session.routing_stats(reset=True)["stage"].depth_shares
        deepest.append(max(depth for depth, share in enumerate(shares) if share))
        if step == 2:
            session.save(tmp_path)
    assert deepest == [1, 1, 2, 2, 3, 3]
    assert megamor.load_model(tmp_path).model.recursions == megamor.Session.load(tmp_path).model.recursions == 2
    sampled = megamor.Session(replace(config, recursion=replace(config.recursion, schedule="sampled")))
    sampled.training_step(tokens()[:, :-1], tokens()[:, 1:])
    assert sampled.model.recursions == 3


def test_a_mode_that_is_none_is_refused() -> None:
    """It would be taken for one that looks ahead."""
    config = tiny_config(TokenChoiceConfig())
    layer = megamor.RecursiveLayer(Shift(), 8, num_recursions=3, router=config.router)
    for call in (
        lambda: megamor.build_model(config)(tokens(), mode="eval"),
        lambda: layer(torch.randn(1, 2, 8), "eval"),
    ):
        with pytest.raises(AssertionError, match="give train, topk or causal"):
            call()


def test_a_layer_of_ones_own_counts_recursions_as_flops() -> None:
    layer = megamor.RecursiveLayer(Shift(), 8, 4, TokenChoiceConfig(target_flops=0.5))
    out = layer(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    found = out.ratios["target_error"]
    assert (found.numerator / found.denominator).item() == pytest.approx(out.depth.double().mean().item() / 4 - 0.5)
