"""What `sample` draws from, chosen by --job: noise, a given image or clip, noise between two seeds, or a lower resolution.

A new job is a file and one `register` line here; user code calls `dit_jax.register("job", name, constructor)`. The fields of a
job are flags of `sample`.
"""

from collections.abc import Mapping
from typing import Any

from dit_jax import registry
from dit_jax.registry import register
from dit_jax.sample.jobs.edit import Edit
from dit_jax.sample.jobs.given_frames import Animate, Connect, Extend, Loop
from dit_jax.sample.jobs.inpaint import Inpaint
from dit_jax.sample.jobs.interpolate import Interpolate
from dit_jax.sample.jobs.job import Job
from dit_jax.sample.jobs.upsample import Upsample

__all__ = ["Animate", "Connect", "Edit", "Extend", "Inpaint", "Interpolate", "Job", "Loop", "Upsample", "made"]

register("job", "generate", Job)
register("job", "edit", Edit)
register("job", "inpaint", Inpaint)
register("job", "interpolate", Interpolate)
register("job", "upsample", Upsample)
register("job", "animate", Animate)
register("job", "extend", Extend)
register("job", "connect", Connect)
register("job", "loop", Loop)


def made(name: str, fields: Mapping[str, Any]) -> Job:
    """The registered job of this name with these fields.

    Raises:
        UserError: no such job, or an error of its constructor.
    """
    return registry.get("job", name)(**fields)
