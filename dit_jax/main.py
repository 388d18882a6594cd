"""Trains a diffusion transformer or an autoencoder, then makes and scores its samples or reconstructions.

    python -m dit_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m dit_jax.main --config=configs/imagenet.py:B/4,256 --workdir=gs-mount/b4 --config.data.path=/data/tfds

Any field can be overridden: --config.batch_size=512 --config.mesh.fsdp=4. An overridden name, --config.process.name=flow, resets
its section to the defaults of that constructor. --import=my_net.py imports user code first, which calls `dit_jax.register`.

The last line of stdout is a JSON object, also written to <workdir>/result.json at the end. On TPU pods, GKE and SLURM, processes
find each other; elsewhere give --coordinator_address, --num_processes and --process_id.

Exit status: 0 when all steps are trained; 75 when SIGTERM or Ctrl-C stopped the run early with everything saved, so that a
supervisor (launch/) starts it again; 2 for a user's mistake; anything else for a failure.
"""

from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import console, processes

CONFIG = config_file.define_flags("Config file, with its argument after a colon: configs/imagenet.py:B/4,256.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, previews, checkpoints.")
processes.define_flags()


def chosen_config():
    if not CONFIG.given:
        raise UserError("give --config=configs/<name>.py and --workdir=<folder>")
    return CONFIG.read()


def main() -> dict:
    config = chosen_config()
    if WORKDIR.value is None:
        raise UserError("give --workdir=<folder of the run>")
    processes.join()
    from dit_jax.training.session import train

    return train(config, WORKDIR.value)


if __name__ == "__main__":
    console.run(main)
