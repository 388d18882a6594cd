"""Measures the time from process start to the first finished training step, with an empty and a filled compilation cache."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.runtime.console import say

# The child's output after its first step: `network.FIRST_STEP`, or the training loop's first line of progress.
FIRST_STEP = re.compile(r"^first step finished|^step 1/")


def child(config: str | None, fields: Sequence[str], model_flags: list[str], workdir: Path) -> list[str]:
    """Command of a training process: `dit_jax.main` with its data set for a config, otherwise this benchmark's step."""
    if config is None:
        return [sys.executable, "-m", "dit_jax.benchmark", "--what=train_step", "--seconds=0", *model_flags]
    # Two steps, because the loop reports a step while the next one runs; only steps and the final checkpoint.
    forced = {"num_steps": 2, "log.every_steps": 1, "preview.every_steps": 0, "evaluation.num_images": 0}
    given = [f"--config.{text}" for text in (*fields, *(f"{name}={value}" for name, value in forced.items()))]
    return [sys.executable, "-m", "dit_jax.main", *user_code.flags(), f"--config={config}", f"--workdir={workdir}", *given]


def run(config: str | None, fields: Sequence[str], model_flags: list[str]) -> dict:
    """Seconds to the first step of two sequential processes; the second one reads the first one's compiled programs.

    Both read modules from the page cache, because this process has read them.

    Raises:
        UserError: a child ended before its first step; contains its last output.
    """
    result = {}
    with tempfile.TemporaryDirectory(prefix="dit_jax_startup_") as folder:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("cold", "cached"):
            command = child(config, fields, model_flags, Path(folder) / name)
            result[f"{name}_seconds"] = _seconds_to_first_step(command, environment)
            say(f"{name}: {result[f'{name}_seconds']:.1f} s to the first step")
        sizes = [p.stat().st_size for p in (Path(folder) / "cache").rglob("*") if p.is_file()]
    return {**result, "cache_files": len(sizes), "cache_bytes": sum(sizes), "command": command[1:]}


def _seconds_to_first_step(command: list[str], environment: dict) -> float:
    start, first, lines = time.perf_counter(), None, []
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None  # a pipe
        for line in process.stderr:
            lines.append(line)
            if first is None and FIRST_STEP.search(line):
                first = time.perf_counter() - start
    if first is None or process.returncode:
        raise UserError(
            f"the timed process ended with status {process.returncode}: {''.join(lines[-3:]).strip().removeprefix('error: ')}"
        )
    return first
