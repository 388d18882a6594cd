"""The paper's twelve models: sizes S, B, L, XL with patches 8, 4, 2."""

import re
from typing import NamedTuple

from dit_jax.errors import UserError


class Size(NamedTuple):
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


def fields(model: str) -> dict[str, int]:
    """patch_size, depth, width and heads of "S/8" .. "XL/2", as `DiT` takes them.

    Raises:
        UserError: no such size or patch.
    """
    match = re.fullmatch(r"(\w+)/(\d+)", model)
    if not match or match[1] not in SIZES or int(match[2]) not in PATCHES:
        raise UserError(f"model {model!r} does not exist; choose one of {', '.join(MODELS)}")
    return {"patch_size": int(match[2]), **SIZES[match[1]]._asdict()}
