"""The cost of the runs of a sweep: exact compute and estimated device hours.

GMACs are multiply-adds of one forward pass of one image, which the paper calls Gflops. Training compute is GMACs x batch size x
steps x 3, because a backward pass costs two forward passes (Peebles & Xie 2023, section 5, figure 9).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.programs import chips
from dit_jax.runtime.console import say
from dit_jax.storage.bounded import parsed
from dit_jax.storage.paths import local_path
from dit_jax.sweep.grid import Run
from dit_jax.tasks.state import count_parameters

FORWARDS_PER_STEP = 3


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Fields:
        gmacs: of one forward pass of one image, without a frozen codec.
        compute_gmacs: of the complete training.
        device_hours: of training only, without start-up, sampling and scoring; None without an estimate.
    """

    parameters: int
    gmacs: float
    compute_gmacs: float
    device_hours: float | None = None


def count(run: Run) -> Cost:
    """Counts the cost from shapes and architecture, without creating arrays."""
    config, task = run.config, build.Run(run.config).task
    gmacs = task.macs() / 1e9
    parameters = count_parameters(jax.eval_shape(task.init, jax.random.key(0)).params)
    return Cost(parameters, gmacs, gmacs * config.batch_size * config.num_steps * FORWARDS_PER_STEP)


def assumed_hours(cost: Cost, chip: str, mfu: float) -> float:
    """Device hours on one kind of chip at an assumed share of its dense bfloat16 peak.

    Raises:
        UserError: the chip is unknown, or mfu is outside (0, 1].
    """
    if chip not in chips.CHIPS:
        raise UserError(f"--chip={chip} is not in the table; choose one of {', '.join(chips.CHIPS)}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu} must lie in (0, 1], for example 0.4 for 40 %")
    peak_flops = chips.CHIPS[chip].peak_flops
    assert peak_flops is not None  # every chip of the table has one
    return 2e9 * cost.compute_gmacs / (peak_flops * mfu) / 3600


def planned_hours(run: Run, topology) -> float | None:
    """Device hours by the roofline of `dit_jax.plan`, which compiles the step.

    None if the run does not fit, or if the speed is meaningless (simulated devices).
    """
    from dit_jax.plan import estimate

    say(f"compiling {run.name} for {topology.name}")
    plan = estimate.plan_training(run.config, topology)
    if not plan["fits"]:
        say(f"{run.name} does not fit {topology.name}: {plan['bytes_per_device'] / 2**30:.1f} GiB per device")
    return _hours(run, plan["images_per_second"], plan["devices"]) if plan["images_per_second"] else None


def read_benchmarks(paths: Sequence[str]) -> list[dict]:
    """Reads results of `dit_jax.benchmark --what=train_step`: the last line of each file, or all lines of a .jsonl.

    Raises:
        UserError: a file cannot be read, or contains something else.
    """
    benchmarks = []
    for path in paths:
        try:
            lines = local_path(path).read_text().strip().splitlines()
            results = [parsed(line, path) for line in (lines if path.endswith(".jsonl") else lines[-1:])]
        except (OSError, ValueError) as error:
            raise UserError(
                f"--benchmarks: {path} cannot be read ({error}); give the last line of "
                "`dit_jax.benchmark --what=train_step`, saved to a file"
            ) from None
        needed = ("images_per_second", "flops_per_image", "batch_size", "num_devices")
        for result in results or [{}]:
            if missing := [key for key in needed if not (isinstance(result, dict) and result.get(key))]:
                raise UserError(
                    f"--benchmarks: {path} has no {', '.join(missing)}: it is not a result of "
                    "`dit_jax.benchmark --what=train_step`"
                )
        benchmarks += results
    return benchmarks


def measured_hours(run: Run, cost: Cost, benchmarks: list[dict]) -> float | None:
    """Device hours at the measured speed of the same network (GMACs within 0.1 %) and batch size; None if not measured."""
    for result in benchmarks:
        same = abs(result["flops_per_image"] / (2e9 * FORWARDS_PER_STEP * cost.gmacs) - 1) < 1e-3
        if same and result["batch_size"] == run.config.batch_size:
            return _hours(run, result["images_per_second"], result["num_devices"])
    return None


def _hours(run: Run, images_per_second: float, devices: int) -> float:
    return run.config.num_steps * run.config.batch_size / images_per_second * devices / 3600


def table(runs: list[Run], costs: list[Cost], states: list[str], assumption: str) -> list[str]:
    """Formats the runs with cost and state, the total, and the assumptions of the device hours (if there are any)."""
    width = max(len("name"), *(len(run.name) for run in runs))
    head = f"{'name':{width}}  {'parameters':>13}  {'GMACs':>9}  {'batch x steps':>15}  {'compute (GMACs)':>15}"
    lines = [head + ("  device hours" if assumption else "") + "  state"]
    for run, cost, state in zip(runs, costs, states, strict=True):
        work = f"{run.config.batch_size} x {run.config.num_steps}"
        hours = "" if not assumption else f"  {'unknown' if cost.device_hours is None else f'{cost.device_hours:.3g}':>12}"
        lines.append(
            f"{run.name:{width}}  {cost.parameters:13,}  {cost.gmacs:9.4g}  {work:>15}  {cost.compute_gmacs:15.3e}"
            f"{hours}  {state}"
        )
    total = f"{len(runs)} runs, {sum(cost.compute_gmacs for cost in costs):.3e} GMACs of training (GMACs x batch x steps x 3)"
    if assumption:
        known = [cost.device_hours for cost in costs if cost.device_hours is not None]
        total += f", {sum(known):.3g} device hours" + (f" of {len(known)} of them" if len(known) < len(runs) else "")
    return [
        *lines,
        total,
        *([f"device hours: {assumption}; start-up, sampling and scoring are not included"] if assumption else []),
    ]
