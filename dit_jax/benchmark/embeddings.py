"""The condition of a benchmarked text network: random embeddings in place of the outputs of text encoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError


@dataclass(frozen=True)
class Embeddings:
    """Passes arrays of a batch to the network as they are. No encoder runs, so a speed is that of the network alone.

    Fields:
        shapes: (name, shape of one example) of each entry.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    rules = ()
    num_classes = 0

    def init(self, key: jax.Array) -> dict:
        return {}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in self.shapes}

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.batch_spec()

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: batch[name] for name, _ in self.shapes}

    def from_requests(self, requests: Requests) -> Requests:
        if requests.keys() != self.batch_spec().keys():
            raise UserError(f"the condition is {', '.join(self.batch_spec())}, not {', '.join(sorted(requests)) or 'nothing'}")
        return dict(requests)

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Zeros, which cost as much as the encoding of an empty prompt; a mask stays."""
        return {name: x if name.endswith("_mask") else jnp.zeros_like(x) for name, x in cond.items()}
