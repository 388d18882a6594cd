"""Images -> features, before a distance is taken: what an extractor is, and the one that needs no network.

N images of H x W pixels and C channels, F features.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from dit_jax.pixels import to_float


class Extractor(Protocol):
    """A network's features with everything that decides their numbers; a frozen dataclass, its call can be jitted.

    The call takes (params, uint8 [N, H, W, 1 or 3]) and gives {"features": float32 [N, F]}, and may give "spatial" float32
    [N, G], for sFID, and "probabilities" float32 [N, K], for the Inception Score. No image's row depends on the others'.
    """

    @property
    def name(self) -> str: ...

    def recipe(self) -> dict:
        """What result files say of it: resize, input size, precision. Two results with other recipes are not compared."""
        ...

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]: ...


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves in [-1, 1], F = H W C: for tiny images, where no pretrained network is needed; params is {}."""

    name: str = "pixels"

    def recipe(self) -> dict:
        return {"resize": "none", "range": [-1, 1], "precision": "float32"}

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"features": to_float(images).reshape(len(images), -1)}
