"""Draws with a cascade: a first network, and super-resolution stages that each start from the samples before."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.sample.jobs.upsample import Upsample
from dit_jax.storage.paths import local_path


def paths_of(out: str | os.PathLike, stages: int) -> list[Path]:
    """Where each stage writes: x.stage1.npz, x.stage2.npz, ..., and `out`, x.npz, of the last.

    Raises:
        UserError: `out` is not an .npz, which the next stage reads.
    """
    out = local_path(out).absolute()
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: a cascade writes an .npz, which its next stage reads; give a name that ends in .npz")
    return [*(out.with_name(f"{out.stem}.stage{i}.npz") for i in range(1, stages)), out]


def write_stages(
    opened: Callable[[str], Any],
    sources: Sequence[str],
    out: str | os.PathLike,
    labels: Any,
    noise_level: float | None,
    **options: Any,
) -> dict[str, Any]:
    """Draws with each stage in turn; the same call continues an interrupted one, because every stage does.

    Args:
        opened: makes the `Pipeline` of a source.
        sources: runs or files of weights: the first network, then its super-resolution stages.
        labels, options: as of `Pipeline.write`, the same for every stage; a stage without labels ignores them.
        noise_level: of `Upsample`.

    Returns:
        What `Pipeline.write` of the last stage returns, with "stages", what those before returned.

    Raises:
        UserError: a stage is not what its place needs; as `Pipeline.write`.
    """
    if len(sources) < 2:
        raise UserError(f"--stages={','.join(sources)}: give two or more, the first network and its super-resolution stages")
    done: list[dict[str, Any]] = []
    for number, (source, path) in enumerate(zip(sources, paths_of(out, len(sources)), strict=True), start=1):
        pipe, first = opened(source), number == 1
        upsamples = getattr(pipe.run.task, "low_resolution", None) is not None
        if upsamples == first:
            what = "a super-resolution stage, which comes after another" if first else "no super-resolution stage"
            raise UserError(f"stage {number}, {source}, is {what}; give the first network, and then its stages in order")
        say(f"stage {number} of {len(sources)}: {source}")
        job = None if first else Upsample(done[-1]["out"], noise_level)
        chosen = labels if pipe.num_classes else None
        own = {name: value for name, value in options.items() if pipe.takes_text or name not in ("prompt", "negative_prompt")}
        done.append(pipe.write(path, chosen, job=job, **own))
        if done[-1]["stopped"]:
            break
    return {**done[-1], "stages": done[:-1]}
