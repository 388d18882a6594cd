"""Class labels as the condition.

B batch, N requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError


@dataclass(frozen=True)
class Labels:
    """The label of an example, an integer in [0, num_classes), as {"label": int32[B]}. The null label is `num_classes`.

    The network embeds it. With num_classes = 0 there is no condition.

    Source: Ho & Salimans 2022, section 3.2.
    """

    num_classes: int

    rules = ()

    def __post_init__(self):
        if self.num_classes < 0:
            raise UserError(f"model.num_classes is {self.num_classes}; it must be at least 0 (0 is unconditional)")

    def init(self, key: jax.Array) -> dict:
        return {}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)} if self.num_classes else {}

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.batch_spec()

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"label": batch["label"]} if self.num_classes else {}

    def from_requests(self, requests: Requests) -> Requests:
        """{"label": int32[N]}, the null label included; {} for an unconditional network."""
        if unknown := sorted(requests.keys() - {"label"}):
            raise UserError(f"the network is conditioned on labels and cannot take {', '.join(unknown)}; ask for labels")
        if not self.num_classes or "label" not in requests:
            return {}
        given = np.asarray(requests["label"])
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"labels are {given.dtype}; they must be whole numbers from 0 to {self.num_classes - 1}")
        labels = given.astype(np.int32)
        if labels.size and not 0 <= labels.min() <= labels.max() <= self.num_classes:
            wrong = labels[(labels < 0) | (labels > self.num_classes)][0]
            raise UserError(f"label {wrong} is out of range: 0 to {self.num_classes - 1}, or {self.num_classes} for no label")
        return {"label": labels}

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: jnp.full_like(label, self.num_classes) for name, label in cond.items()}
