"""The bill of a run: the hours of a slice that its parts take, in chip-hours and in money.

A part is a number of calls of one program: encoding of the data set, training, previews, scores while training, the final
samples, and their features. The time of a call is the estimate of `plan`, or a measurement of `dit_jax.benchmark`. Compilation,
starts, checkpoints, waiting for data, failures and idle chips are not in it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.build import Run
from dit_jax.data.latents import LatentCache
from dit_jax.errors import UserError
from dit_jax.metrics.inception import INPUT_SIZE, Inception, InceptionV3
from dit_jax.parallel.mesh import batch_sharding, replicated, rows_per_step
from dit_jax.parallel.rules import shardings
from dit_jax.pixels import to_float
from dit_jax.plan import estimate
from dit_jax.programs.topology import Topology
from dit_jax.registry import get

PAPER_SAMPLES = 50_000  # of the FID that papers report
ENCODE_ROWS = 16  # images per device and call, the default of `dit_jax.encode`
FEATURE_ROWS = 128  # images per device and call, the default of `dit_jax.evaluate`
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Part:
    """One line of a bill.

    Fields:
        name: "training".
        amount: what is computed, as text: "400,000 steps of 256".
        calls: number of calls of the program.
        call_seconds: of one call on all devices.
        source: "estimate" or "measurement".
    """

    name: str
    amount: str
    calls: float
    call_seconds: float
    source: str = "estimate"

    @property
    def hours(self) -> float:
        return self.calls * self.call_seconds / SECONDS_PER_HOUR


def read_measurements(path: str) -> list[dict[str, Any]]:
    """The results in a file of `dit_jax.benchmark`: one JSON object per line.

    Raises:
        UserError: no such file; a line that is not a result.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--measured={path} cannot be read ({error}); give the JSON lines of dit_jax.benchmark") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "what" not in row:
            raise UserError(f"--measured={path}, line {number} is not a result of dit_jax.benchmark; give only its last lines")
        rows.append(row)
    return rows


