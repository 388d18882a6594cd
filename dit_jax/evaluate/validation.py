"""The validation loss of a diffusion network: its error on held-out examples at fixed noise levels, with fixed noise.

A noise level is sigma / alpha of x_t = alpha x0 + sigma noise, in units of the latents. Two processes with the same level ask for
the same x0 from equally noisy data, whatever their schedule, target and weight are, so the numbers of different processes can be
compared. Numbers in the latents of different codecs cannot.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.typing import ArrayLike

from dit_jax.build import Run, construct, without_adaptation
from dit_jax.data.latents import LatentCache
from dit_jax.data.loader import read_in_order
from dit_jax.diffusion.process import Process, mean_over_example, noise_like
from dit_jax.errors import NotFinite, UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import rows_per_step, split_rows
from dit_jax.runtime import phases
from dit_jax.runtime.console import say
from dit_jax.sample import trained
from dit_jax.tasks import averages
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.state import on_device
from dit_jax.tasks.task import named_key

LEVELS = tuple(float(level) for level in np.geomspace(0.1, 10, 10))
SEED = 0  # of the noise: that of an example depends on its number and the level, and on nothing of the run
HALVINGS = 60


class Level(NamedTuple):
    """A noise level: the sigma / alpha that is asked for, the time of the process, and its sigma / alpha at that time."""

    asked: float
    time: float
    used: float


def is_on(config: ml_collections.ConfigDict) -> bool:
    section = config.get("validation", {})
    return bool(section.get("split") or section.get("path"))


def times_of(process: Process, levels: Sequence[float] = LEVELS) -> list[Level]:
    """The times at which sigma / alpha of a process is `levels`; the nearest timesteps if it is trained at discrete ones only.

    Raises:
        UserError: a level lies outside of the levels of the process.
    """

    def ratio(t: float) -> float:
        alpha, sigma = (float(x[0]) for x in process.alpha_sigma(np.array([t])))
        return sigma / alpha if alpha > 0 else math.inf

    known = [process.min_time, 1.0] if process.continuous else list(process.grid(round(1 / process.min_time))[-2::-1])
    ratios = np.array([ratio(t) for t in known])
    if not ratios[0] <= min(levels) <= max(levels) <= ratios[-1]:
        raise UserError(
            f"the validation loss is measured at sigma / alpha from {min(levels):g} to {max(levels):g}, and the process has "
            f"{ratios[0]:g} to {ratios[-1]:g}; leave validation.split and validation.path empty"
        )
    if process.continuous:
        return [Level(level, t := _bisected(ratio, level, *known), ratio(t)) for level in levels]
    nearest = [int(np.abs(np.log(ratios) - math.log(level)).argmin()) for level in levels]
    return [Level(level, float(known[i]), float(ratios[i])) for level, i in zip(levels, nearest, strict=True)]


def _bisected(increasing, value: float, low: float, high: float) -> float:
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < value else (low, middle)
    return (low + high) / 2


def source_of(run: Run) -> Any:
    """The held-out examples: the section `data` with `validation.split` and `validation.path` where they are set.

    Raises:
        UserError: they cannot be opened, are those that are trained on, have other classes than the network, or the data set has
            no splits.
    """
    section = {key: value for key, value in run.config.validation.items() if value}
    if "split" in section and "split" not in run.config.data:
        raise UserError(
            f"validation.split is {section['split']!r} and data {run.config.data.name!r} has no splits; give validation.path"
        )
    source = construct("data", run.config.data, **section)
    if source.fingerprint == run.source.fingerprint:
        raise UserError(
            f"the validation examples (validation.split {section.get('split', '')!r}, path {section.get('path', '')!r}) are "
            "those that are trained on; give others, as --config.data.split=[:90%] --config.validation.split=[90%:] of a folder"
        )
    if run.conditioner.num_classes and source.num_classes != run.conditioner.num_classes:
        raise UserError(
            f"the validation examples have {source.num_classes} classes and the network {run.conditioner.num_classes}; "
            "they must be equal"
        )
    return source


def check(run: Run) -> None:
    """Raises the UserErrors of the validation loss, before any training; does nothing if it is off."""
    if not is_on(run.config):
        return
    times_of(run.process)
    source = source_of(run)
    if run.caption_entries(source) is None and (unknown := run.conditioner.batch_spec().keys() - {"label"}):
        raise UserError(
            f"the validation loss needs examples with labels or captions, and the conditioner reads {', '.join(unknown)}"
        )


def measured(run: Run, params: Any, constants: Mapping[str, Any], levels: Sequence[float] = LEVELS) -> dict[str, Any]:
    """The validation loss of these parameters on the examples of `source_of`; all processes call it together.

    The network computes in float32. An example keeps its own label, and is neither mirrored nor cropped at random.

    Args:
        params: of the whole network, on the mesh of the run; usually the moving average.
        constants: of a training step.

    Returns:
        As JSON values {"loss": mean over examples, elements and levels of the squared error of the predicted x0, "noise_loss":
        that of the predicted noise, "levels": [{"sigma_over_alpha", "used", "time", "loss"}], "num_images", and all else that
        the numbers depend on}. The mean error of the noise over levels that are evenly spaced in the logarithm is the
        variational bound up to constants (Kingma et al. 2021, equation 17).

    Raises:
        UserError: see `source_of`; an example cannot be read.
        NotFinite: the network's output is not finite.
    """
    start, chosen, task = time.monotonic(), times_of(run.process, levels), in_float32(run).task
    source = source_of(run)
    if isinstance(source, LatentCache):
        source.check(run.codec, run.config.codec.sha256, run.transform)
    size = -(-min(run.config.evaluation.batch_size, len(source)) // rows_per_step(run.mesh)) * rows_per_step(run.mesh)
    errors = jax.jit(lambda *args: squared_errors(task, *args))
    sums = np.zeros(len(chosen))
    with jax.set_mesh(run.mesh), jax.default_matmul_precision("highest"):
        for first, batch in _batches(run, source, size):
            count = len(batch["label"])
            rows = np.minimum(np.arange(size), count - 1)  # the last row fills the last batch
            placed = {name: split_rows(run.mesh, x[rows]) for name, x in batch.items()}
            indices = split_rows(run.mesh, (first + rows).astype(np.int32))
            for number, level in enumerate(chosen):
                found = errors(params, constants, placed, indices, np.float32(level.time), np.int32(number))
                sums[number] += hosts.to_host(found)[:count].astype(np.float64).sum()
            phases.beat()
    means = sums / len(source)
    if not np.isfinite(means).all():
        raise NotFinite("the validation loss is not finite: the weights are broken")
    used = np.array([level.used for level in chosen])
    result = {
        "loss": float(means.mean()),
        "noise_loss": float((means / used**2).mean()),
        "levels": [
            {"sigma_over_alpha": level.asked, "used": level.used, "time": level.time, "loss": float(mean)}
            for level, mean in zip(chosen, means, strict=True)
        ],
        "of": "squared error of the predicted x0, mean over examples and elements; unguided, each example with its label",
        "num_images": len(source),
        "split": run.config.validation.get("split"),
        "path": run.config.validation.get("path"),
        "data_fingerprint": source.fingerprint,
        "noise_seed": SEED,
        "precision": "float32",
    }
    seconds = time.monotonic() - start
    say(f"validation loss {result['loss']:.5f} of {len(source)} held-out examples at {len(chosen)} noise levels, {seconds:.0f} s")
    return result


def of_run(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    average: str = "default",
    split: str | None = None,
    path: str | None = None,
) -> dict[str, Any]:
    """The validation loss of the weights of a run, on all devices; all processes call it together.

    Args:
        workdir: the run's folder.
        step, average: as `sample.trained.Trained.check` has them.
        split, path: of the held-out examples, in place of the run's `validation.split` and `validation.path`.

    Returns:
        {"validation_loss", "validation"} as a run's `result.json` has them, "workdir" and "step".

    Raises:
        UserError: no such run, step or average; it names no held-out examples, and none are given; see also `source_of`.
        NotFinite: the weights or the network's output are not finite.
    """
    opened = trained.read(workdir)
    if opened.weights is not None:
        raise UserError(f"{opened.path} is a file of weights without a data set; give the folder of a run")
    chosen = opened.check(step, average)
    config = ml_collections.ConfigDict(opened.config.to_dict())
    if split or path:
        config.validation = {"split": split or "", "path": path or ""}
    if not is_on(config):
        raise UserError(
            f"{opened.path} was trained without held-out examples (validation.split and validation.path are empty); give those "
            "to measure, as --split=test, or --path=<other data>"
        )
    config.mesh = {"data": -1, "fsdp": 1}  # the devices of this machine, not those of training
    run = Run(config).with_codec_weights(opened.path)
    check(run)
    params, found = opened.params(run, chosen, average)
    name = {"default": run.task.average.name, "none": "none"}.get(average) or averages.parse(average).name
    result = measured(run, params, run.frozen) | {"weights": name}
    return {"validation_loss": result["loss"], "validation": result, "workdir": str(opened.path), "step": found}


def in_float32(run: Run) -> Run:
    """The run of the whole network, computed in float32."""
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.init = without_adaptation(config.get("init", {}))
    if "dtype" in config.model:
        config.model.dtype = "float32"
    return run.with_config(config)


def squared_errors(
    task: DiffusionTask,
    params: Any,
    constants: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    indices: jax.Array,
    t: ArrayLike,
    level: ArrayLike,
) -> jax.Array:
    """f32[B]: mean squared error of the predicted x0 of each example at time t.

    Args:
        params: of the whole network.
        batch: arrays [B, ...], as of a training step.
        indices: int32[B], numbers of the examples.
        level: number of the noise level, which selects the noise.
    """
    params = on_device(params)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(SEED), indices)
    moments = task.moments(constants, batch)
    posterior = jax.vmap(named_key, (0, None))(keys, "posterior")
    x0 = jax.vmap(lambda key, x: task.codec.sample_latent(key, x[None])[0])(posterior, moments)
    noise = noise_like(jax.vmap(named_key, (0, None))(keys, "noise"), x0.shape[1:], level)
    times = jnp.full(x0.shape[:1], t, jnp.float32)
    x_t = task.process.perturb(x0, noise, times)
    cond, _ = task.condition(params, constants, batch)
    output = task.apply(params, task.process.network_input(x_t, times), task.process.network_time(times), cond)
    return mean_over_example(jnp.square(task.process.predict(output, x_t, times).x0 - x0))


def _batches(run: Run, source: Any, size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (number of the first example, batch) over a data set, in order."""
    if isinstance(source, LatentCache):
        entries = run.caption_entries(source)
        for first in range(0, len(source), size):
            records = np.arange(first, min(first + size, len(source)))
            batch = {"moments": source.gather(source.views * records), "label": source.labels[records].astype(np.int32)}
            text = source.with_captions(records, lambda example, _: entries(example, None)) if entries else {}
            yield first, batch | text
        return
    for batch in read_in_order(source, run.example_transform(source), size):
        yield int(batch["index"][0]), {name: batch[name] for name in ("image", "label", *run.conditioner.batch_spec())}
