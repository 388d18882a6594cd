"""The results of a diffusion run: grids of samples during training, samples and their score at the end."""

import time
from pathlib import Path
from typing import Any

import jax

from dit_jax.build import Run
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.evaluate import scores, validation
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import rows_per_step
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file
from dit_jax.sample.clip_files import write_clips
from dit_jax.sample.drawing import draw
from dit_jax.sample.generator import Generator, drawing_mesh, for_samples, on_mesh
from dit_jax.sample.grid import label_names, sampling_caption, write_image_grid
from dit_jax.sample.labels import spread_requests
from dit_jax.sample.prompts import Prompts
from dit_jax.sample.weights import cast_for_inference, weights_fingerprint, whole_network
from dit_jax.tasks.state import TrainState
from dit_jax.training import scoring
from dit_jax.training.records import Records

MOST_COLUMNS = 20  # of a preview with a column for each class


class Samples:
    """The `Results` of a diffusion run: previews are drawn on the training mesh, final samples on the devices of each process."""

    def __init__(self, run: Run):
        self.run, preview = run, run.config.preview
        sampler, guidance, forecast = run.sampler, run.guidance, run.forecast
        self.num_previews = preview.num_images if preview.every_steps else 0
        if preview.every_steps and preview.num_images < 1:
            raise UserError(
                f"preview.num_images is {preview.num_images}; it must be at least 1 (preview.every_steps = 0 turns previews off)"
            )
        ways = rows_per_step(run.mesh)
        per_device = -(-max(preview.num_images, 1) // ways)
        seed = run.config.seed
        self.generator = Generator(
            run.task, run.mesh, sampler, guidance, per_device * ways, seed, chunk_size=per_device, forecast=forecast
        )

    @staticmethod
    def check(run: Run) -> None:
        """Raises the UserErrors of sampling and scoring, before training."""
        scoring.check(run)
        validation.check(run)
        evaluation = run.config.evaluation
        if evaluation.num_images and evaluation.reference:
            scores.check(evaluation.reference, evaluation.features, evaluation.weights or None, run.image_shape)

    def preview(self, folder: Path, records: Records, step: int, state: TrainState, constants: Any) -> float:
        start, count = time.monotonic(), self.num_previews
        classes = self.run.conditioner.num_classes
        requests = spread_requests(self.run.conditioner, count, self.run.prompts)
        params = cast_for_inference(self.run.task, whole_network(self.run.task, state.ema_params, constants))
        images = self.generator(params, constants, requests, count)
        path = folder / f"{step:08d}.png"
        names, caption = self.texts(requests, step)
        columns = classes if 1 < classes <= min(count, MOST_COLUMNS) else None

        def write():
            records.images(step, {"samples": write_image_grid(path, images, columns, names=names, caption=caption)})
            if images.ndim == 5:
                write_clips(path.with_suffix(".webp"), images, self.run.fps)
            say(f"samples in {path}")

        if hosts.is_first():
            records.preview(write)
        return time.monotonic() - start

    def texts(self, requests: Requests, step: int) -> tuple[list[str], str]:
        """(name of each image's class, or its prompt; caption) of a grid."""
        run, classes = self.run, self.run.conditioner.num_classes
        names = label_names(requests["label"], classes, run.source.class_names) if classes else []
        if run.prompts:
            names = list(Prompts(run.prompts).repeated(len(next(iter(requests.values())))).texts)
        return names, sampling_caption(step, run.guidance.scale, run.config.sampler, run.config.seed)

    def finish(self, state: TrainState, constants: Any, workdir: Path) -> dict[str, Any]:
        """Measures the validation loss, draws evaluation.num_images samples, and scores them if the config names a reference.

        All with the moving average.
        """
        measured = self.validate(state, constants)
        return measured | self.draw_and_score(state, constants, workdir)

    def validate(self, state: TrainState, constants: Any) -> dict[str, Any]:
        """{"validation_loss", "validation": see `validation.measured`} of the moving average; {} if it is off."""
        if not validation.is_on(self.run.config):
            return {}
        params = whole_network(self.run.task, state.ema_params, constants)
        result = validation.measured(self.run, params, constants) | {"weights": self.run.task.average.name}
        return {"validation_loss": result["loss"], "validation": result}

    def draw_and_score(self, state: TrainState, constants: Any, workdir: Path) -> dict[str, Any]:
        run, evaluation, step = self.run, self.run.config.evaluation, int(state.step)
        if not evaluation.num_images:
            return {"samples": None}
        path = workdir / "samples" / f"{step:08d}_final.npz"
        requests = spread_requests(run.conditioner, evaluation.num_images, run.prompts)
        mesh, seed = drawing_mesh(run.mesh), run.config.seed
        generator = Generator(run.task, mesh, run.sampler, run.guidance, evaluation.batch_size, seed, forecast=run.forecast)
        params, frozen = on_mesh((whole_network(run.task, state.ema_params, constants), for_samples(constants)), mesh)
        class_names = run.source.class_names if run.conditioner.num_classes else ()
        made_by = samples_file.describe(run.config, weights_fingerprint(params), step, seed, class_names)
        made_by |= {} if run.prompts else {"labels": "balanced"}
        made_by |= {} if run.fps is None else {"fps": run.fps}
        names, caption = self.texts(requests, step)
        drawn = draw(
            path,
            generator,
            cast_for_inference(run.task, params),
            frozen,
            requests,
            evaluation.num_images,
            made_by,
            replace=True,
            names=names,
            caption=caption,
            texts={"captions": names} if run.prompts else None,
        )
        result = {"samples": str(path), "stopped": drawn.stopped}
        if drawn.stopped:
            return result
        say(f"{evaluation.num_images} samples in {drawn.seconds:.1f} s: {path}")
        if evaluation.reference and jax.process_index() == 0:
            result |= scores.evaluate(
                str(path),
                evaluation.reference,
                evaluation.features,
                evaluation.weights or None,
                scores.Options(("fid",)),
                processes=(0, 1),
            )
        return result
