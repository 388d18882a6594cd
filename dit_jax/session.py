"""Trains from a config and makes the results: what `python -m dit_jax.main` and `dit_jax.train` do."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dit_jax import config_file
from dit_jax.benchmark import machine
from dit_jax.build import Run, check_dtypes
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.report import ending, page
from dit_jax.runtime import phases
from dit_jax.runtime.console import say
from dit_jax.runtime.signals import STOPPED_STATUS
from dit_jax.storage.atomic import write_json
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import RESULT, read_config, set_aside
from dit_jax.tasks.averages import progress
from dit_jax.tasks.task import MOST_INITIAL, share_of_initial
from dit_jax.training import branch, loop, summary
from dit_jax.training.branch import Branch
from dit_jax.training.results import check_results
from dit_jax.training.setup import Begin, watchdog_of
from dit_jax.training.starts import Start


def train(
    config: ml_collections.ConfigDict | str | os.PathLike | None,
    workdir: str | os.PathLike,
    fields: Sequence[str] = (),
    restart: bool = False,
    *,
    from_: str | os.PathLike | None = None,
    step: int | None = None,
    reset_optimizer: bool = False,
    rewind: int | None = None,
) -> dict[str, Any]:
    """Trains to config.num_steps, from the newest checkpoint of the folder if there is one; then makes and scores the results.

    SIGTERM or Ctrl-C ends it early, with everything saved; the same call goes on.

        dit_jax.train("configs/digits.py", "runs/digits", ["num_steps=500", "optimizer.decay_steps=500"])
        pipe = dit_jax.load("runs/digits")

    Args:
        config: a config file as after --config, with its argument after a colon; or a config, as `recipes` makes it. With `from_`
            or `rewind` it may be None: the config of that run.
        workdir: folder of the run: config, metrics, previews, checkpoints, samples.
        fields: fields to override, as after --config., if `config` is a file or None.
        restart: begins again: a run in the folder is renamed to <workdir>.<n>, with the first n that is free. Nothing is deleted.
        from_: folder of a run from whose checkpoint a new run begins; the same call resumes the new run, see `training.branch`.
        step: of that checkpoint; None for the newest.
        reset_optimizer: the new run begins with a new state of the optimizer.
        rewind: saved step to which the run in the folder goes back; the same call again resumes it, see `storage.rewinds`.

    Returns:
        The entries of <workdir>/result.json: {"step", "loss" and "images_per_second" of the last logged interval (None if no step
        was taken), "stopped", "workdir", "checkpoint", "samples"}, and the scores of the samples, such as "fid". After few steps
        also "initial_weights_in_average": the share of the initial weights in the moving average. "averages": how far each of
        them has come, see `averages.progress`. Those of a run that was finished before are read, and nothing is written.

    Raises:
        UserError: the config, the data or the folder is invalid; raised before any training.
        Diverged: see `meter`.
        TemporaryFailure: the data could be read and cannot any more. The last step is saved; the same call goes on.
    """
    workdir = local_path(workdir).absolute()
    if rewind is not None and (restart or from_ is not None):
        other = "restart begins the run again" if restart else "from_ begins a new run"
        raise UserError(f"rewind={rewind} goes back in the run of {workdir}, and {other}; give one of them")
    if from_ is None and (step is not None or reset_optimizer):
        raise UserError(
            f"step={step} and reset_optimizer={reset_optimizer} belong to from_; give from_=<folder of a run> (--from)"
        )
    begins = branch.opened(from_, workdir, step, reset_optimizer, restart) if from_ is not None else None
    config = _config(config, fields, begins, workdir if rewind is not None else None)
    if begins is not None:
        begins.check_config(config)
    run = Run(config)
    run.task  # the errors of the config itself come first
    check_dtypes(config)
    run.check_files(None if restart else workdir, lambda: check_results(run))
    if restart:
        if hosts.is_first() and (aside := set_aside(workdir)):
            say(f"--restart: the run that was in {workdir} is now in {aside}")
        hosts.wait_for_all("the earlier run is renamed")
    with contextlib.ExitStack() as claimed, Start(workdir) as start:
        remedy = f"the same command{', without --restart,' if restart else ''} goes on"
        return _train(run, workdir, start, claimed, Begin(begins, rewind), remedy)


def _config(
    config: ml_collections.ConfigDict | str | os.PathLike | None,
    fields: Sequence[str],
    begins: Branch | None,
    rewound: Path | None,
) -> ml_collections.ConfigDict:
    """The config with the fields; if none is given, that of the run which a branch begins from or which goes back.

    rewound: folder of the run that goes back.
    """
    if isinstance(config, ml_collections.ConfigDict):
        if fields:
            raise UserError(f"fields={list(fields)} is given with a config that is built already; set the fields in it")
        return config
    if config is not None:
        return config_file.read(os.fspath(config), fields)
    if rewound is not None:
        return config_file.of_run(read_config(rewound), fields)
    if begins is None:
        raise UserError("config is None; give a config, or from_=<folder of a run>")
    return begins.with_codec(config_file.of_run(begins.config, fields))


def _train(run: Run, workdir: Path, start: Start, claimed: contextlib.ExitStack, begin: Begin, remedy: str) -> dict[str, Any]:
    trained = loop.train(run, workdir, start, claimed, begin)
    step = int(trained.state.step)
    if trained.finished is not None:
        return _again(trained, workdir, start)
    result: dict[str, Any] = {
        "step": step,
        "loss": trained.loss,
        "images_per_second": trained.images_per_second,
        "stopped": trained.stopped,
        "workdir": str(workdir),
        "checkpoint": str(workdir / "checkpoints" / str(step)),
        "samples": None,
        "averages": [progress(average, step) for average in (run.task.average, *run.task.averages)],
        **({"dropped": trained.dropped} if trained.dropped else {}),
        **({"initial_weights_in_average": share} if (share := share_of_initial(run.task.average, step)) > MOST_INITIAL else {}),
    }
    if not trained.stopped:
        with watchdog_of(run, workdir), phases.phase("sampling"):
            result |= finish(trained, workdir, step)
    if result["stopped"]:
        say(f"stopped and saved at step {step}; {remedy}")
        start.end("stopped by a signal", STOPPED_STATUS)
        return result
    if jax.process_index() == 0:
        result["machine"] = machine.describe()
        write_json(workdir / RESULT, result)
    start.end("finished", 0)
    if not _report(trained, workdir, result):
        result["dropped"] = result.get("dropped", {}) | {"report": 1}
        write_json(workdir / RESULT, result)
    return result


def _again(trained: loop.TrainResult, workdir: Path, start: Start) -> dict[str, Any]:
    """The stored result of a run that was finished before; its records are kept."""
    assert trained.finished is not None
    say(f"the run is finished: its records are kept, and the result is that of {workdir / RESULT}")
    start.end("nothing to train", 0)
    if not (workdir / page.FILE).exists():  # a kill after the result
        _report(trained, workdir, trained.finished)
    return trained.finished


def _report(trained: loop.TrainResult, workdir: Path, result: dict[str, Any]) -> bool:
    """Writes the page and prints the end of a run, on process 0; returns False if the page cannot be written."""
    if jax.process_index() != 0:
        return True
    with watchdog_of(trained.run, workdir), phases.phase("report"):
        report = ending.write(trained.run, trained.state.ema_params, trained.constants, workdir, result["step"])
    say(summary.ending(trained.run, workdir, result, report))
    return report is not None


def finish(trained: loop.TrainResult, workdir: Path, step: int) -> dict[str, Any]:
    """Makes and scores the results of a trained run; see `Results.finish`.

    Raises:
        Exception: the results cannot be made; says first that the training is saved.
    """
    try:
        return trained.results.finish(trained.state, trained.constants, workdir)
    except Exception:
        say(f"step {step} is trained and saved, but its results were not made; the same command makes them")
        raise
