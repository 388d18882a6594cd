"""The cheap score of a run while it trains: few steps, fewer images, from the moving average; and which checkpoint was best."""

import json
import os
import shutil
import time
from pathlib import Path

import ml_collections
from absl import logging

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.evaluate import reference as references
from dit_jax.evaluate import scores
from dit_jax.evaluate.extractors import load
from dit_jax.parallel import hosts
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file
from dit_jax.sample.drawing import draw
from dit_jax.sample.generator import Generator, drawing_mesh, on_mesh
from dit_jax.sample.labels import spread_labels
from dit_jax.sample.weights import hold

FOLDER, REFERENCE, BEST = "scores", "reference.npz", "best.json"


def scoring_config(config) -> ml_collections.ConfigDict:
    """The config with the sampler of config.scoring in place of that of the final samples."""
    found = ml_collections.ConfigDict(config.to_dict())
    found.sampler = config.scoring.sampler
    return found


def image_shape(config) -> tuple[int, int, int]:
    return build.transform(config).shape


def check(config):
    """Raises a UserError for what would only be found at the first score: before any training."""
    every_steps, num_images = config.scoring.every_steps, config.scoring.num_images
    if not every_steps:
        return
    if every_steps < 1 or num_images < 2:
        raise UserError(
            f"scoring.every_steps is {every_steps} and scoring.num_images {num_images}; at least 1 and 2 are needed "
            "(scoring.every_steps = 0 turns scoring off)"
        )
    if not config.evaluation.reference:
        raise UserError(
            f"scoring.every_steps is {every_steps} and evaluation.reference is empty: name the images or statistics "
            "to score against, or set scoring.every_steps to 0"
        )
    scores.check(config.evaluation.reference, config.evaluation.features, config.evaluation.weights or None, image_shape(config))
    found = scoring_config(config)
    build.sampler(found), build.forecast(found)


class Scorer:
    """Scores a run every so many steps, in `<workdir>/scores`, and remembers the best step there.

    Every process draws its share of the images and takes their features; a run that was stopped or killed while it did so goes on
    with it when it is started again.

    best: {"step", "fid", ...} of the lowest score so far, or None.
    """

    def __init__(self, config, task, mesh, workdir: Path):
        self.every_steps, self._config = config.scoring.every_steps, config
        self._folder, self._task, self._mesh = workdir / FOLDER, task, drawing_mesh(mesh)
        self._has_reference = False
        self.best = read_best(workdir)

    def due(self, step: int) -> bool:
        return bool(self.every_steps) and step > 0 and step % self.every_steps == 0

    def unfinished(self, step: int) -> bool:
        """Whether this step is to be scored and was not, because the run was stopped before or while it was."""
        return self.due(step) and not self._result(step).exists()

    def forget_after(self, step: int):
        """Drops the best step if it is a later one than the run goes on from."""
        if self.best and self.best["step"] > step:
            say(f"the best step so far, {self.best['step']}, lies after step {step}: forgotten")
            self.best = None

    def __call__(self, step: int, params, codec) -> dict | None:
        """The score of these parameters and what it depends on, written to `<workdir>/scores`; None if a signal stopped it."""
        start, config = time.monotonic(), scoring_config(self._config)
        labels = spread_labels(config.scoring.num_images, config.model.num_classes)
        generator = Generator(
            self._task,
            self._mesh,
            build.sampler(config),
            build.guidance(config),
            config.evaluation.batch_size,
            config.seed,
            forecast=build.forecast(config),
        )
        params, codec = on_mesh((params, codec), self._mesh)
        made_by = samples_file.describe(config, params, step, config.seed) | {"labels": "balanced"}
        drawn = draw(
            self._samples(step),
            generator,
            hold(self._task, params),
            {"codec": codec},
            labels,
            image_shape(config),
            made_by,
            replace=True,
        )
        if drawn.stopped:
            return None
        result = scores.evaluate(
            str(drawn.samples),
            self._reference_file(),
            config.evaluation.features,
            config.evaluation.weights or None,
            scores.Options(("fid",), replicates=0),
        )
        result |= {"step": step, "seconds": time.monotonic() - start}
        if self.best is None or result["fid"] < self.best["fid"]:
            self.best = {key: result[key] for key in ("step", "fid", "features", "num_samples", "reference")}
        if hosts.is_first():
            _write(self._result(step), result)
            _write(self._folder / BEST, self.best)
            shutil.rmtree(self._samples(step), ignore_errors=True)
        say(
            f"step {step}: Frechet distance {result['fid']:.4f} in {result['features']}, {len(labels)} images, "
            f"{result['seconds']:.0f} s; best {self.best['fid']:.4f} at step {self.best['step']}"
        )
        return result

    def _samples(self, step: int) -> Path:
        return self._folder / f"{step:08d}_samples"

    def _result(self, step: int) -> Path:
        return self._folder / f"{step:08d}.json"

    def _reference_file(self) -> str:
        """The statistics to compare with: those that the config names, or made once from the images that it names."""
        evaluation, file = self._config.evaluation, self._folder / REFERENCE
        found = scores.open_reference(evaluation.reference, image_shape(self._config))
        if isinstance(found, references.Reference):
            return evaluation.reference
        if self._has_reference:
            return str(file)
        loaded = load(evaluation.features, evaluation.weights or None)
        if not (file.exists() and _was_made_of(references.read(file), found, loaded)):
            made = scores.make_reference(found, loaded, False)
            if hosts.is_first():
                references.write(file, made)
        hosts.wait_for_all("the reference of the scores is written")
        self._has_reference = True
        return str(file)


def read_best(workdir: Path) -> dict | None:
    """{"step", "fid", ...} of the best score of a run so far; None if there is none."""
    file = workdir / FOLDER / BEST
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read (%s): the best step starts anew.", file, error)
        return None


def _was_made_of(reference: references.Reference, images, loaded) -> bool:
    recipe = reference.recipe
    return (recipe["source"], recipe["count"], recipe["extractor"]) == (images.name, len(images), loaded.describe())


def _write(path: Path, result: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
