"""What a run shows for itself: pictures while it trains, and results at the end. Each task has its own."""

from pathlib import Path
from typing import Any, Protocol

from dit_jax.build import Run
from dit_jax.tasks.state import TrainState
from dit_jax.training.records import Records


class Results(Protocol):
    """Built before training, so that whatever is wrong with it fails before any work."""

    def preview(self, folder: Path, records: Records, step: int, state: TrainState, constants: Any) -> float:
        """Writes a picture of what the moving average makes to `folder`; returns the seconds that it took."""
        ...

    def finish(self, state: TrainState, constants: Any, workdir: Path) -> dict[str, Any]:
        """Makes and scores the results of a run whose last step is done; the entries that result.json has of them.

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
    """Raises a UserError for what would only be found when results are made, before any training. Reads no weights."""
    _results_class(run).check(run)


def _results_class(run: Run):
    from dit_jax.training.reconstructions import Reconstructions
    from dit_jax.training.samples import Samples

    return {"diffusion": Samples, "autoencoder": Reconstructions}[run.task.name]
