"""What a finished run adds to its folder: the pictures of its page, and the page."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.build import Run
from dit_jax.report import page, pictures
from dit_jax.runtime.console import say


def write(run: Run, ema_params: Any, constants: Any, workdir: Path, step: int) -> Path | None:
    """Writes the pictures and the page; returns the page's path, or None if it could not be written.

    An error is printed and never raised: the run is finished without its page. Call it on the first process.
    """
    if run.task.draws_samples and run.config.evaluation.num_images:
        _attempt("the picture of the denoising", lambda: pictures.write_denoising(run, ema_params, constants, workdir, step))
        _attempt("the picture of real images", lambda: pictures.write_real(run, workdir, run.config.evaluation.num_images))
    return _attempt("the report", lambda: page.write(workdir))


def _attempt(what: str, write: Callable[[], Path]) -> Path | None:
    try:
        return write()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300] or type(error).__name__
        say(f"{what} is left out: {said} ({Path(where.filename).name}:{where.lineno})")
        return None
