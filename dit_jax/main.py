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

import os
import re
from pathlib import Path

from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import console, processes
from dit_jax.storage.atomic import write_json

CONFIG = config_file.define_flags("Config file, with its argument after a colon: configs/imagenet.py:B/4,256.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: config, metrics, previews, checkpoints. Default: runs/<config>-<its argument>, for one process.",
)
SHOW = flags.DEFINE_bool("show", False, "Print every field of the config with its value, type and meaning; train nothing.")
processes.define_flags()


def chosen_config():
    if not CONFIG.given:
        raise UserError("give --config=<name or file>, such as --config=digits")
    return CONFIG.read()


def chosen_workdir() -> Path:
    """--workdir, or its default: configs/imagenet.py:B/4,256 trains in runs/imagenet-B-4-256. Call it when all processes joined.

    Raises:
        UserError: there are several processes and no --workdir.
    """
    if WORKDIR.value is not None:
        return Path(WORKDIR.value).expanduser().absolute()
    import jax

    if jax.process_count() > 1:
        raise UserError("give --workdir=<folder of the run> on storage that all hosts share")
    file, _, argument = CONFIG.file.value.partition(":")
    name = "-".join(filter(None, (Path(file).stem, *re.split("[/,=:]", argument))))
    workdir = (Path("runs") / name).absolute()
    console.say(f"--workdir={workdir}")
    return workdir


def main() -> dict:
    config = chosen_config()
    if SHOW.value:
        from dit_jax import config_reference

        print(config_reference.text(config))
        return {"config": CONFIG.file.value, "num_fields": len(config_reference.fields(config))}
    processes.join()
    workdir = chosen_workdir()
    import jax

    from dit_jax.build import Run
    from dit_jax.training import summary
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
    if result["stopped"]:
        console.say(f"stopped and saved at step {step}; the same command goes on")
        return result
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
        console.say(summary.ending(run, WORKDIR.value or os.path.relpath(workdir), result, None))
    return result


if __name__ == "__main__":
    console.run(main)
