"""What would make a training step fit, the largest saving first; and the least that any step needs."""

from typing import Any

from dit_jax.models.dit import DiT

# Activations of one block that its gradient reads, in units of [B, N, D]: what enters it, then qkv, attention, and both products
# of the MLP. The compiler keeps more (norms, scores, float32 copies); this is the least.
ENTERS, INSIDE = 1, 9
# Of an estimated saving, what is counted on: XL/2 at 512 px with remat=elementwise saved 96 % of its estimate on v5e:4x4.
RELIABLE = 0.95
NOTHING_INSIDE = ("full", "offload")  # remat policies that keep no more than a block's input on the device


def activation_bytes(config, task, mesh, remat: str) -> int:
    """The least that a device must keep between the forward and the backward of one microbatch; 0 for other networks than DiT."""
    network = getattr(task, "network", None)
    if not isinstance(network, DiT):
        return 0
    h, w, _ = task.latent_shape
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches)
    tokens = (h // network.patch_size) * (w // network.patch_size) // mesh.shape["sequence"]
    unit = rows * tokens * network.width * network.dtype(0).itemsize
    return network.depth * unit * (ENTERS if remat in NOTHING_INSIDE else ENTERS + INSIDE // mesh.shape["tensor"])


def least_bytes(config, task, mesh, state_bytes: dict[str, int]) -> int:
    """A bound from below for the memory of a training step: what it is given, the gradients, the activations.

    All gradients are there at once, because the step asks whether every one is finite before it uses any.

    state_bytes: of `plan.state_memory`.
    """
    remat = config.model.remat if "model" in config else "none"
    return sum(state_bytes.values()) + state_bytes["parameters"] + activation_bytes(config, task, mesh, remat)


def remedies(config, task, mesh, temporaries: int, state_bytes: dict[str, int], over: int) -> list[dict[str, Any]]:
    """[{"what", "saves_bytes", "enough"}]: changes of the config, by the bytes per device that each is estimated to save.

    Args:
        temporaries: bytes of the program beside its arguments.
        state_bytes: of `plan.state_memory`.
        over: how many bytes are too many.
    """
    parameters = state_bytes["parameters"]
    # Twice the parameters, because the gradients are as large.
    split = 2 * parameters + state_bytes["moving_average"] + state_bytes["optimizer"]
    activations = max(0, temporaries - parameters)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    rows = config.batch_size // (data * fsdp * config.microbatches)
    found = {"a slice of twice the devices, on mesh.fsdp": (split + activations) // 2}
    remat = config.model.remat if "model" in config else None
    for policy, price in (("elementwise", "recomputes what is cheap"), ("full", "a third more arithmetic")):
        if remat == "none" or (policy == "full" and remat in ("dots", "elementwise")):
            kept = activation_bytes(config, task, mesh, policy)
            # One block at a time has all of its activations.
            found[f"--config.model.remat={policy} ({price})"] = int((activations - kept) * (1 - 1 / task.network.depth))
    # While the optimizer runs, what was in the host is on the device, in place of the activations.
    if task.offload == "none":
        found["--config.mesh.offload=optimizer (Adam's moments to the host and back in every step)"] = min(
            state_bytes["optimizer"], activations
        )
    if task.offload != "optimizer_and_ema":
        found["--config.mesh.offload=optimizer_and_ema (the moving average too)"] = min(
            state_bytes["optimizer"] + state_bytes["moving_average"], activations
        )
    if data > 1:
        found[f"--config.mesh.data=1 --config.mesh.fsdp={fsdp * data} (gathers parameters when used)"] = split - split // data
    if task.zero1 and fsdp > 1:
        found["--config.mesh.zero1=False (gathers parameters when used)"] = 2 * (parameters - parameters // fsdp)
    if rows > 1 and rows % 2 == 0:
        found[f"--config.microbatches={2 * config.microbatches} (the same result, in parts)"] = activations // 2
        found[f"--config.batch_size={config.batch_size // 2} (another optimisation)"] = activations // 2
    if "model" in config and config.model.param_dtype == "float32":
        found["--config.model.param_dtype=bfloat16 (Adam's moments too; small updates are lost)"] = (
            2 * parameters + state_bytes["optimizer"]
        ) // 2
    ranked = sorted(((text, saved) for text, saved in found.items() if saved > 0), key=lambda pair: -pair[1])
    return [{"what": text, "saves_bytes": saved, "enough": RELIABLE * saved >= over} for text, saved in ranked]
