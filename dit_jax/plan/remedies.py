"""Suggests changes that make a training step fit, and computes a lower bound of its memory."""

from typing import Any

from dit_jax.models.dit import DiT

# Activations of one block that its gradient reads, in units of [B, N, D]: its input, then qkv, attention, and both products of
# the MLP. The compiler keeps more (norms, scores, float32 copies); this is the minimum.
ENTERS, INSIDE = 1, 9
# Reliable share of an estimated saving: XL/2 at 512 px with remat=elementwise saved 96 % of its estimate on v5e:4x4.
RELIABLE = 0.95
NOTHING_INSIDE = ("full", "offload")  # remat policies that keep only a block's input on the device


def activation_bytes(config, task, mesh, remat: str) -> int:
    """Lower bound of a device's activations between forward and backward pass of a microbatch; 0 for networks other than DiT."""
    network = getattr(task, "network", None)
    if not isinstance(network, DiT):
        return 0
    h, w, _ = task.latent_shape
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches)
    tokens = (h // network.patch_size) * (w // network.patch_size) // mesh.shape["sequence"]
    unit = rows * tokens * network.width * network.dtype(0).itemsize
    return network.depth * unit * (ENTERS if remat in NOTHING_INSIDE else ENTERS + INSIDE // mesh.shape["tensor"])


def least_bytes(config, task, mesh, state_bytes: dict[str, int]) -> int:
    """Lower bound of the memory of a training step: arguments, gradients and activations.

    All gradients exist at the same time, because the step checks that all are finite before it uses them.

    state_bytes: of `estimate.state_memory`.
    """
    remat = config.model.remat if "model" in config else "none"
    return sum(state_bytes.values()) + state_bytes["parameters"] + activation_bytes(config, task, mesh, remat)


def remedies(config, task, mesh, temporaries: int, state_bytes: dict[str, int], over: int) -> list[dict[str, Any]]:
    """Changes of the config in descending order of the estimated saving per device, [{"what", "saves_bytes", "enough"}].

    Args:
        temporaries: bytes of the program without its arguments.
        state_bytes: of `estimate.state_memory`.
        over: number of bytes that exceed the limit.
    """
    parameters = state_bytes["parameters"]
    # Twice the parameters, because the gradients have the same size.
    split = 2 * parameters + state_bytes["moving_average"] + state_bytes["optimizer"]
    activations = max(0, temporaries - parameters)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    rows = config.batch_size // (data * fsdp * config.microbatches)
    savings = {"a slice of twice the devices, on mesh.fsdp": (split + activations) // 2}
    remat = config.model.remat if "model" in config else None
    for policy, price in (("elementwise", "recomputes what is cheap"), ("full", "a third more arithmetic")):
        if remat == "none" or (policy == "full" and remat in ("dots", "elementwise")):
            kept = activation_bytes(config, task, mesh, policy)
            # At any time, one block has all of its activations.
            savings[f"--config.model.remat={policy} ({price})"] = int((activations - kept) * (1 - 1 / task.network.depth))
    # While the optimizer runs, offloaded arrays are on the device, in place of the activations.
    if task.offload == "none":
        savings["--config.mesh.offload=optimizer (Adam's moments to the host and back in every step)"] = min(
            state_bytes["optimizer"], activations
        )
    if task.offload != "optimizer_and_ema":
        savings["--config.mesh.offload=optimizer_and_ema (the moving average too)"] = min(
            state_bytes["optimizer"] + state_bytes["moving_average"], activations
        )
    if data > 1:
        savings[f"--config.mesh.data=1 --config.mesh.fsdp={fsdp * data} (gathers parameters when used)"] = split - split // data
    if task.zero1 and fsdp > 1:
        savings["--config.mesh.zero1=False (gathers parameters when used)"] = 2 * (parameters - parameters // fsdp)
    if rows > 1 and rows % 2 == 0:
        savings[f"--config.microbatches={2 * config.microbatches} (the same result, in parts)"] = activations // 2
        savings[f"--config.batch_size={config.batch_size // 2} (another optimisation)"] = activations // 2
    if "model" in config and config.model.param_dtype == "float32":
        savings["--config.model.param_dtype=bfloat16 (Adam's moments too; small updates are lost)"] = (
            2 * parameters + state_bytes["optimizer"]
        ) // 2
    ranked = sorted(((text, saved) for text, saved in savings.items() if saved > 0), key=lambda pair: -pair[1])
    return [{"what": text, "saves_bytes": saved, "enough": RELIABLE * saved >= over} for text, saved in ranked]
