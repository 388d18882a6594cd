"""Trains a diffusion transformer or an autoencoder, then makes and scores its samples or reconstructions.

    python -m dit_jax.main --config=digits
    python -m dit_jax.main --config=xl2_imagenet256
    python -m dit_jax.main --config=imagenet:B/4,256,latents --workdir=mount/b4 --config.data.path=/data/latents256

    python -m dit_jax.main --from=runs/a --step=100000 --workdir=runs/b --config.optimizer.learning_rate=1e-5

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
from dit_jax.runtime import command_line, console, processes

command_line.group("The run")
CONFIG = config_file.define_flags(
    "Name of a config in ./configs or installed with dit_jax, or a file; its argument stands after a colon: imagenet:B/4,256."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: config, metrics, previews, checkpoints. Default: runs/<config>-<its argument>, for one process.",
)
FROM = flags.DEFINE_string(
    "from",
    None,
    "Folder of a run from whose checkpoint a new run in --workdir begins, with its config and the fields of --config that are "
    "given. The same command resumes the new run, which does not read the other one any more.",
)
STEP = flags.DEFINE_integer("step", None, "With --from: the step of the checkpoint. Default: the newest.")
RESET_OPTIMIZER = flags.DEFINE_bool(
    "reset_optimizer", False, "With --from: begin with a new state of the optimizer, as another optimizer needs it."
)
REWIND = flags.DEFINE_integer(
    "rewind",
    None,
    "Go back to this saved step of the run in --workdir. Later checkpoints, results and records are set aside, and "
    "nothing is deleted. Without --config the run keeps its config. The same command again resumes the run.",
)
command_line.takes_config_from("from")
command_line.takes_config_from("rewind")
RESTART = flags.DEFINE_bool(
    "restart",
    False,
    "Begin again: rename a run in --workdir to <workdir>.<n>, with the first n that is free; nothing is deleted. Give it once, "
    "by hand: a supervisor (launch/) repeats its command, and would begin again each time.",
)
SHOW = flags.DEFINE_bool("show", False, "Print every field of the config with its value, type and meaning; train nothing.")
processes.define_flags()


USES = {
    "--show": {"show"},
    "--from": {"from", "step", "reset_optimizer", "workdir", "restart", *processes.FLAGS},
    "no --from": {"workdir", "restart", "rewind", *processes.FLAGS},
}


def check_flags() -> None:
    """Raises a UserError for a flag without effect."""
    command_line.check_uses(USES, "--show" if SHOW.value else "no --from" if FROM.value is None else "--from")


def chosen_config():
    if not CONFIG.given:
        raise UserError("give --config=<name or file>, such as --config=digits, or --from=<folder of a run> to begin from it")
    return CONFIG.read()


def train_from_a_run() -> dict:
    """Trains with the config of a run, unless --config gives another: a branch of it, or that run after a rewind."""
    from dit_jax.session import train

    if WORKDIR.value is None:
        new = f"<new folder> for the run that begins from {FROM.value}" if FROM.value else "<folder of the run> with --rewind"
        raise UserError(f"give --workdir={new}")
    return train(
        CONFIG.file.value,
        WORKDIR.value,
        CONFIG.fields.value,
        restart=RESTART.value,
        from_=FROM.value,
        step=STEP.value,
        reset_optimizer=RESET_OPTIMIZER.value,
        rewind=REWIND.value,
    )


def main() -> dict:
    check_flags()
    if not SHOW.value and (FROM.value is not None or (REWIND.value is not None and not CONFIG.given)):
        processes.join()
        return train_from_a_run()
    config = chosen_config()
    if SHOW.value:
        from dit_jax import config_reference

        command_line.print_page(config_reference.text(config))
        return {"config": CONFIG.file.value, "num_fields": len(config_reference.fields(config))}
    processes.join()
    import jax

    from dit_jax.session import train

    if WORKDIR.value is not None:
        return train(config, WORKDIR.value, restart=RESTART.value, rewind=REWIND.value)
    from dit_jax.storage.run_folder import default_workdir

    workdir = default_workdir(CONFIG.file.value, jax.process_count())
    console.say(f"--workdir={workdir}")
    return train(config, workdir, restart=RESTART.value, rewind=REWIND.value)


if __name__ == "__main__":
    console.run(main, continues=True)
