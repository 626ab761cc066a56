"""Checkpoints that survive a kill at any moment: layout, commit protocol, manager, weights, random states."""

from megamor.checkpoint.background import BackgroundSave
from megamor.checkpoint.manager import CheckpointManager
from megamor.checkpoint.manifest import find_damage, verify
from megamor.checkpoint.reader import Checkpoint, open_checkpoint, stored_file
from megamor.checkpoint.rng import reseed, restore_rng, rng_states, write_rng
from megamor.checkpoint.state import check_same_model, iterate_state, load_weights, state_shapes, weight_shapes
from megamor.checkpoint.trainer_state import TrainerState, code_revision, describe_origin, library_versions, origin_of

__all__ = [
    "BackgroundSave",
    "Checkpoint",
    "CheckpointManager",
    "TrainerState",
    "check_same_model",
    "code_revision",
    "describe_origin",
    "find_damage",
    "iterate_state",
    "library_versions",
    "load_weights",
    "open_checkpoint",
    "origin_of",
    "reseed",
    "restore_rng",
    "rng_states",
    "state_shapes",
    "stored_file",
    "verify",
    "weight_shapes",
    "write_rng",
]
