"""Loads trained networks for sampling, from a run's folder or from a weights file."""

from pathlib import Path
from typing import Any

import jax
import ml_collections

from dit_jax.build import Run
from dit_jax.convert.formats import config_of
from dit_jax.errors import UserError
from dit_jax.interop import weights
from dit_jax.parallel.mesh import place
from dit_jax.storage.checkpoints import restore_subtree
from dit_jax.storage.run_folder import read_config


def read(path: Path) -> tuple[ml_collections.ConfigDict, dict[str, Any] | None]:
    """The config of a run's folder or of a weights file, and the origin of the file's weights (None for a run).

    Raises:
        UserError: neither a run nor a weights file; or the run of an autoencoder.
    """
    if path.suffix == ".safetensors":
        stored = weights.read(path)
        return config_of(stored.sections), stored.origin
    config = ml_collections.ConfigDict(read_config(path))
    if not Run(config).task.draws_samples:
        raise UserError(
            f"{path} is the run of an autoencoder, which cannot be sampled; give {path} as codec.path of a diffusion run"
        )
    return config, None


def load_params(run: Run, path: Path, step: int | None = None) -> tuple[Any, int | None]:
    """(moving-average parameters on the mesh, their step or None) of a run's folder or a weights file.

    Raises:
        UserError: the run has no such checkpoint.
    """
    abstract = run.abstract_state.ema_params
    if path.suffix == ".safetensors":
        return place(weights.load(path, abstract), jax.tree.map(lambda x: x.sharding, abstract)), None
    try:
        restored, _, step = restore_subtree(path / "checkpoints", {"ema_params": abstract}, step)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    return restored["ema_params"], step


def check_guides(run: Run, other: Run, path: Path) -> None:
    """Raises a UserError if the network of `other`, read from `path`, does not predict the same quantity as that of `run`."""
    own, others = run.predicts(), other.predicts()
    for name, value in own.items():
        if others[name] != value:
            raise UserError(
                f"{path} was trained with another {name} ({others[name]}) than the network that it guides ({value}); "
                "both must have the same"
            )
