"""The paper's twelve models: sizes S, B, L, XL with patches 8, 4, 2."""

import re
from typing import NamedTuple, TypedDict

from dit_jax.errors import UserError


class Size(NamedTuple):
    depth: int
    width: int
    heads: int


class Fields(TypedDict):
    """Fields of `DiT` that a model's name determines."""

    patch_size: int
    depth: int
    width: int
    heads: int


SIZES = {  # Peebles & Xie 2023, table 1
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
PATCHES = (2, 4, 8)
MODELS = tuple(f"{size}/{patch}" for size in SIZES for patch in reversed(PATCHES))

# Of these at 256 px after 400,000 steps of batch size 256, without guidance: (GMACs, FID-50K) (table 4).
FIDS = {
    "S/8": (0.36, 153.60),
    "S/4": (1.41, 100.41),
    "S/2": (6.06, 68.40),
    "B/8": (1.42, 122.74),
    "B/4": (5.56, 68.38),
    "B/2": (23.01, 43.47),
    "L/8": (5.01, 118.87),
    "L/4": (19.70, 45.64),
    "L/2": (80.71, 23.33),
    "XL/8": (7.39, 106.41),
    "XL/4": (29.05, 43.01),
    "XL/2": (118.64, 19.47),
}


def fields(model: str) -> Fields:
    """patch_size, depth, width and heads of "S/8" .. "XL/2", as `DiT` takes them.

    Raises:
        UserError: no such size or patch.
    """
    match = re.fullmatch(r"(\w+)/(\d+)", model)
    if not match or match[1] not in SIZES or int(match[2]) not in PATCHES:
        raise UserError(f"model {model!r} does not exist; choose one of {', '.join(MODELS)}")
    depth, width, heads = SIZES[match[1]]
    return {"patch_size": int(match[2]), "depth": depth, "width": width, "heads": heads}
