"""The protocol of conditioners. A conditioner turns a batch or a user's requests into the condition of a network.

B batch.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from dit_jax.parallel.rules import Rules

Requests = dict[str, np.ndarray]  # host arrays [N, ...] by name, as in a training batch


class Conditioner(Protocol):
    """A frozen dataclass, chosen by the config section `conditioner`.

    A frozen encoder (a pretrained T5) has its weights in `constants`. A trained one has them in `params`, which are part of the
    training state.

    Fields:
        rules: how the parameters are split over the mesh; () without parameters.
        num_classes: number of labels; 0 if the condition is not a label.

    One with `takes_text` True turns requests {"caption": str [N], "negative": str [N], optional} into token ids.
    """

    @property
    def rules(self) -> Rules: ...

    @property
    def num_classes(self) -> int: ...

    def init(self, key: jax.Array) -> Any:
        """Trainable parameters; {} for a frozen conditioner."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The entries of a training batch that `from_batch` reads, of one example."""

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The entries of the condition, of one example."""

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The condition: arrays [B, ...] by name, {} for an unconditional network."""

    def from_requests(self, requests: Requests) -> Requests:
        """The entries of a batch for these requests; entries that it has returned are returned again.

        Raises:
            UserError: the conditioner does not support a request, or a request is out of range.
        """

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The null condition, with the names and shapes of `cond`."""


class Frozen(Protocol):
    """Optional members of a conditioner with frozen encoders. `build.Run` reads their weights.

    Fields:
        constant_rules: how the constants are split over the mesh.
    """

    @property
    def constant_rules(self) -> Rules: ...

    def constants(self) -> dict[str, Any]:
        """The encoders' weights, and what is computed of them once, as ShapeDtypeStructs; {} without a frozen encoder."""


def constants_of(conditioner: Conditioner) -> tuple[dict[str, Any], Rules]:
    """(constants, their rules) of a conditioner, see `Frozen`; ({}, ()) if it has no such members."""
    constants = getattr(conditioner, "constants", dict)()
    return constants, tuple(getattr(conditioner, "constant_rules", ()))
