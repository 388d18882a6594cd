"""The protocol of feature extractors, and the extractor that needs no network.

N images of H x W pixels and C channels, F features.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from dit_jax.metrics.resize import area_average
from dit_jax.pixels import to_float


class Extractor(Protocol):
    """Maps images to features, including everything that determines their values. A frozen dataclass; its call can be jitted.

    The call takes (params, uint8 [N, H, W, 1 or 3]) and returns {"features": float32 [N, F]}. It may also return "spatial"
    float32 [N, G], for sFID, and "probabilities" float32 [N, K], for the Inception Score. Each row depends on its image alone.

    An extractor with `takes_clips = True` is given clips, uint8 [N, F, H, W, C], whole; any other takes their frames
    as images. Optional: `check_shape(shape)` raises a UserError for examples that it does not take, `remarks(count, shape)` says
    what makes a result unusual, `clips_at_once` is the number of examples per call and device.
    """

    @property
    def name(self) -> str: ...

    def recipe(self) -> dict:
        """Describes resize, input size and precision for result files. Results with different recipes are not compared."""
        ...

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]: ...


@dataclass(frozen=True)
class Pixels:
    """Uses the pixels in [-1, 1] as features, F = H W C, of a clip those of all frames; for tiny images. params is {}."""

    name: str = "pixels"

    takes_clips = True

    def recipe(self) -> dict:
        return {"resize": "none", "range": [-1, 1], "precision": "float32"}

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"features": to_float(images).reshape(len(images), -1)}


@dataclass(frozen=True)
class SmallPixels:
    """Uses the means over a grid of 8 x 8 cells in [-1, 1] as features, F = 64 C: layout and colour, no detail.

    For images whose pixels are too many for a covariance, without a pretrained network; params is {}.

    Fields:
        side: of the grid, in cells.
    """

    name: str = "pixels8"

    side = 8

    def recipe(self) -> dict:
        return {"resize": f"area average to {self.side} x {self.side}", "range": [-1, 1], "precision": "float32"}

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"features": area_average(to_float(images), self.side).reshape(len(images), -1)}
