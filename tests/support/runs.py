"""Makes run folders without training; reads configs from their files."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from paths import ROOT

from dit_jax.config_file import plain
from dit_jax.convert import formats
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir


def save_run(folder, config, seed):
    """Writes a run's folder with a checkpoint whose moving average is random; scales, whose roots HDiT takes, are positive."""
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        values = 0.2 * rng.normal(size=x.shape)
        return jnp.asarray(abs(values) if path[-1].key == "scale" else values, x.dtype)

    average = jax.tree_util.tree_map_with_path(drawn, formats.network_params(config))
    with Workdir(folder, plain(config)), Checkpointer(folder / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(1, {"ema_params": average, "params": {"unused": jnp.zeros(1)}}, {})


def load_config(name, *args):
    """The config of configs/<name>.py, called with its argument."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)
