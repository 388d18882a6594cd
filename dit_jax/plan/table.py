"""Plans the paper's sizes on a topology, each with the simplest settings that fit."""

from typing import Any

from dit_jax import recipes
from dit_jax.plan import estimate
from dit_jax.programs.topology import Topology

# In the order of communication and recomputation: replicated; split over all devices; split, without stored activations.
WAYS = ({}, {"fsdp": True}, {"fsdp": True, "remat": "full"})


def config(size: str, batch_size: int):
    """The paper's config at 256 pixels with a latent cache."""
    c = recipes.dit(size, 256)
    c.data = {"name": "latents", "path": "", "verify": True}
    c.loader = recipes.loader("latents")
    c.batch_size = batch_size
    return c.lock()


def simplest_that_fits(config, topology: Topology) -> dict[str, Any]:
    """Calls `estimate.plan_training` with the first of WAYS that fits, or the last one."""
    for way in WAYS:
        c = config.copy_and_resolve_references()
        with c.unlocked():
            if way.get("fsdp"):
                c.mesh.update({"data": 1, "fsdp": len(topology.devices)})
            c.model.remat = way.get("remat", c.model.remat)
        plan = estimate.plan_training(c, topology)
        if plan["fits"]:
            break
    return plan
