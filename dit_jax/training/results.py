"""The results of a run: previews during training, and results at the end. Each task has its own."""

from pathlib import Path
from typing import Any, Protocol

from dit_jax.build import Run
from dit_jax.tasks.state import TrainState
from dit_jax.training.records import Records


class Results(Protocol):
    """The results of a run. They are built before training, so that errors are raised before any work."""

    def preview(self, folder: Path, records: Records, step: int, state: TrainState, constants: Any) -> float:
        """Draws a preview from the moving average, which `records` writes to `folder`; returns the duration in seconds."""
        ...

    def finish(self, state: TrainState, constants: Any, workdir: Path) -> dict[str, Any]:
        """Makes and scores the results after the last step; returns their entries in result.json.

        "stopped" is True if a signal ended it early.
        """
        ...


def results_of(run: Run) -> Results:
    """The results of the run's task.

    Raises:
        UserError: see `check_results`.
    """
    return _results_class(run)(run)


def check_results(run: Run) -> None:
    """Raises the UserErrors of making results, before any training. Reads no weights."""
    _results_class(run).check(run)


def _results_class(run: Run):
    from dit_jax.training.reconstructions import Reconstructions
    from dit_jax.training.samples import Samples

    return Samples if run.task.draws_samples else Reconstructions
