"""Writes scripts that launch the runs on other machines with the scripts of launch/, one command per run.

    slurm    array.sbatch, one task per run, each as in launch/slurm.sbatch
    gke      gke.sh, one JobSet per run with launch/gke.sh
    tpu_vm   tpu_vm.sh, one slice per run with launch/tpu_vm.sh, sequentially

Start all of them from the repository. Starting the same script again resumes every run; a newly written script omits finished
runs.
"""

import hashlib
import re
import shlex
from pathlib import Path

from dit_jax.errors import UserError
from dit_jax.storage.atomic import write_atomic
from dit_jax.sweep.grid import Run
from dit_jax.sweep.local import main_command

KINDS = ("slurm", "gke", "tpu_vm")
LAUNCH = Path("launch")
TAKEN = ("--name", "--array")


def write(kind: str, title: str, runs: list[Run], folder: Path, workdir: str, arguments: list[str]) -> tuple[Path, str]:
    """Writes <folder>/launch/<script>; returns its path and the command that starts it.

    Args:
        workdir: path of the sweep's folder on the machines.
        arguments: options of sbatch, launch/gke.sh or launch/tpu_vm.sh for every run, except --name and --array.

    Raises:
        UserError: there are no runs, launch/ does not exist here, or the sweep itself sets an option.
    """
    if not runs:
        raise UserError("every run is finished: there is nothing to launch; --report collects the results")
    template = LAUNCH / {"slurm": "slurm.sbatch", "gke": "gke.sh", "tpu_vm": "tpu_vm.sh"}[kind]
    if not template.is_file():
        raise UserError(f"{template} does not exist in {Path.cwd()}; start from the repository's folder")
    if own := [text for text in arguments if text.partition("=")[0] in TAKEN]:
        raise UserError(f"--launch_args has {' '.join(own)}, which the sweep sets for each run; omit it")
    commands = [["python", *main_command(run, f"{workdir.rstrip('/')}/runs/{run.name}")] for run in runs]
    if kind == "slurm":
        name, text = "array.sbatch", _array(template, commands)
        start = ["sbatch", f"--array=0-{len(runs) - 1}", *arguments]
    else:
        name, text = f"{kind}.sh", _script(template, title, runs, commands, arguments)
        start = ["bash"]
    script = folder / "launch" / name
    write_atomic(script, text)
    return script, shlex.join([*start, str(script)])


def _array(template: Path, commands: list[list[str]]) -> str:
    directives = [line for line in template.read_text().splitlines() if line.startswith("#SBATCH ")]
    # The arguments of launch/slurm.sbatch are those of dit_jax.main.
    cases = [f"    {i}) set -- {shlex.join(command[3:])} ;;" for i, command in enumerate(commands)]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by dit_jax.sweep: {len(commands)} runs, one per task of the array. Submit from the repository.",
            *directives,
            "set -euo pipefail",
            "case ${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array=0-" + f"{len(commands) - 1}}} in",
            *cases,
            '    *) echo "no run has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
            "esac",
            f'exec bash {shlex.quote(str(template))} "$@"',
            "",
        ]
    )


def _script(template: Path, title: str, runs: list[Run], commands: list[list[str]], arguments: list[str]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# Written by dit_jax.sweep: {len(runs)} runs, one command each. Start from the repository.",
        "set -uo pipefail",
        "failed=0",
    ]
    for name, command in zip(job_names(title, [run.name for run in runs]), commands, strict=True):
        lines.append(shlex.join(["bash", str(template), f"--name={name}", *arguments, "--", *command]) + " || failed=$?")
    return "\n".join([*lines, 'exit "$failed"', ""])


def job_names(title: str, names: list[str]) -> list[str]:
    """Unique names that Kubernetes and Cloud TPU accept: at most 40 lower-case letters, digits and -.

    They do not change when other runs finish or are added. A long name keeps its first and last letters (the seed is at the end)
    and gets a hash, which makes it unique.
    """

    def plain(text):
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    jobs = []
    for name in names:
        code = hashlib.sha256(f"{title}/{name}".encode()).hexdigest()[:6]
        text = plain(name)
        text = text if len(text) <= 27 else f"{text[:12].strip('-')}-{text[-14:].strip('-')}"
        jobs.append(f"sweep-{text}-{code}")
    return jobs
