"""Writes results and references, each under a claim on its file; after a kill the same call resumes from <file>.partial/."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from dit_jax.evaluate import reference, scores, snapshots, validation
from dit_jax.evaluate.extractors import Loaded
from dit_jax.evaluate.images import Images
from dit_jax.evaluate.reference import Reference
from dit_jax.evaluate.scores import Options
from dit_jax.storage.atomic import resumable_path, write_json
from dit_jax.storage.claim import claim_file


@contextlib.contextmanager
def _claimed(path: Path, what: str, flag: str) -> Iterator[Path]:
    """Yields the folder of the snapshots; removes it if the block ends without an error. The first process claims the file."""
    first = jax.process_index() == 0
    with claim_file(path, what, flag) if first else contextlib.nullcontext():
        yield resumable_path(path)
        if first:
            snapshots.remove(resumable_path(path))


def write_scores(
    path: Path, samples: str, against: str | None, features: str, weights: str | None, options: Options, split: str | None
) -> dict:
    """Writes the result of `scores.evaluate`, with the path of the file, and returns it.

    Raises:
        UserError: see `scores.evaluate`; another command is writing the file.
    """
    with _claimed(path, "scoring", "--out") as folder:
        result = scores.evaluate(samples, against, features, weights, options, split=split, folder=folder)
        result["out"] = str(path)
        if jax.process_index() == 0:
            write_json(path, result)
    return result


def write_validation(path: Path, run: Path, step: str | None, average: str, split: str | None, data_path: str | None) -> dict:
    """Writes the result of `validation.of_run`, with the path of the file, and returns it.

    Raises:
        UserError: see `validation.of_run`; another command is writing the file.
    """
    with _claimed(path, "measuring the validation loss", "--out"):
        result = validation.of_run(run, step, average, split, data_path) | {"out": str(path)}
        if jax.process_index() == 0:
            write_json(path, result)
    return result


def write_reference(path: Path, images: Images, loaded: Loaded, keep_features: bool, options: Options) -> Reference:
    """Writes the reference of `scores.make_reference` and returns it.

    Raises:
        UserError: see `scores.make_reference`; another command is writing the file.
    """
    with _claimed(path, "making statistics", "--make_reference") as folder:
        made = scores.make_reference(images, loaded, keep_features, options, folder)
        if jax.process_index() == 0:
            reference.write(path, made)
    return made
