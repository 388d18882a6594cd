"""The training loop: config -> mesh -> data -> step -> records, previews, checkpoints."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import shard_batch
from dit_jax.runtime.console import say
from dit_jax.runtime.profile import Profile
from dit_jax.runtime.signals import StopSignal
from dit_jax.runtime.step_clock import IN_FLIGHT, StepClock
from dit_jax.runtime.watchdog import Watchdog
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir, plain
from dit_jax.tasks.compiled_step import compile_in_background
from dit_jax.tasks.state import TrainState, abstract_state, create_sharded
from dit_jax.tasks.task import Task
from dit_jax.training import reconstructions, samples, summary
from dit_jax.training.meter import Meter
from dit_jax.training.records import Records
from dit_jax.training.scoring import Scorer
from dit_jax.training.wandb_writer import WandbWriter

SHOWN_BY = {"diffusion": samples, "autoencoder": reconstructions}  # previews and final images of each task


@dataclass
class Run:
    """What training leaves behind, for sampling in the same process."""

    config: ml_collections.ConfigDict
    task: Task
    source: Any
    mesh: Mesh
    constants: Any
    state: TrainState
    stopped: bool
    loss: float | None
    images_per_second: float | None


def restore_or_create(config, task: Task, mesh: Mesh, checkpointer: Checkpointer, fingerprint: str) -> TrainState:
    """The newest good checkpoint, or a new state where there is none.

    Raises:
        UserError: the data set is not the one that the checkpoint was trained on.
    """
    restored = checkpointer.restore(abstract_state(task, mesh))
    if restored is None:
        return create_sharded(task, jax.random.key(config.seed), mesh)
    state, meta = restored
    if meta["data"] != fingerprint:
        raise UserError(
            "the data set has changed since this run began (another version, split, file list or count); restore it, "
            "or give a new --workdir"
        )
    say(f"going on from step {int(state.step)}")
    return state


def score(scorer: Scorer, step: int, state: TrainState, constants, records: Records, checkpointer: Checkpointer) -> bool:
    """Scores the moving average and keeps the checkpoint of the best step; False if a signal stopped it."""
    result = scorer(step, state.ema_params, constants["codec"])
    if result is None:
        return False
    records.scalars(step, {"fid": result["fid"], "best_fid": scorer.best["fid"], "scoring_seconds": result["seconds"]})
    checkpointer.best_step = scorer.best["step"]
    return True


def train(config, workdir) -> Run:
    """Trains to config.num_steps, or goes on where the folder stands; the same command again continues.

    Returns early, with `stopped` set and everything saved, after SIGTERM or Ctrl-C.

    Raises:
        UserError: something in the config, the data or the folder is wrong; before any work.
        Diverged: see `meter`.
    """
    clock = StepClock()
    workdir = Path(workdir).expanduser().absolute()
    mesh = build.mesh(config)
    build.task(config)
    config, codec_params = codec_folder.settle(config, workdir)
    task = build.task(config)
    loader = build.loader(config, mesh)
    constants = build.constants(config, mesh, loader, codec_params)
    preview = SHOWN_BY[config.task.name].make_preview(config, task, mesh, loader.source)
    scorer = Scorer(config, task, mesh, workdir) if "scoring" in config and config.scoring.every_steps else None
    fingerprint = loader.source.fingerprint
    profile = Profile(**config.profile, last_step=config.num_steps, folder=workdir / "profile", enabled=hosts.is_first())
    wandb = WandbWriter(workdir, config.log.wandb, plain(config)) if config.log.wandb else None
    watchdog = Watchdog(config.log.watchdog_seconds, workdir / f"stacks{jax.process_index() or ''}.txt", clock)

    with (
        Workdir(workdir, config, hosts.is_first()) as folder,
        Checkpointer(folder.checkpoints, **config.checkpoint) as checkpointer,
        Records(folder.path, hosts.is_first(), wandb) as records,
        StopSignal() as stop,
    ):
        if hosts.is_first() and codec_params:
            codec_folder.keep(folder.path, task.codec, codec_params)
        program = task, mesh, config.seed, abstract_state(task, mesh), constants, build.abstract_batch(config, task, mesh)
        begun = checkpointer.latest_step or 0
        compiling = compile_in_background(*program) if begun < config.num_steps else None
        state = restore_or_create(config, task, mesh, checkpointer, fingerprint)
        done = int(state.step)
        records.rewind(done)
        say(summary.text(config, task, mesh, folder.path))
        if scorer is not None:
            scorer.forget_after(done)
            checkpointer.best_step = scorer.best and scorer.best["step"]
            if scorer.unfinished(done) and not score(scorer, done, state, constants, records, checkpointer):
                return Run(config, task, loader.source, mesh, constants, state, True, None, None)
        if done >= config.num_steps:
            say(f"step {done} of {config.num_steps} is reached: nothing to train")
            return Run(config, task, loader.source, mesh, constants, state, False, None, None)

        records.prepare()
        profile.resumed(done)
        with loader.batches(done) as batches, clock, watchdog, profile:
            with clock.spend("data"):
                batch = shard_batch(mesh, next(batches))
            with clock.spend("compile"):
                step, zeros, seconds = (compiling or compile_in_background(*program)).result()
            say(f"compiled the training step in {seconds:.1f} s")
            records.scalars(done, {"compile_seconds": seconds})
            copy = jax.jit(jnp.copy)  # of a sum, which the step after donates
            sums, meter = zeros(), Meter(records, clock, config, task, mesh, done)
            stopped = unscored = False
            while done < config.num_steps and not (stopped or unscored):
                clock.wait(done + 1 - IN_FLIGHT)
                with profile.step(done):
                    dispatched = time.monotonic()
                    state, sums = step(state, sums, constants, batch)
                    done += 1
                    clock.dispatched(done, dispatched, copy(sums["skipped"]))
                profile.finish(done, clock)
                last = done == config.num_steps
                meter.report()
                meter.bad_records = len(batches.bad_records)
                if done % config.log.every_steps == 0 or last:
                    meter.defer(done, sums)
                    sums = zeros()
                stopped = stop.requested(done)
                scored = scorer is not None and scorer.due(done)
                if checkpointer.due(done) or scored or last or stopped:
                    with clock.spend("checkpoint"):
                        checkpointer.save(done, state, {"data": fingerprint})
                if config.preview.every_steps and (done % config.preview.every_steps == 0 or last):
                    meter.report()
                    with clock.spend("preview"):
                        seconds = preview(folder.samples, records, done, state, constants)
                    records.scalars(done, {"preview_seconds": seconds})
                if scored and not stopped:
                    meter.report()
                    clock.wait(done)
                    with clock.spend("scoring"):
                        unscored = not score(scorer, done, state, constants, records, checkpointer)
                if not (last or stopped or unscored):
                    with clock.spend("data"):
                        batch = shard_batch(mesh, next(batches))
            meter.report()
            clock.wait(done)
            with clock.spend("checkpoint"):
                checkpointer.wait()
            meter.finish(done)
    return Run(
        config,
        task,
        loader.source,
        mesh,
        constants,
        state,
        unscored or (stopped and done < config.num_steps),
        meter.loss,
        meter.images_per_second,
    )
