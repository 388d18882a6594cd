"""Removes the folders of samples that a killed process of a run left and that no later step of the run continues."""

import re
from pathlib import Path

from dit_jax.sample import shards
from dit_jax.storage.run_folder import SCORES
from dit_jax.training.scoring import Scorer

_FINAL, _SCORED = re.compile(r"(\d{8})_final\.shards"), re.compile(r"(\d{8})_samples")


def remove(workdir: Path, final_step: int | None, scorer: Scorer | None) -> None:
    """Removes those folders, except what is continued. Call it under the claim on the run's folder.

    A folder with a file that is not of `sample` stays.

    Args:
        final_step: of the final samples that this start draws or continues; None if it draws none.
        scorer: of the scores that it draws or continues; None if it draws none.
    """
    for number, folder in _folders(workdir / "samples", _FINAL):
        if number != final_step:
            shards.remove_finished(folder)
    for number, folder in _folders(workdir / SCORES, _SCORED):
        if scorer is None or not scorer.unfinished(number):
            shards.remove_finished(folder)


def _folders(parent: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """(step, folder) of the folders with such a name."""
    paths = sorted(parent.iterdir()) if parent.is_dir() else []
    return [(int(named[1]), path) for path in paths if (named := pattern.fullmatch(path.name)) and path.is_dir()]
