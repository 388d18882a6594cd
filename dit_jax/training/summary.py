"""The summary of a run, printed before it starts."""

from pathlib import Path

import jax

from dit_jax.build import Run
from dit_jax.parallel import rules
from dit_jax.runtime import versions


def text(run: Run, workdir: Path) -> str:
    """The lines of the summary: model, data shapes, devices, steps, warnings, versions."""
    task, mesh = run.task, run.mesh
    device = mesh.devices.flat[0]
    state = jax.eval_shape(task.init, jax.random.key(0))
    split = state.replace(params={}) if task.zero1 else state
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        (
            f"run        {workdir}",
            *task.description(),
            f"devices    {mesh.devices.size} x {device.device_kind} ({device.platform}) "
            f"on {jax.process_count()} hosts, mesh {axes}",
            f"training   to step {run.config.num_steps}, batch {run.config.batch_size}",
            *(f"warning    {text}" for text in rules.warnings(split, mesh, task.rules)),
            f"versions   {versions.one_line()}",
        )
    )
