"""Which block runs where: parameter-sharing strategies (paper section 2.2.1, table 1).

The effective depth L splits into prelude, core and coda. The core's L_core = Nr · n layers are Nr recursions of n
layers each; `schedule[r][j]` is the unique block that runs as layer j of recursion r.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamor.config import Config


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model: how many blocks come before and after the core, and its schedule (empty for vanilla)."""

    num_prelude: int
    schedule: tuple[tuple[int, ...], ...]
    num_coda: int

    @property
    def num_core(self) -> int:
        """Unique blocks of the core."""
        return len(self.schedule[0]) if self.schedule else 0


def layer_stack(config: Config) -> LayerStack:
    """The layers of a validated config."""
    sharing, num_recursions = config.recursion.sharing, config.recursion.num_recursions
    num_layers = config.model.num_layers
    if sharing == "none":
        return LayerStack(num_layers, (), 0)
    # The middle variants leave the first and the last layer unshared.
    edge = 1 if sharing.startswith("middle") else 0
    num_unique = (num_layers - 2 * edge) // num_recursions
    steps = range(num_recursions)
    if sharing.endswith("cycle"):
        schedule = tuple(tuple(range(num_unique)) for _ in steps)
    else:
        schedule = tuple(tuple((r * num_unique + j) // num_recursions for j in range(num_unique)) for r in steps)
    return LayerStack(edge, schedule, edge)
