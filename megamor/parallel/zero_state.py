"""The state of a DeepSpeed ZeRO engine by parameter: which range of each this rank holds, to be read and written.

The engine keeps fp32 weights and moments in flat buffers of its own making. Seen by parameter they are the same state
as any backend's, so checkpoints of all stages are interchangeable with those of FSDP2, at any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megamor.parallel.single import allocate_optimizer_state
from megamor.parallel.slices import Slices, boxes_of_range

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """State of `optimizer`, the ZeRO optimizer (stages 1 to 3) of an engine around `module`."""

    def __init__(self, module: nn.Module, optimizer: Any, stage: int) -> None:
        self.module, self.zero, self.stage = module, optimizer, stage
        self.torch_optimizer: torch.optim.Optimizer = optimizer.optimizer
        self._allocate_moments()

    def tensors(self) -> dict[str, Tensor]:
        """All state under the names of `state.py`: `Slices` of the engine's own memory, and buffers as they are."""
        persistent = self.module.state_dict().keys()
        found = {f"model.{name}": buffer for name, buffer in self.module.named_buffers() if name in persistent}
        step = self._step_counts()[0]
        for name, parameter in self.module.named_parameters():
            shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty one here
            for key in (None, *MOMENTS):
                boxes = [
                    box for start, flat in self._range(parameter, key) for box in boxes_of_range(flat, start, shape)
                ]
                stored = f"model.{name}" if key is None else f"optimizer.state.{name}.{key}"
                found[stored] = Slices(shape, torch.float32, boxes)
            found[f"optimizer.state.{name}.step"] = step.clone()
        return found

    def after_reading(self, tensors: dict[str, Tensor]) -> None:
        """Take over what was read into `tensors()`: step counts, and the weights that the forward pass uses."""
        counts = {int(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
        assert len(counts) == 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
        for count in self._step_counts():
            count.fill_(min(counts))
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := self.zero.persistent_parameters:
            persistent[0].partition(persistent)  # in a run under way they are there, as they were before
            persistent[0].all_gather(persistent)

    def link_moments(self) -> None:
        """Let parameters know where their moments are, after these have come to be elsewhere."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _range(self, parameter: nn.Parameter, moment: str | None) -> Iterator[tuple[int, Tensor]]:
        """(first element, values [n]) of what this rank holds of a flattened parameter or moment, if anything."""
        if self.stage < 3:
            held = parameter._hp_mapping  # type: ignore[attr-defined]
            if held is not None:
                yield held.lp_fragment_address.start, held.get_hp_fragment(moment)
            return
        flat, _ = self.zero._get_fp32_opt_state_partition(parameter, False, moment)
        start = flat.numel() * self.zero._get_param_partition_rank(parameter)
        count = min(flat.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:  # the rest is padding
            yield start, flat[:count]

    def _step_counts(self) -> list[Tensor]:
        return [state["step"] for state in self.torch_optimizer.state.values()]

    def _allocate_moments(self) -> None:
        """As with the other backends, moments exist from the beginning."""
        if self.stage < 3:
            allocate_optimizer_state(self.torch_optimizer)
            self.link_moments()
        else:  # which lends its buffers to the optimizer for the time of a step
            self.zero._set_fp32_optimizer_param_groups()
            allocate_optimizer_state(self.torch_optimizer)
            self.zero._clear_fp32_optimizer_param_groups()
