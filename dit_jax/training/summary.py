"""What a run is, in a few lines, before it starts."""

import importlib.metadata
import subprocess
from pathlib import Path

import jax

from dit_jax.build import Run
from dit_jax.parallel import rules

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what can change a result, and this code's commit ("unknown" outside a checkout)."""
    import dit_jax

    found = {"dit_jax": dit_jax.__version__, "commit": git_commit()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Short hash of the checkout that holds this package, with "+" when it has changes."""

    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "--short", "HEAD")
        return "unknown" if head.returncode else head.stdout.strip() + "+" * bool(git("status", "--porcelain", "-uno").stdout)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def text(run: Run, workdir) -> str:
    """The summary that a run begins with."""
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
            "versions   " + " ".join(f"{name} {version}" for name, version in versions().items()),
        )
    )
