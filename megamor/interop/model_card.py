"""The README.md of an export: a Hugging Face model card, from what the checkpoint records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megamor.checkpoint import TrainerState, library_versions
from megamor.checkpoint.layout import TRAINER_FILE
from megamor.config.derive import derive
from megamor.config.segments import stages
from megamor.errors import ConfigError
from megamor.files import parse_json
from megamor.model import Transformer

SCHEMA = "megamor-evaluation/"


def model_card(
    model: Transformer, name: str, source: Path, *, plain: bool, license: str | None, evaluations: Iterable[Path]
) -> str:
    """The text of the card of the model called `name`, which comes from the directory `source`.

    `evaluations` are files of `megamor evaluate --json`; `plain` says that no code comes along.

    Raises:
        ConfigError: a file is not one of `megamor evaluate --json`.
        CheckpointError: the checkpoint's `trainer.json` is damaged.
    """
    state = TrainerState.read(source) if (source / TRAINER_FILE).is_file() else None
    facts = {**model_facts(model), **({} if state is None else training_facts(state))}
    figures = [row for file in evaluations for row in evaluation_rows(file)]
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megamor"]}
    if license:
        header["license"] = license
    remote = "" if plain else ", trust_remote_code=True"
    lines = [
        *("---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"),
        f"# {name}",
        "",
        *table(("", ""), facts.items()),
    ]
    if figures:
        lines += ["", "## Evaluation", "", *table(("Data", "Figure", "Value"), figures)]
    lines += [
        *("", "## Use", "", "```python"),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{remote})',
        'batch = tokenizer(["Once", "In the beginning"], padding=True, return_tensors="pt")',
        "print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=32)))",
        "```",
    ]
    return "\n".join(lines) + "\n"


def model_facts(model: Transformer) -> dict[str, str]:
    """What the card says of the model itself."""
    config = model.config
    derived = derive(config, world_size=1)
    facts = {
        "Parameters": f"{derived.unique_parameters:,} without embedding and head, {model.num_parameters():,} in all",
        "Layers": f"{sum(segment.num_applications for segment in derived.segments)} at full depth, "
        f"{sum(segment.num_blocks for segment in derived.segments)} of them unique",
        "Context": f"{config.model.max_seq_len:,} tokens, {config.data.seq_len:,} in training",
        "Vocabulary": f"{config.model.vocab_size:,}",
    }
    for stage in stages(config):
        rule = model.stages[stage.prefix].router.inference_rule
        limit = "" if rule.threshold is None else f", {rule.score} above {rule.threshold:g}"
        kind = getattr(stage.config.router, "kind", "custom")
        facts[f"Depth of `{stage.name}`"] = f"up to {len(stage.schedule)} recursions; router {kind}, {rule.name}{limit}"
    return facts


def training_facts(state: TrainerState) -> dict[str, str]:
    """What the card says of the training: no paths, as they name the machine."""
    facts = {"Trained on": f"{state.tokens_seen:,} tokens in {state.step:,} steps"}
    if state.flops:
        facts["Training FLOPs"] = f"{state.flops:.3g} (executed)"

    def add(key: str, value: str) -> None:  # names without their paths may be the same
        facts[key] = f"{facts[key]}; {value}" if key in facts else value

    for name, fingerprint in sorted(state.data_fingerprints.items()):
        add(f"Data `{Path(name).name}`", f"fingerprint `{fingerprint}`")
    origin: Any = state.started_from
    while origin:
        at = f" at step {origin['step']}" if origin.get("step") is not None else ""
        parts = Path(str(origin.get("source", "?"))).parts  # every import and conversion is a step_00000000 of some run
        named = [part for part in parts if part != "checkpoints" and not part.startswith("step_")] or parts
        add(f"Started from `{named[-1]}`", f"{origin.get('kind', '?')}{at}, SHA-256 `{origin.get('sha256', '?')}`")
        origin = origin.get("started_from")
    versions = {**library_versions(), **state.versions}
    return {**facts, "Versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def evaluation_rows(file: Path) -> list[tuple[str, str, str]]:
    """Data set, figure and value of what `megamor evaluate --json` wrote to `file`."""
    try:
        report = parse_json(file.read_bytes())
        if not str(report["schema"]).startswith(SCHEMA):
            raise ValueError(f"schema {report['schema']!r}")
        sets = [(name, key, value) for name, figures in report["sets"].items() for key, value in figures.items()]
        for name, figures in report.get("tasks", {}).get("results", {}).items():
            sets += [(name, key, value) for key, value in figures.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a file of `megamor evaluate --json` ({error}): give one") from error
    return [(name, key, f"{value:.6g}") for name, key, value in sets if isinstance(value, int | float)]


def table(header: tuple[str, ...], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
