"""What a diffusion run shows for itself: grids of images while it trains, samples and their score at the end."""

import time
from pathlib import Path

import jax

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.evaluate import scores
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file
from dit_jax.sample.drawing import draw
from dit_jax.sample.generator import Generator, drawing_mesh, on_mesh
from dit_jax.sample.grid import write_image_grid
from dit_jax.sample.labels import spread_labels
from dit_jax.sample.weights import hold
from dit_jax.training import scoring


def check(config):
    """Raises a UserError for what would only be found when the images are drawn or scored: before any training."""
    scoring.check(config)
    if config.evaluation.num_images and config.evaluation.reference:
        scores.check(
            config.evaluation.reference,
            config.evaluation.features,
            config.evaluation.weights or None,
            build.transform(config).shape,
        )


def make_preview(config, task, mesh, source):
    """(folder, records, step, state, constants) -> seconds: writes a grid of images from the moving average."""
    classes = max(config.model.num_classes, 1)
    count = config.preview.num_images
    if config.preview.every_steps and count < 1:
        raise UserError(f"preview.num_images is {count}; it must be at least 1 (preview.every_steps = 0 turns previews off)")
    labels = spread_labels(count, config.model.num_classes) if config.preview.every_steps else None
    size = -(-count // build.rows_per_step(mesh)) * build.rows_per_step(mesh)
    generator = Generator(
        task,
        mesh,
        build.sampler(config),
        build.guidance(config),
        size,
        config.seed,
        rows_at_once=size // build.rows_per_step(mesh),
        forecast=build.forecast(config),
    )

    def preview(folder, records, step, state, constants):
        start = time.monotonic()
        images = generator(hold(task, state.ema_params), constants, labels)
        if hosts.is_first():
            path = folder / f"{step:08d}.png"
            columns = classes if classes <= 20 and count >= classes else None
            records.images(step, {"samples": write_image_grid(path, images, columns)})
            say(f"samples in {path}")
        return time.monotonic() - start

    return preview


def finish(run, workdir: Path) -> dict:
    """Draws config.evaluation.num_images samples from the moving average and scores them if the config names a reference."""
    config = run.config
    if not config.evaluation.num_images:
        return {"samples": None}
    path = workdir / "samples" / f"{int(run.state.step):08d}_final.npz"
    labels = spread_labels(config.evaluation.num_images, config.model.num_classes)
    mesh, batch_size = drawing_mesh(run.mesh), config.evaluation.batch_size
    generator = Generator(
        run.task, mesh, build.sampler(config), build.guidance(config), batch_size, config.seed, forecast=build.forecast(config)
    )
    params, codec = on_mesh((run.state.ema_params, run.constants["codec"]), mesh)
    made_by = samples_file.describe(config, params, int(run.state.step), config.seed) | {"labels": "balanced"}
    shape = build.transform(config).shape
    drawn = draw(path, generator, hold(run.task, params), {"codec": codec}, labels, shape, made_by, replace=True)
    result = {"samples": str(path), "stopped": drawn.stopped}
    if drawn.stopped:
        return result
    say(f"{len(labels)} samples in {drawn.seconds:.1f} s: {path} and {drawn.grid}")
    if config.evaluation.reference and jax.process_index() == 0:
        result |= scores.evaluate(
            str(path),
            config.evaluation.reference,
            config.evaluation.features,
            config.evaluation.weights or None,
            scores.Options(("fid",)),
            processes=(0, 1),
        )
    return result
