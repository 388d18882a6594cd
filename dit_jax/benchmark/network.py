"""Measures a training step, a forward pass, and sampling."""

import dataclasses
import math
import time

import jax
import numpy as np

from dit_jax.benchmark import machine
from dit_jax.benchmark.subject import Subject
from dit_jax.benchmark.timing import MIN_STEPS, Work, measure, measure_queued, report, warm_up
from dit_jax.codecs.pixels import Pixels
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import batch_sharding, rows_per_step
from dit_jax.programs import collectives, hlo
from dit_jax.runtime.console import say
from dit_jax.sample.generator import Generator, default_chunk_size
from dit_jax.sample.weights import cast_for_inference
from dit_jax.tasks.compiled_step import compile_in_background
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.state import abstract_state, count_parameters, create_sharded

WARM_UP_STEPS = 3
FIRST_STEP = "first step finished"  # `startup` waits for this line


def train_step(subject: Subject) -> Work:
    """The step of the training loop on one batch that stays on the devices, without data set and autoencoder."""
    task, mesh, batch = subject.task, subject.mesh, subject.batch()
    compiling = compile_in_background([task], mesh, subject.seed, abstract_state(task, mesh), subject.constants, [batch])
    state = create_sharded(task, jax.random.key(subject.seed), mesh)
    parameters = count_parameters(state.params)
    (step,), zeros, seconds = compiling.result()
    say(f"compiled the training step in {seconds:.1f} s")
    sums = zeros()

    def call():
        nonlocal state, sums
        state, sums = step(state, sums, subject.constants, batch)
        return sums

    done = jax.device_get(call())
    say(FIRST_STEP)
    if done["skipped"][0] or not np.isfinite(done["loss"]).all():
        raise UserError(
            f"the loss of the first step is not finite in {subject.describe()['dtype']}, so steps are skipped and their "
            "speed is meaningless; use another dtype or config"
        )
    macs = subject.macs
    return Work(
        call,
        subject.batch_size,
        {
            "parameters": parameters,
            "compile_seconds": seconds,
            "program_bytes": machine.program_bytes(step),
            "collective_bytes": collective_bytes(step, mesh),
            "flops_per_image": None if macs is None else 6 * macs,
            "flops_formula": "6 x MACs: a forward and a backward of twice its cost",
        },
    )


def collective_bytes(compiled, mesh) -> dict[str, dict[str, int]]:
    """Bytes that one device sends in a program, on rings, {kind: {mesh axes: bytes}}; {} on one device."""
    if mesh.devices.size == 1:
        return {}
    collective_ops = collectives.find(hlo.parse(compiled.as_text()), mesh.devices.size)
    return collectives.by_kind_and_axis(collective_ops, dict(mesh.shape))


def forward(subject: Subject) -> Work:
    """One forward pass of only the network, on noise."""
    task, mesh = diffusion_task(subject), subject.mesh
    params = create_sharded(task, jax.random.key(subject.seed), mesh).params
    requests = {name: x for name, x in subject.batch().items() if name in task.conditioner.batch_spec()}
    rows = batch_sharding(mesh)

    def apply(params, x, t, requests):
        cond, _ = task.condition(params, {}, requests)
        return task.apply(params, x, t, cond)

    def inputs(key):
        return (
            jax.random.normal(key, (subject.batch_size, *task.latent_shape)),
            jax.random.uniform(key, (subject.batch_size,), maxval=999),
        )

    x, t = jax.jit(inputs, out_shardings=rows)(jax.random.key(subject.seed))
    start = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = jax.jit(apply, out_shardings=rows).lower(params, x, t, requests).compile()
    seconds = time.monotonic() - start
    say(f"compiled the forward in {seconds:.1f} s")
    return Work(
        lambda: compiled(params, x, t, requests),
        subject.batch_size,
        {
            "parameters": count_parameters(params),
            "compile_seconds": seconds,
            "program_bytes": machine.program_bytes(compiled),
            "flops_per_image": 2 * task.macs(),
            "flops_formula": "2 x MACs",
        },
    )


def sampler(subject: Subject) -> Work:
    """One batch of samples as in `sample`, with guidance, to uint8 on the host; latents are not decoded."""
    task = diffusion_task(subject)
    guidance, draw = subject.guidance, subject.sampler
    task = dataclasses.replace(task, codec=Pixels(image_channels=task.latent_shape[-1]), image_shape=task.latent_shape)
    params = cast_for_inference(task, create_sharded(task, jax.random.key(subject.seed), subject.mesh).ema_params)
    requests = subject.requests()
    platform = jax.devices()[0].platform
    share, rows = subject.batch_size // rows_per_step(subject.mesh), default_chunk_size(subject.num_tokens, platform)
    generator = Generator(
        task, subject.mesh, draw, guidance, subject.batch_size, subject.seed, chunk_size=share if share % rows else rows
    )  # not more rows than are reported

    def call():
        return generator(params, {"codec": {}}, requests, subject.batch_size)

    start = time.monotonic()
    call()
    seconds = time.monotonic() - start
    say(f"compiled the sampler and drew the first batch in {seconds:.1f} s")
    steps = draw.evaluations(task.process)
    evaluations = steps * (2 if guidance.active else 1) if steps and not guidance.is_partial else None
    return Work(
        call,
        subject.batch_size,
        {
            "parameters": count_parameters(params),
            "compile_and_first_batch_seconds": seconds,
            "sampler": {"name": type(draw).__name__, **dataclasses.asdict(draw)},
            "guidance": dataclasses.asdict(guidance),
            "evaluations": evaluations,
            "decoded": False,
            "flops_per_image": evaluations and 2 * task.macs() * evaluations,
            "flops_formula": "2 x MACs x evaluations of the network",
        },
    )


def diffusion_task(subject: Subject) -> DiffusionTask:
    """The subject's task. Raises a UserError if it draws no samples."""
    if not subject.task.draws_samples:
        raise UserError(
            "the config trains an autoencoder, which is not a diffusion model and has no sampler: measure it with "
            "--what=train_step or --what=vae"
        )
    return subject.diffusion_task


def run(subject: Subject, work: Work, seconds: float, queue: bool) -> dict:
    """Measures a Work; percentiles are of calls with a wait after each.

    queue: measure images/s with as many additional calls and a single wait after the last one, as in training.
    """
    warm_up(work, WARM_UP_STEPS)
    timing = single = measure(work, seconds)
    report("one call at a time", single)
    if queue:
        timing = measure_queued(work, max(MIN_STEPS, math.ceil(seconds / float(np.median(single.seconds)))))
        report("queued", timing)
    return {**timing.rates(), **single.quantiles(), **work.facts, **efficiency(subject, work, timing.images_per_second)}


def efficiency(subject: Subject, work: Work, rate: float) -> dict:
    """Efficiency of the devices at this number of images per second."""
    devices = list(subject.mesh.devices.flat)
    flops = work.facts["flops_per_image"]
    return {
        "images_per_second_per_device": rate / len(devices),
        "tflops_per_second_per_device": flops and rate * flops / len(devices) / 1e12,
        "mfu": flops and machine.utilization(rate, flops, devices),
        "mfu_formula": machine.MFU_FORMULA,
        "peak_flops": machine.peak_flops(devices[0].device_kind),
        "peak_bytes": machine.peak_bytes(),
    }
