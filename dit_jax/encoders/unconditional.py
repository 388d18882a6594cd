"""The conditioner of an unconditional network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError


@dataclass(frozen=True)
class Unconditional:
    """Returns an empty condition."""

    rules = ()
    num_classes = 0

    def init(self, key: jax.Array) -> dict:
        return {}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {}

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {}

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {}

    def from_requests(self, requests: Requests) -> Requests:
        if requests:
            raise UserError(f"the network is unconditional and cannot take {', '.join(sorted(requests))}")
        return {}

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {}