def measured(rows: Sequence[dict[str, Any]], what: str, wanted: dict[str, Any], topology: Topology) -> dict[str, Any] | None:
    """The newest measurement of `what` whose entries are `wanted`, on as many of the topology's chips; None if there is none."""
    from dit_jax.programs import chips

    for row in reversed(rows):
        chip = chips.of_kind(str(row.get("device")))
        same = chip is not None and chip.name == topology.chip.name and row.get("num_devices") == len(topology.devices)
        if row["what"] == what and same and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def bill(
    config,
    topology: Topology,
    examples: int | None = None,
    samples: int | None = None,
    measurements: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Plans the programs of a run and adds up the hours.

    Args:
        examples: number of examples that are encoded, for a config that trains on a latent cache; None leaves encoding out.
        samples: number of final samples; None takes `evaluation.num_images`, or PAPER_SAMPLES if that is 0.
        measurements: rows of `read_measurements`; those of this network, batch and slice replace the estimates.

    Returns:
        {"topology", "chip", "devices", "parts": [{"name", "amount", "hours", "chip_hours", "source"}], "hours", "chip_hours"}.

    Raises:
        UserError: a program does not fit, the chip's speed is unknown and nothing was measured, or `examples` is given and the
            config does not train on a latent cache.
    """
    run = estimate.run_on(config, topology)
    task = run.task
    parts: list[Part] = []
    if get("data", config.data.name) is LatentCache:
        if examples is not None:
            parts.append(_encoding(run, topology, examples))
    elif examples is not None:
        raise UserError(
            f"--examples={examples} is the size of a latent cache to encode, and the config trains on data {config.data.name!r}; "
            "omit it, or plan with --config.data.name=latents"
        )
    gmacs = task.macs() / 1e9
    wanted = {"batch_size": config.batch_size, "gmacs": gmacs}
    row = None if len(run.buckets) else measured(measurements, "train_step", wanted, topology)
    if row is None:
        plan = estimate.plan_training(config, topology, resident_rows=max(examples or 0, 1))
        plan |= {"step_seconds": plan.get("cycle", plan)["step_seconds"]}  # with buckets the mean
        step, source = _seconds(plan, "step_seconds"), "estimate"
    else:
        step, source = config.batch_size / row["images_per_second"], "measurement"
    amount = f"{config.num_steps:,} steps of " + (f"{len(run.buckets)} buckets" if len(run.buckets) else f"{config.batch_size:,}")
    parts.append(Part("training", amount, config.num_steps, step, source))
    if task.draws_samples:
        parts += _drawing(run, config, topology, gmacs, samples, measurements)
    hours = sum(part.hours for part in parts)
    devices = len(topology.devices)
    return {
        "topology": topology.name,
        "chip": topology.chip.name,
        "devices": devices,
        "parts": [
            {"name": p.name, "amount": p.amount, "hours": p.hours, "chip_hours": p.hours * devices, "source": p.source}
            for p in parts
        ],
        "hours": hours,
        "chip_hours": hours * devices,
    }


def of_training(plan: dict[str, Any], num_steps: int, price: float | None) -> dict[str, float | None]:
    """Hours, chip-hours and cost of `num_steps` of a plan's training step; None where the plan has no step time."""
    if plan["step_seconds"] is None:
        return {"hours": None, "chip_hours": None, "cost": None}
    hours = num_steps * plan["step_seconds"] / SECONDS_PER_HOUR
    return {
        "hours": hours,
        "chip_hours": hours * plan["devices"],
        "cost": None if price is None else price * hours * plan["devices"],
    }


def _seconds(plan: dict[str, Any], key: str) -> float:
    """The estimated seconds of a call of a plan. Raises UserError if there are none."""
    if not plan["fits"]:
        raise UserError(
            f"a program does not fit on {plan.get('topology', 'the slice')}, so it has no price: plan without --bill, which "
            "says what would help, or choose a larger slice"
        )
    if plan[key] is None:
        raise UserError(
            "there is no estimate of the time of a call: simulated devices have no speed, and an adaptive sampler no fixed "
            "number of steps; choose --topology=v5p:4x4x4, h200:8 or the like, and a sampler with num_steps, or give --measured"
        )
    return plan[key]


def _drawing(run: Run, config, topology: Topology, gmacs: float, samples: int | None, measurements) -> list[Part]:
    """Previews, scores while training, the final samples and their features."""
    samples = samples or config.evaluation.num_images or PAPER_SAMPLES
    evaluations = run.sampler.evaluations(run.process)
    per_sample = evaluations * (2 if run.guidance.active else 1) if evaluations and not run.guidance.is_partial else None
    row = None if per_sample is None else measured(measurements, "sampler", {"gmacs": gmacs, "evaluations": per_sample}, topology)
    if row is None:
        plan = estimate.plan_sampling(config, topology)
        assert plan is not None  # the task draws samples
        image_seconds, source = _seconds(plan | {"topology": topology.name}, "batch_seconds") / plan["batch_size"], "estimate"
    else:
        image_seconds, source = 1 / row["images_per_second"], "measurement"
    parts = []
    features = None
    if config.preview.every_steps:
        count = config.num_steps // config.preview.every_steps * config.preview.num_images
        parts.append(Part("previews", f"{count:,} images", count, image_seconds, source))
    if config.get("scoring", {}).get("every_steps"):
        count = config.num_steps // config.scoring.every_steps * config.scoring.num_images
        steps = run.scoring_sampler.evaluations(run.process)
        if not (steps and evaluations):
            raise UserError(
                "scoring.sampler or sampler chooses its own number of steps, so that scores have no price; set num_steps"
            )
        features = _feature_seconds(run, topology)
        parts.append(Part("scores", f"{count:,} images", count, image_seconds * steps / evaluations + features, source))
    parts.append(Part("sampling", f"{samples:,} images, {config.sampler.name}", samples, image_seconds, source))
    features = _feature_seconds(run, topology) if features is None else features
    parts.append(Part("evaluation", f"{samples:,} images, Inception-v3", samples, features))
    return parts


def _encoding(run: Run, topology: Topology, examples: int) -> Part:
    """Encoding of `examples` images and, where the transform flips, of their mirror images."""
    codec, mesh = run.codec, run.mesh
    rows = ENCODE_ROWS * rows_per_step(mesh)
    params = jax.eval_shape(codec.init, jax.random.key(0))
    places = shardings(params, mesh, codec.rules)
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)
    images = jax.ShapeDtypeStruct((rows, *run.image_shape), np.uint8, sharding=batch_sharding(mesh))

    def encode(params, images):
        return codec.encode(params, to_float(images)).astype(jnp.float16)

    seconds = _compiled_seconds(encode, {"params": params, "batch": images}, topology, mesh)
    views = examples * (2 if getattr(run.transform, "flip", False) else 1)
    return Part("encoding", f"{views:,} views of {examples:,} examples", views / rows, seconds)


def _feature_seconds(run: Run, topology: Topology) -> float:
    """Seconds of Inception-v3's features of one image, all devices working, for images of the run's size."""
    mesh, shape = run.mesh, run.image_shape
    rows = FEATURE_ROWS * rows_per_step(mesh)
    side = jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32)
    params = jax.eval_shape(lambda x: InceptionV3().init(jax.random.key(0), x), side)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), params)
    images = jax.ShapeDtypeStruct((rows, *shape[-3:]), np.uint8, sharding=batch_sharding(mesh))
    frames = math.prod(shape[:-3])  # every frame of a clip is an image
    return frames * _compiled_seconds(Inception(), {"params": params, "batch": images}, topology, mesh) / rows


def _compiled_seconds(function, arguments: dict[str, Any], topology: Topology, mesh) -> float:
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*arguments.values())
    report = estimate.analysis(topology, mesh, estimate.compile_program(traced, arguments, mesh))
    return _seconds(report, "step_seconds")
