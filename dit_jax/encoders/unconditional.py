"""The conditioner of an unconditional network."""

from dataclasses import dataclass

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError


@dataclass(frozen=True)
class Unconditional:
    """Returns an empty condition."""

    rules = ()
    num_classes = 0

    def init(self, key):
        return {}

    def batch_spec(self):
        return {}

    def cond_spec(self):
        return {}

    def from_batch(self, params, constants, batch):
        return {}

    def from_requests(self, requests: Requests) -> Requests:
        if requests:
            raise UserError(f"the network is unconditional and cannot take {', '.join(sorted(requests))}")
        return {}

    def null(self, params, constants, cond):
        return {}
