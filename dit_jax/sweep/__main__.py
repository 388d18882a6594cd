"""Trains a grid of models and reports on them: quality against GFLOPs, training compute and sampling compute.

    python -m dit_jax.sweep --sweep=digits --workdir=runs/sweep
    python -m dit_jax.sweep --sweep=gflops_imagenet256 --list --chip=v5p --mfu=0.4
    python -m dit_jax.sweep --sweep=gflops_imagenet256 --workdir=runs/twelve --config.data.path=/gcs/tfds ... \\
        --launch=gke --remote_workdir=/gcs/twelve --launch_args='--image=I --bucket=B --accelerator=tpu-v6e-slice --topology=4x4'
    python -m dit_jax.sweep --sweep=digits --workdir=runs/sweep --report
    python -m dit_jax.sweep --sweep=backbones:photos=/data/photographs --workdir=runs/backbones_photos

The sweep file defines the config, its variants, the grid and the seeds (`dit_jax/sweep/grid.py`). --config.<path>=<value> sets a
field of all runs. The command lists the runs with their cost and checks all of them before the first one starts. It then runs
them here sequentially, each in <workdir>/runs/<name>; with --launch=slurm|gke|tpu_vm it writes commands that run them elsewhere.
The same command again resumes: finished runs are kept, stopped and failed runs continue. Ctrl-C saves and stops. At the end, or
with --report at any time, it writes results.json, results.csv, report.html and figures/ to the workdir.

Exit status: 0 if all runs are done, 1 if some failed, 75 if stopped early with everything saved, 2 for a user's mistake.
"""

import dataclasses
import json
import shlex
import sys

import jax
from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console, job_array

