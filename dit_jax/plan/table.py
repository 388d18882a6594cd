"""The paper's sizes on one topology each, in the simplest way that fits."""

from typing import Any

from dit_jax import recipes
from dit_jax.plan import estimate
from dit_jax.programs.topology import Topology

# From what communicates and recomputes least: copies of the model; the model split over all devices; and no stored activations.
WAYS = ({}, {"fsdp": True}, {"fsdp": True, "remat": "full"})


def config(size: str, batch_size: int):
    """The paper's config at 256 pixels, on a latent cache."""
    c = recipes.dit(size, 256)
    c.data = {"name": "latents", "path": "", "verify": True}
    c.loader = recipes.loader("latents")
    c.batch_size = batch_size
    return c.lock()


def simplest_that_fits(config, topology: Topology) -> dict[str, Any]:
    """`estimate.plan_training` with the first of WAYS that fits, or with the last."""
    for way in WAYS:
        c = config.copy_and_resolve_references()
        with c.unlocked():
            if way.get("fsdp"):
                c.mesh.update({"data": 1, "fsdp": len(topology.devices)})
            c.model.remat = way.get("remat", c.model.remat)
        found = estimate.plan_training(c, topology)
        if found["fits"]:
            break
    return found
