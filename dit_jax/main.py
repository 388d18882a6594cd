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

from pathlib import Path
from typing import Any

from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import console, processes
from dit_jax.storage.atomic import write_json

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
    import jax

    from dit_jax.build import Run
    from dit_jax.training import summary
    from dit_jax.training.loop import train
    from dit_jax.training.results import check_results

    workdir = Path(WORKDIR.value).expanduser().absolute()
    run = Run(config)
    check_results(run)
    trained = train(run, workdir)
    step = int(trained.state.step)
    result: dict[str, Any] = {
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
    if result["stopped"]:
        console.say(f"stopped and saved at step {step}; the same command goes on")
        return result
    if jax.process_index() == 0:
        from dit_jax.benchmark import machine
        from dit_jax.report import ending

        result["machine"] = machine.describe()
        write_json(workdir / "result.json", result)
        report = ending.write(trained.run, trained.state.ema_params, trained.constants, workdir, step)
        console.say(summary.ending(trained.run, workdir, result, report))
    return result


if __name__ == "__main__":
    console.run(main)
