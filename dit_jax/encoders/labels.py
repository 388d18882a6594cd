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

MIXED = ("second_label", "second_share")


@dataclass(frozen=True)
class Labels:
    """The label of an example, an integer in [0, num_classes), as {"label": int32[B]}. The null label is `num_classes`.

    The network embeds it. With num_classes = 0 there is no condition. A request may mix two labels: {"second_label": int32[N],
    "second_share": f32[N]} beside "label"; a network that can `mixes_labels` (DiT) then takes (1 - share) of the embedding of
    the first and share of that of the second.

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
        return {name: batch[name] for name in ("label", *MIXED) if name in batch} if self.num_classes else {}

    def from_requests(self, requests: Requests) -> Requests:
        """{"label": int32[N]}, the null label included, and the entries of MIXED if given; {} for an unconditional network."""
        if unknown := sorted(requests.keys() - {"label", *MIXED}):
            raise UserError(f"the network is conditioned on labels and cannot take {', '.join(unknown)}; ask for labels")
        if not self.num_classes or "label" not in requests:
            return {}
        labels: Requests = {name: self._checked(requests[name]) for name in ("label", "second_label") if name in requests}
        if not requests.keys() & set(MIXED):
            return labels
        if not requests.keys() >= set(MIXED):
            raise UserError(f"to mix two labels, give all of label, {', '.join(MIXED)}")
        share = np.asarray(requests["second_share"], np.float32)
        if not ((share >= 0) & (share <= 1)).all():
            raise UserError("second_share must lie in 0 to 1: 0 is the first label, 1 the second")
        return labels | {"second_share": share}

    def _checked(self, given: Any) -> np.ndarray:
        given = np.asarray(given)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"labels are {given.dtype}; they must be whole numbers from 0 to {self.num_classes - 1}")
        labels = given.astype(np.int32)
        if labels.size and not 0 <= labels.min() <= labels.max() <= self.num_classes:
            wrong = labels[(labels < 0) | (labels > self.num_classes)][0]
            raise UserError(f"label {wrong} is out of range: 0 to {self.num_classes - 1}, or {self.num_classes} for no label")
        return labels

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: x if name == "second_share" else jnp.full_like(x, self.num_classes) for name, x in cond.items()}
