"""The loop that samplers share: one `lax.scan` over rows of coefficients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process
from dit_jax.errors import UserError


def scan_steps(step: Callable[[Any, Any], Any], carry: Any, coefficients: dict[str, np.ndarray]) -> Any:
    """Runs step(carry, c) -> carry over the rows of the coefficients.

    Floats get the dtype of the carry's first array; integers and booleans keep theirs. c["step"] is the index of the row.
    """
    dtype = jax.tree.leaves(carry)[0].dtype
    rows = {
        name: jnp.asarray(values, dtype if np.issubdtype(values.dtype, np.floating) else None)
        for name, values in coefficients.items()
    }
    rows["step"] = jnp.arange(len(rows["t"]))
    return jax.lax.scan(lambda carry, c: (step(carry, c), None), carry, rows)[0]


def require_continuous(process: Process, sampler: str) -> None:
    """Raises a UserError if the process has discrete timesteps."""
    if not process.continuous:
        raise UserError(
            f"sampler {sampler!r} needs a continuous process, such as 'flow', and process "
            f"{type(process).__name__.lower()!r} has discrete timesteps; choose another sampler, such as ddpm, ddim or heun"
        )
