"""The cheap score of a run during training (few sampling steps, fewer images), and the best checkpoint."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.evaluate import reference as references
from dit_jax.evaluate import scores
from dit_jax.evaluate.extractors import load
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file, shards
from dit_jax.sample.drawing import check_out, draw
from dit_jax.sample.generator import Generator, drawing_mesh, for_samples, on_mesh
from dit_jax.sample.labels import spread_requests
from dit_jax.sample.weights import cast_for_inference, weights_fingerprint, whole_network
from dit_jax.storage.atomic import write_json
from dit_jax.storage.run_folder import BEST_SCORE, SCORES, read_best

REFERENCE = "reference.npz"


def check(run: Run) -> None:
    """Raises the UserErrors of the first score, before any training."""
    scoring, evaluation = run.config.scoring, run.config.evaluation
    if not scoring.every_steps:
        return
    if scoring.every_steps < 1 or scoring.num_images < 2:
        raise UserError(
            f"scoring.every_steps is {scoring.every_steps} and scoring.num_images {scoring.num_images}; they must be at "
            "least 1 and 2 (scoring.every_steps = 0 turns scoring off)"
        )
    if not evaluation.reference:
        raise UserError(
            f"scoring.every_steps is {scoring.every_steps} and evaluation.reference is empty; name the images or statistics "
            "to score against, or set scoring.every_steps to 0"
        )
    scores.check(evaluation.reference, evaluation.features, evaluation.weights or None, run.image_shape)
    run.checked_forecast(run.scoring_sampler)


class Scorer:
    """Scores a run at an interval of steps, and stores the scores and the best step in `<workdir>/scores`.

    Every process draws its share of the images and computes their features. A run that was stopped or killed during a score
    continues the score when it is started again.

    best: {"step", "fid", ...} of the lowest score so far, or None.
    """

    def __init__(self, run: Run, workdir: Path):
        self._run, self._scoring, self._evaluation = run, run.config.scoring, run.config.evaluation
        self.every_steps = self._scoring.every_steps
        self._folder, self._mesh = workdir / SCORES, drawing_mesh(run.mesh)
        self._has_reference = False
        self.best = read_best(workdir)

    def due(self, step: int) -> bool:
        return bool(self.every_steps) and step > 0 and step % self.every_steps == 0

    def unfinished(self, step: int) -> bool:
        """Whether the score of this step is due and missing, because the run stopped before or during it."""
        return self.due(step) and not self._result(step).exists()

    def forget_after(self, step: int) -> None:
        """Drops the best step if the run continues from an earlier step."""
        if self.best and self.best["step"] > step:
            say(f"the best step so far, {self.best['step']}, is after step {step} and no longer counts")
            self.best = None

    def problem(self, step: int) -> str:
        """Why a score cannot be written, or ""; every process returns one if one has one. All processes call it together."""
        problem = ""
        try:
            check_out(self._samples(step))
        except UserError as error:
            problem = str(error)
        return (problem or "another process cannot write it") if hosts.greatest(int(bool(problem))) else ""

    def give_up(self, step: int) -> None:
        """Removes what a score that failed has left; the next start takes the score if no step was saved since."""
        if hosts.is_first():
            shutil.rmtree(self._samples(step), ignore_errors=True)

    def __call__(
        self, step: int, params: Any, constants: Mapping[str, Any], record: Callable[[dict[str, float]], None]
    ) -> dict | None:
        """The score of these parameters with its settings, also written to `<workdir>/scores`; None if a signal stopped it.

        record: is called with the numbers for the metrics of the run.
        """
        start, run, num_images = time.monotonic(), self._run, self._scoring.num_images
        requests, seed = spread_requests(run.conditioner, num_images, run.prompts), run.config.seed
        sampler = run.scoring_sampler
        forecast = run.checked_forecast(sampler)
        generator = Generator(run.task, self._mesh, sampler, run.guidance, self._evaluation.batch_size, seed, forecast=forecast)
        params, frozen = on_mesh((whole_network(run.task, params, constants), for_samples(constants)), self._mesh)
        made_by = samples_file.describe(run.config, weights_fingerprint(params), step, seed) | {"labels": "balanced"}
        made_by["sampler"] = self._scoring.sampler.to_dict()
        drawn = draw(
            self._samples(step),
            generator,
            cast_for_inference(run.task, params),
            frozen,
            requests,
            num_images,
            made_by,
            replace=True,
        )
        if drawn.stopped:
            return None
        result = scores.evaluate(
            str(drawn.samples),
            self._reference_file(),
            self._evaluation.features,
            self._evaluation.weights or None,
            scores.Options(("fid",), replicates=0),
        )
        result |= {"step": step, "seconds": time.monotonic() - start}
        best = self.best
        if best is None or result["fid"] < best["fid"]:
            best = {key: result[key] for key in ("step", "fid", "features", "num_samples", "reference")}
        record({"fid": result["fid"], "best_fid": best["fid"], "scoring_seconds": result["seconds"]})
        if hosts.is_first():
            write_json(self._folder / BEST_SCORE, best)
            write_json(self._result(step), result)  # last: with it the score is finished
            shards.remove_finished(self._samples(step))
        self.best = best
        say(
            f"step {step}: Frechet distance {result['fid']:.4f} in {result['features']}, {num_images} images, "
            f"{result['seconds']:.0f} s; best {best['fid']:.4f} at step {best['step']}"
        )
        return result

    def _samples(self, step: int) -> Path:
        return self._folder / f"{step:08d}_samples"

    def _result(self, step: int) -> Path:
        return self._folder / f"{step:08d}.json"

    def _reference_file(self) -> str:
        """The reference statistics: those that the config names, or computed once from the images that it names."""
        evaluation, file = self._evaluation, self._folder / REFERENCE
        opened = scores.open_reference(evaluation.reference, self._run.image_shape)
        if isinstance(opened, references.Reference):
            return evaluation.reference
        if self._has_reference:
            return str(file)
        loaded = load(evaluation.features, evaluation.weights or None)
        taken = scores.as_taken(opened, loaded.extractor)
        if not (file.exists() and _was_made_of(references.read(file), taken, loaded)):
            made = scores.make_reference(opened, loaded, False)
            if hosts.is_first():
                references.write(file, made)
        hosts.wait_for_all("the reference of the scores is written")
        self._has_reference = True
        return str(file)


def _was_made_of(reference: references.Reference, images, loaded) -> bool:
    recipe = reference.recipe
    return (recipe["source"], recipe["count"], recipe["extractor"]) == (images.name, len(images), loaded.describe())
