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