command_line.group("The sweep")
SWEEP = flags.DEFINE_string(
    "sweep", None, "Name of a sweep in ./configs/sweeps or installed with dit_jax, or a file; after a colon, its argument."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
FIELDS = config_file.define_fields()
LIST = flags.DEFINE_bool("list", False, "Show and check the runs, start nothing.")
REPORT = flags.DEFINE_bool("report", False, "Collect what is there and write the report, start nothing.")
command_line.group("Run elsewhere")
PART = flags.DEFINE_string("part", None, job_array.HELP)
LAUNCH = flags.DEFINE_enum(
    "launch", "local", ["local", "slurm", "gke", "tpu_vm"], "Run here, or write the commands that run elsewhere."
)
LAUNCH_ARGS = flags.DEFINE_string("launch_args", "", "Options of sbatch, launch/gke.sh or launch/tpu_vm.sh for every run.")
REMOTE_WORKDIR = flags.DEFINE_string("remote_workdir", None, "--workdir as the launched machines see it, if by another path.")
command_line.group("Estimate of device hours")
CHIP = flags.DEFINE_string("chip", None, "Estimate device hours on this chip (v4, v5e, v5p, v6e, h100, h200) at --mfu.")
MFU = flags.DEFINE_float("mfu", 0.4, "Assumed share of the chip's dense bfloat16 peak; small models reach less.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Estimate device hours by the roofline of dit_jax.plan, as in v5p:4x4x4; compiles every run's step."
)
BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Estimate device hours from results of dit_jax.benchmark --what=train_step.")


def check_flags():
    """Raises UserError if a flag is missing or has no effect."""
    if SWEEP.value is None:
        raise UserError("give --sweep=<name or file>, such as --sweep=digits, and --workdir=<folder>")
    if WORKDIR.value is None and not LIST.value:
        raise UserError("give --workdir=<folder of the sweep>; only --list does not need it")
    if LIST.value and REPORT.value:
        raise UserError("--list and --report are both given; give one of them")
    if sum(map(bool, (CHIP.value, TOPOLOGY.value, BENCHMARKS.value))) > 1:
        raise UserError("--chip, --topology and --benchmarks are three ways to estimate; give one of them")
    if flags.FLAGS["mfu"].present and not CHIP.value:
        raise UserError("--mfu has no effect without --chip")
    if LAUNCH.value != "local" and (LIST.value or REPORT.value):
        raise UserError(f"--launch={LAUNCH.value} writes commands, which --list and --report do not; omit one of them")
    if PART.value is not None and (LIST.value or REPORT.value or LAUNCH.value != "local"):
        raise UserError(f"--part={PART.value} trains runs here, which --list, --report and --launch do not; omit one of them")
    if LAUNCH.value == "local" and (LAUNCH_ARGS.value or REMOTE_WORKDIR.value):
        raise UserError("--launch_args and --remote_workdir are for --launch=slurm, gke or tpu_vm")


def estimate(runs, costs) -> tuple[list, str]:
    """Adds device hours to the costs; returns (costs, assumptions of the estimate)."""
    from dit_jax.programs import topology
    from dit_jax.sweep import cost

    hours: list[float | None]
    if CHIP.value:
        hours = [cost.assumed_hours(c, CHIP.value, MFU.value) for c in costs]
        text = f"{CHIP.value} at an assumed MFU of {MFU.value:.0%} of the dense bfloat16 peak"
    elif TOPOLOGY.value:
        place = topology.find(TOPOLOGY.value)
        hours = [cost.planned_hours(run, place) for run in runs]
        text = f"{place.name}, step time of the compiled program by the roofline of dit_jax.plan (an estimate, not a measurement)"
    elif BENCHMARKS.value:
        measured = cost.read_benchmarks(BENCHMARKS.value)
        hours = [cost.measured_hours(run, c, measured) for run, c in zip(runs, costs, strict=True)]
        devices = ", ".join(sorted({str(x.get("device", "unknown device")) for x in measured}))
        text = f"measured images/s of the same network and batch size on {devices}, from {', '.join(BENCHMARKS.value)}"
    else:
        return costs, ""
    return [dataclasses.replace(c, device_hours=h) for c, h in zip(costs, hours, strict=True)], text


def launch_elsewhere(sweep, runs, folder) -> dict:
    from dit_jax.sweep import remote

    waiting = [run for run in runs if folder.state(run) != "done"]
    begun = [run.name for run in waiting if folder.state(run) == "begun"]
    script, command = remote.write(
        LAUNCH.value, sweep.title, waiting, folder.path, REMOTE_WORKDIR.value or str(folder.path), shlex.split(LAUNCH_ARGS.value)
    )
    console.say(
        f"wrote {len(waiting)} runs to {script}. Check it, then start it from the repository:\n  {command}\n"
        "When they are done, "
        + (f"copy or mount {REMOTE_WORKDIR.value}/runs as {folder.path / 'runs'}, then " if REMOTE_WORKDIR.value else "")
        + "the same command with --report in place of the --launch options collects the results"
    )
    if begun:
        console.say(
            f"{len(begun)} of them were started before ({', '.join(begun[:3])}{', ...' * (len(begun) > 3)}): start the script "
            "only if none is still running, because two processes must not train in one folder"
        )
    return {"runs": len(runs), "waiting": len(waiting), "script": str(script), "command": command, "report": None}


def run_here(sweep, runs, costs, folder, numbers: range) -> tuple[list[str], bool]:
    """Runs these of the sweep's runs on this machine; returns (names of failed runs, whether it was stopped early)."""
    from dit_jax.sweep.local import Child, train_all
    from dit_jax.sweep.scores import score_all

    with Child(folder.lock) as child:
        own = [runs[k] for k in numbers]
        failed = train_all(own, [costs[k] for k in numbers], folder, child)
        if not child.stopping:
            failed += score_all(runs, sweep.samplers, folder, child, own)
    return failed, child.stopping


def run_part(sweep, runs, costs, folder, mine) -> dict:
    """Runs a part of the sweep on this machine; exits with status 1 if runs failed."""
    own = mine.of(len(runs))
    console.say(f"part {mine}: {len(own)} of {len(runs)} runs")
    failed, stopped = run_here(sweep, runs, costs, folder, own)
    done = sum(folder.state(runs[k]) == "done" for k in own)
    result = {
        "part": str(mine),
        "runs": len(own),
        "done": done,
        "failed": failed,
        "stopped": stopped,
        "workdir": str(folder.path),
    }
    if failed and not stopped:
        console.say(f"{len(failed)} failed: {', '.join(failed)}; run the same command to try them again")
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


def main() -> dict:
    check_flags()
    assert SWEEP.value is not None  # see `check_flags`
    # The runs need the accelerator, so this process, which only counts and waits, must not use it.
    jax.config.update("jax_platforms", "cpu")
    from dit_jax.sweep import checks, cost, grid, report
    from dit_jax.sweep.folder import Folder

    name, colon, argument = SWEEP.value.partition(":")
    file = str(grid.find(name))
    sweep = grid.load(file + colon + argument)
    runs = grid.expand(sweep, [f"--config.{text}" for text in FIELDS.value])
    starts_here = LAUNCH.value == "local" and not (LIST.value or REPORT.value)
    if not LIST.value:
        report.check_possible(sweep, file)
    if not REPORT.value:
        checks.check(runs, sweep.samplers, "list" if LIST.value else "local" if starts_here else "remote")
    costs, assumption = estimate(runs, [cost.count(run) for run in runs])
    mine = job_array.parse_part(PART.value)
    folder = Folder(WORKDIR.value, sweep.title, mine) if WORKDIR.value else None
    if LIST.value:
        states = [folder.state(run) if folder else "new" for run in runs]
        for line in cost.table(runs, costs, states, assumption):
            console.say(line)
        rows = [
            {"name": run.name, "state": state, **dataclasses.asdict(c), "command": ["dit_jax.main", *run.flags]}
            for run, c, state in zip(runs, costs, states, strict=True)
        ]
        return {"runs": rows, "compute_gmacs": sum(c.compute_gmacs for c in costs), "device_hours_assume": assumption or None}

    assert folder is not None  # only --list needs no --workdir
    with folder:
        folder.check_configs(runs)
        if others := folder.strangers(runs):
            console.say(f"{len(others)} runs in {folder.path} are not in this grid and are ignored: {', '.join(others[:8])}")
        folder.record(runs)
        for line in cost.table(runs, costs, [folder.state(run) for run in runs], assumption):
            console.say(line)
        if LAUNCH.value != "local" and not REPORT.value:
            return launch_elsewhere(sweep, runs, folder)
        if mine is not None:
            return run_part(sweep, runs, costs, folder, mine)
        if starts_here:
            folder.check_parts(runs)
        failed, stopped = ([], False) if REPORT.value else run_here(sweep, runs, costs, folder, range(len(runs)))
        command = shlex.join(["python", "-m", "dit_jax.sweep", *sys.argv[1:]])
        written = report.write(sweep, file, runs, costs, folder, command)
        result = {
            "runs": len(runs),
            "done": written.done,
            "failed": failed,
            "stopped": stopped,
            "workdir": str(folder.path),
            **written.files,
        }
    if failed and not stopped:
        console.say(f"{len(failed)} failed: {', '.join(failed)}; run the same command to try them again")
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


if __name__ == "__main__":
    console.run(main)
