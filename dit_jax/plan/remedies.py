"""Suggests changes that make a training step fit, and computes a lower bound of its memory."""

from typing import Any

from dit_jax.build import Run
from dit_jax.parallel.mesh import rows_per_step

# The share of an estimated saving to count on. XL/2 at 512 px with remat=elementwise saved 96 % of its estimate on v5e:4x4.
RELIABLE = 0.95


def rows_of_device(run: Run) -> int:
    """Number of examples that a device processes at a time."""
    return run.config.batch_size // (rows_per_step(run.mesh) * run.config.microbatches)


def least_bytes(run: Run, state_bytes: dict[str, int]) -> int:
    """Lower bound of the memory of a training step: arguments, gradients and activations.

    All gradients exist at the same time, because the step checks that all are finite before it uses them.

    state_bytes: of `estimate.state_memory`.
    """
    activations = run.task.activation_bytes(rows_of_device(run), run.mesh.shape)
    return sum(state_bytes.values()) + state_bytes["parameters"] + activations


def remedies(run: Run, temporaries: int, state_bytes: dict[str, int], over: int) -> list[dict[str, Any]]:
    """Changes of the config in descending order of the estimated saving per device, [{"what", "saves_bytes", "enough"}].

    Args:
        temporaries: bytes of the program without its arguments.
        state_bytes: of `estimate.state_memory`.
        over: number of bytes that exceed the limit.
    """
    config, task, parameters = run.config, run.task, state_bytes["parameters"]
    # Twice the parameters, because the gradients have the same size.
    split = 2 * parameters + state_bytes["moving_average"] + state_bytes["optimizer"]
    activations = max(0, temporaries - parameters)
    data, fsdp, rows = run.mesh.shape["data"], run.mesh.shape["fsdp"], rows_of_device(run)
    savings = {"a slice of twice the devices, on mesh.fsdp": (split + activations) // 2}
    savings |= task.savings(rows, run.mesh.shape, activations)
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
    ranked = sorted(((text, saved) for text, saved in savings.items() if saved > 0), key=lambda pair: -pair[1])
    return [{"what": text, "saves_bytes": saved, "enough": RELIABLE * saved >= over} for text, saved in ranked]
