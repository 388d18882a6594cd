"""Scores finished runs with other samplers and numbers of steps: quality against sampling compute."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dit_jax.runtime.console import say
from dit_jax.sweep.folder import Folder, write_json
from dit_jax.sweep.grid import Run
from dit_jax.sweep.local import Child, last_lines


def name_of(sampler: str, num_steps: int | None) -> str:
    return sampler if num_steps is None else f"{sampler}-{num_steps}"


def file_of(folder: Folder, run: Run, sampler: str, num_steps: int | None) -> Path:
    return folder.of(run) / "samplers" / f"{name_of(sampler, num_steps)}.json"


def score_all(
    runs: list[Run], samplers: Sequence[tuple[str, int | None]], folder: Folder, child: Child, own: Sequence[Run] | None = None
) -> list[str]:
    """Scores the first seed of every model with every sampler without a score; returns the failures as "run sampler".

    own: those of a part; it scores no others.

    Number of images, reference and features are those of config.evaluation. Images are deleted once their score is on disk; the
    grid of the first 100 and the evaluator's result, <sampler>.evaluation.json, are kept.
    """
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.group, run)
    names = {run.name for run in (runs if own is None else own)}
    first = {group: run for group, run in first.items() if run.name in names}
    for scored in (file_of(folder, run, *sampler) for run in first.values() for sampler in samplers):
        if scored.exists():  # of a sweep that was killed before it deleted them
            scored.with_suffix(".npz").unlink(missing_ok=True)
    finished = [run for run in first.values() if folder.state(run) == "done"]
    waiting = [(run, *sampler) for run in finished for sampler in samplers if not file_of(folder, run, *sampler).exists()]
    failed = []
    for i, (run, sampler, num_steps) in enumerate(waiting):
        if child.stopping:
            break
        name = name_of(sampler, num_steps)
        say(f"sampling {i + 1} of {len(waiting)}: {run.name} with {name}")
        if not score(run, sampler, num_steps, folder, child) and not child.stopping:
            failed.append(f"{run.name} {name}")
            say(f"{run.name} with {name} FAILED; the sweep continues. Its last lines:")
            for line in last_lines(folder.of(run) / "samplers" / f"{name}.log"):
                say(f"    {line}")
    return failed


def score(run: Run, sampler: str, num_steps: int | None, folder: Folder, child: Child) -> bool:
    """Draws and scores samples; returns whether it succeeded."""
    file, wanted = file_of(folder, run, sampler, num_steps), run.config.evaluation
    images, log = file.with_suffix(".npz"), file.with_suffix(".log")
    python, steps = [sys.executable, "-m"], [] if num_steps is None else [f"--num_steps={num_steps}"]
    status, last, _ = child.run(
        [
            *python,
            "dit_jax.sample",
            *run.imports,
            f"--workdir={folder.of(run)}",
            f"--sampler={sampler}",
            *steps,
            f"--num_samples={wanted.num_images}",
            f"--batch_size={wanted.batch_size}",
            f"--out={images}",
        ],
        log,
    )
    if status:
        return False
    drawn = json.loads(last)
    weights = [f"--weights={wanted.weights}"] if wanted.get("weights") else []
    status, last, _ = child.run(
        [
            *python,
            "dit_jax.evaluate",
            *run.imports,
            f"--samples={images}",
            f"--reference={wanted.reference}",
            f"--features={wanted.features}",
            *weights,
            "--metrics=fid",
            f"--out={file.with_suffix('.evaluation.json')}",
        ],
        log,
    )
    if status:
        return False
    write_json(
        file,
        {
            "sampler": sampler,
            "num_steps": num_steps,
            "evaluations": drawn["evaluations"],
            "seconds": drawn["seconds"],
            "fid": json.loads(last)["fid"],
        },
    )
    images.unlink()
    return True
