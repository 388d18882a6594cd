"""Metrics of a run on Weights & Biases (wandb.ai); needs the package `wandb`."""

import importlib.util
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.errors import UserError
from dit_jax.storage.atomic import write_atomic


class WandbWriter:
    """One W&B run for one workdir: its id is kept in `workdir`/wandb_id.txt, so that a resumed run continues its curves.

    Steps that W&B already has are not sent again: a resumed run repeats them exactly. WANDB_MODE=offline works
    without a network; `wandb sync` sends it later. The first use takes seconds. If it fails, later uses fail with the same error.

    Args:
        workdir: holds the id and W&B's own files, in `wandb/`.
        project: where the run appears.
        config: dict of the run's settings, shown there.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, workdir: str | os.PathLike, project: str, config: dict):
        if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"log.wandb is {project!r} and the package wandb is not installed; pip install wandb, or leave log.wandb empty"
            )
        self._workdir, self._project, self._config = Path(workdir), project, config
        self._run: Any = None  # wandb's run
        self._failed: Exception | None = None

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Logs scalars. Raises the exceptions of wandb."""
        self._log(step, lambda wandb: numbers)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, C], C = 1 or 3. Raises the exceptions of wandb."""
        self._log(step, lambda wandb: {name: wandb.Image(image.squeeze(-1) if image.shape[-1] == 1 else image)})

    def close(self) -> None:
        """Sends pending data and finishes the run."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _log(self, step, values):
        import wandb

        if self._run is None:
            self._run = self._start(wandb)
        if step >= self._run.step:
            self._run.log(values(wandb), step=step)

    def _start(self, wandb):
        if self._failed is not None:
            raise self._failed
        file = self._workdir / "wandb_id.txt"
        if not file.exists():
            write_atomic(file, secrets.token_hex(4))
        try:
            # The console is not captured: the last line of stdout is the result, and W&B would wrap it.
            return wandb.init(
                project=self._project,
                id=file.read_text().strip(),
                resume="allow",
                dir=str(self._workdir),
                config=self._config,
                settings=wandb.Settings(console="off"),
            )
        except Exception as error:
            self._failed = error
            raise
