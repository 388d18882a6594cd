"""What every sampler stands on: one `lax.scan` over rows of coefficients."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.forecast import ForecastingDenoise
from dit_jax.diffusion.process import Denoise, Process
from dit_jax.errors import UserError


def scan_steps(step, carry, denoise: Denoise, coefficients: dict[str, np.ndarray]):
    """Runs step(carry, c, denoise) -> carry over the rows of the coefficients.

    Floats get the carry's dtype, integers and booleans stay; c["step"] is the row's number. The `denoise` that a step is given
    is the one passed here, or that of a `ForecastingDenoise` for this step.
    """
    dtype = jax.tree.leaves(carry)[0].dtype
    rows = {
        name: jnp.asarray(values, dtype if np.issubdtype(values.dtype, np.floating) else None)
        for name, values in coefficients.items()
    }
    rows["step"] = jnp.arange(len(rows["t"]))
    if not isinstance(denoise, ForecastingDenoise):
        return jax.lax.scan(lambda carry, c: (step(carry, c, denoise), None), carry, rows)[0]

    def remembering(carry_and_memory, c):
        carry, memory = carry_and_memory
        once = denoise.at(memory, c["step"])
        return (step(carry, c, once), once.memory), None

    return jax.lax.scan(remembering, (carry, denoise.start(jax.tree.leaves(carry)[0])), rows)[0][0]


def require_continuous(process: Process, sampler: str):
    """
    Raises:
        UserError: the process has discrete timesteps.
    """
    if not process.continuous:
        raise UserError(
            f"sampler {sampler!r} needs a network that knows every time, as process 'flow'; process "
            f"{type(process).__name__.lower()!r} has timesteps: choose another sampler, as ddpm, ddim or heun"
        )
