"""Trains a diffusion transformer or an autoencoder, then makes and scores its samples or reconstructions.

    python -m dit_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m dit_jax.main --config=configs/xl2_imagenet256.py
    python -m dit_jax.main --config=configs/imagenet.py:B/4,256,latents --workdir=mount/b4 --config.data.path=/data/latents256

Any field can be overridden: --config.batch_size=512 --config.mesh.fsdp=4. An overridden name, --config.process.name=flow, resets
its section to the defaults of that constructor. --import=my_net.py imports user code first, which calls `dit_jax.register`.

The last line of stdout is a JSON object, also written to <workdir>/result.json at the end. On TPU pods, GKE and SLURM, processes
find each other; elsewhere give --coordinator_address, --num_processes and --process_id.

Exit status: 0 when all steps are trained; 75 when SIGTERM or Ctrl-C stopped the run early with everything saved, so that a
supervisor (launch/) starts it again; 2 for a user's mistake; anything else for a failure.
"""

from pathlib import Path

import jax
from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import console, processes
from dit_jax.storage.atomic import write_json
from dit_jax.storage.run_folder import default_workdir

CONFIG = config_file.define_flags("Config file, with its argument after a colon: configs/imagenet.py:B/4,256.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: config, metrics, previews, checkpoints. Default: runs/<config file>-<its argument>, for one process.",
)
processes.define_flags()


def chosen_config():
    if not CONFIG.given:
        raise UserError("give --config=configs/<name>.py")
    return CONFIG.read()


def main() -> dict:
    config = chosen_config()
    processes.join()
    if WORKDIR.value is None:
        workdir = default_workdir(CONFIG.file.value, jax.process_count()).absolute()
        console.say(f"--workdir={workdir}")
    else:
        workdir = Path(WORKDIR.value).expanduser().absolute()
    from dit_jax.build import Run
    from dit_jax.training.loop import train
    from dit_jax.training.results import check_results

    run = Run(config)
    run.task  # the errors of the config itself come first
    run.check_files(workdir, lambda: check_results(run))
    trained = train(run, workdir)
    step = int(trained.state.step)
    result = {
        "step": step,
        "loss": trained.loss,
        "images_per_second": trained.images_per_second,
        "stopped": trained.stopped,
        "workdir": str(workdir),
        "checkpoint": str(workdir / "checkpoints" / str(step)),
        "samples": None,
    }
    if not trained.stopped:
        result |= trained.results.finish(trained.state, trained.constants, workdir)
    if not result["stopped"] and jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    return result


if __name__ == "__main__":
    console.run(main)
