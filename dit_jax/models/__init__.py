"""Networks. `DiT` is imported when it is first used, because the sizes alone need neither JAX nor Flax."""

from typing import Any

__all__ = ["DiT"]


def __getattr__(name: str) -> Any:
    if name == "DiT":
        from dit_jax.models.dit import DiT

        return DiT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
