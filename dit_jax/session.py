"""Trains from a config and makes the results: what `python -m dit_jax.main` and `dit_jax.train` do."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from dit_jax import config_file
from dit_jax.benchmark import machine
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.report import ending, page
from dit_jax.runtime.console import say
from dit_jax.runtime.signals import STOPPED_STATUS
from dit_jax.storage.atomic import write_json
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import RESULT
from dit_jax.training import loop, summary
from dit_jax.training.results import check_results
from dit_jax.training.starts import Start


def train(
    config: ml_collections.ConfigDict | str | os.PathLike, workdir: str | os.PathLike, fields: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains to config.num_steps, from the newest checkpoint of the folder if there is one; then makes and scores the results.

    SIGTERM or Ctrl-C ends it early, with everything saved; the same call goes on.

        dit_jax.train("configs/digits.py", "runs/digits", ["num_steps=500", "optimizer.decay_steps=500"])
        pipe = dit_jax.load("runs/digits")

    Args:
        config: a config file as after --config, with its argument after a colon; or a config, as `recipes` makes it.
        workdir: folder of the run: config, metrics, previews, checkpoints, samples.
        fields: fields to override, as after --config., if `config` is a file.

    Returns:
        The entries of <workdir>/result.json: {"step", "loss" and "images_per_second" of the last logged interval (None if no step
        was taken), "stopped", "workdir", "checkpoint", "samples"}, and the scores of the samples, such as "fid".
        Of a run that was finished before they are read, and no record is written.

    Raises:
        UserError: the config, the data or the folder is invalid; raised before any training.
        Diverged: see `meter`.
    """
    with contextlib.ExitStack() as claimed:
        return _train(config, workdir, fields, claimed)


def _train(config: Any, workdir: str | os.PathLike, fields: Sequence[str], claimed: contextlib.ExitStack) -> dict[str, Any]:
    if not isinstance(config, ml_collections.ConfigDict):
        config = config_file.read(os.fspath(config), fields)
    elif fields:
        raise UserError(f"fields={list(fields)} is given with a config that is built already; set the fields in it")
    workdir = local_path(workdir).absolute()
    run = Run(config)
    run.task  # the errors of the config itself come first
    run.check_files(workdir, lambda: check_results(run))
    start = claimed.enter_context(Start(workdir))
    trained = loop.train(run, workdir)
    step = int(trained.state.step)
    if trained.finished is not None:
        say(f"the run is finished: its records are kept, and the result is that of {workdir / RESULT}")
        start.end("nothing to train", 0)
        if jax.process_index() == 0 and not (workdir / page.FILE).exists():  # a kill after the result
            ending.write(trained.run, trained.state.ema_params, trained.constants, workdir, step)
        return trained.finished
    result: dict[str, Any] = {
        "step": step,
        "loss": trained.loss,
        "images_per_second": trained.images_per_second,
        "stopped": trained.stopped,
        "workdir": str(workdir),
        "checkpoint": str(workdir / "checkpoints" / str(step)),
        "samples": None,
        **({"dropped": trained.dropped} if trained.dropped else {}),
    }
    if not trained.stopped:
        result |= trained.results.finish(trained.state, trained.constants, workdir)
    if result["stopped"]:
        say(f"stopped and saved at step {step}; the same command goes on")
        start.end("stopped by a signal", STOPPED_STATUS)
        return result
    if jax.process_index() == 0:
        result["machine"] = machine.describe()
        write_json(workdir / "result.json", result)
        start.end("finished", 0)
        report = ending.write(trained.run, trained.state.ema_params, trained.constants, workdir, step)
        say(summary.ending(trained.run, workdir, result, report))
    return result
