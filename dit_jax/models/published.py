"""Networks of papers: their fields, their input, and the FIDs that were published with them.

A network's class may have `published`, {name: Published}. `plan --models` counts the parameters and multiply-adds of each, and
`benchmark --model=` takes their names.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Fid(NamedTuple):
    """A published FID-50K.

    Fields:
        setting: what it was measured with, as in "guidance 1.5".
        source: the paper and its table.
    """

    value: float
    setting: str
    source: str


class Published(NamedTuple):
    """A network of a paper.

    Fields:
        fields: keyword arguments of the network's constructor, out_channels among them.
        input_shape: of one example, (h, w, c) or (f, h, w, c).
        fids: published with it.
        process: the name of the diffusion process that it was trained with.
        after: the published network that makes the image which this one upsamples.
        cond_shapes: entries of its condition, without the batch axis; "label" is int32, the others are float32.
    """

    fields: Mapping[str, Any]
    input_shape: tuple[int, ...]
    fids: tuple[Fid, ...] = ()
    process: str = "gaussian"
    after: str | None = None
    cond_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({"label": ()})
