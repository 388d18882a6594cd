"""Checks all runs of a sweep before the first one starts."""

import json
from collections.abc import Callable, Sequence

import jax
import ml_collections

from dit_jax import build, recipes
from dit_jax.errors import UserError
from dit_jax.sweep.grid import Run
from dit_jax.training.results import check_results

LINES_SHOWN = 12


def check(runs: list[Run], samplers: Sequence[tuple[str, int | None]], where: str):
    """Builds the objects of every run without arrays.

    Args:
        where: "local" (the runs start on this machine) also opens each data set, reads each codec's weights, and looks for
            references; "remote" checks that their paths are given; "list" checks neither.

    Raises:
        UserError: lists all problems, each with the affected runs.
    """
    problems: dict[str, list[str]] = {}
    steps: list[Callable] = [_objects, lambda config: _samplers(config, samplers)]
    steps += {"local": [_shown, _once(_files)], "remote": [_paths_given], "list": []}[where]
    for run in runs:
        try:
            for step in steps:
                step(run.config)
        except (UserError, ValueError, TypeError) as error:
            problems.setdefault(str(error), []).append(run.name)
    if problems:
        lines = [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {message}"
            for message, names in problems.items()
        ]
        more = [f"and {len(lines) - LINES_SHOWN} more"] if len(lines) > LINES_SHOWN else []
        wrong = sum(map(len, problems.values()))
        text = "\n  ".join(lines[:LINES_SHOWN] + more)
        raise UserError(f"{wrong} of {len(runs)} runs cannot start, so nothing was started:\n  {text}")


def _objects(config):
    run = build.Run(config)
    jax.eval_shape(run.task.init, jax.random.key(0))
    if run.task.draws_samples:
        run.sampler, run.guidance


def with_sampler(config, name: str, num_steps: int | None) -> ml_collections.ConfigDict:
    """Returns the config with another sampler, which gets default fields unless it is the config's own.

    Raises:
        UserError: the sampler is unknown, or the number of steps does not fit it.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if name != config.sampler.name:
            config.sampler = ml_collections.ConfigDict(recipes.default_sampler(name))
        if (num_steps is None) != ("num_steps" not in config.sampler):
            raise UserError(
                f"samplers has ({name!r}, {num_steps}); "
                + ("give its steps" if num_steps is None else f"{name} chooses its own steps: write ({name!r}, None)")
            )
        if num_steps is not None:
            config.sampler.num_steps = num_steps
    return config


def _samplers(config, samplers):
    if not samplers:
        return
    if not build.Run(config).task.draws_samples:
        raise UserError("samplers are set, but an autoencoder does not sample; leave samplers empty")
    if not config.evaluation.num_images or not config.evaluation.reference:
        raise UserError(
            "samplers are set, but the config does not define the score: set evaluation.num_images and "
            "evaluation.reference, or leave samplers empty"
        )
    for name, num_steps in samplers:
        build.Run(with_sampler(config, name, num_steps)).sampler


def _shown(config):
    check_results(build.Run(config))


def _files(config):
    one_device = config.copy_and_resolve_references()
    with one_device.unlocked():
        one_device.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})
    build.Run(one_device, devices=jax.devices()[:1]).with_codec_weights().loader


def _paths_given(config):
    for section, name in (("data", "the data set"), ("codec", "the codec's weights")):
        needs = config[section].name in ("folder", "tfds", "tars", "latents") if section == "data" else "path" in config.codec
        if needs and not config[section].path:
            raise UserError(f"{section}.path is empty; give --config.{section}.path=<path of {name} on the machines>")


def _once(step: Callable) -> Callable:
    """Wraps a step so that it runs once for configs with equal sections, because opening a data set takes time."""
    outcomes: dict[str, str | None] = {}

    def run(config):
        sections = {key: config[key].to_dict() for key in ("task", "data", "transform", "loader", "codec")}
        key = json.dumps(
            [sections, config.batch_size, config.microbatches, config.get("model", {}).get("num_classes")],
            sort_keys=True,
            default=str,
        )
        if key not in outcomes:
            try:
                step(config)
                outcomes[key] = None
            except UserError as error:
                outcomes[key] = str(error)
        if outcomes[key]:
            raise UserError(outcomes[key])

    return run
