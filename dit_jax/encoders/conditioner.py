"""What a conditioner is: it turns what a user asks for into the condition of a network.

B batch.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from dit_jax.parallel.rules import Rules

Requests = dict[str, np.ndarray]  # host arrays [N, ...] by name, as a training batch has them


class Conditioner(Protocol):
    """A frozen dataclass, chosen by the config section `conditioner`.

    A frozen encoder (a pretrained T5) has its weights in `constants`. A trained one has them in `params`, which are part of the
    training state.

    Fields:
        rules: how the parameters are split over the mesh; () where there are none.
        num_classes: how many labels there are; 0 where the condition is not a label.
    """

    @property
    def rules(self) -> Rules: ...

    @property
    def num_classes(self) -> int: ...

    def init(self, key: jax.Array) -> Any:
        """Parameters to train; {} for a frozen conditioner."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The entries of a training batch that `from_batch` reads, of one example."""

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The entries of the condition, of one example."""

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The condition: arrays [B, ...] by name, {} for an unconditional network."""

    def from_requests(self, requests: Requests) -> Requests:
        """What a batch would hold for these requests.

        Raises:
            UserError: a request that the conditioner does not know, or out of range.
        """

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The condition that stands for none, with the names and shapes of `cond`."""
