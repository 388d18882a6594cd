"""What every sampler stands on: one `lax.scan` over rows of coefficients."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process
from dit_jax.errors import UserError


def scan_steps(step, carry, coefficients: dict[str, np.ndarray]):
    """Runs step(carry, c) -> carry over the rows of the coefficients.

    Floats get the carry's dtype, integers and booleans stay; c["step"] is the row's number.
    """
    dtype = jax.tree.leaves(carry)[0].dtype
    rows = {name: jnp.asarray(values, dtype if np.issubdtype(values.dtype, np.floating) else None)
            for name, values in coefficients.items()}
    rows["step"] = jnp.arange(len(rows["t"]))
    carry, _ = jax.lax.scan(lambda carry, c: (step(carry, c), None), carry, rows)
    return carry


def require_continuous(process: Process, sampler: str):
    """
    Raises:
        UserError: the process has discrete timesteps.
    """
    if not process.continuous:
        raise UserError(f"sampler {sampler!r} needs a network that knows every time, as process 'flow'; process "
                        f"{type(process).__name__.lower()!r} has timesteps: choose another sampler, as ddpm, ddim or heun")
