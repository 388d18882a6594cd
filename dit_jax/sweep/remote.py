"""Launch commands for machines elsewhere: one per run, through the scripts of launch/.

    slurm    array.sbatch, one task per run, each as launch/slurm.sbatch would run it
    gke      gke.sh, one JobSet per run through launch/gke.sh
    tpu_vm   tpu_vm.sh, one slice per run through launch/tpu_vm.sh, one after another

All are started from the repository. The same script again goes on where each run stands; written anew, it leaves out what is
done.
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
    """Writes <folder>/launch/<script>; returns it and the command that starts it.

    Args:
        workdir: the sweep's folder as the machines see it.
        arguments: options of sbatch, launch/gke.sh or launch/tpu_vm.sh for every run; not their --name or --array.

    Raises:
        UserError: no runs, launch/ is not here, an option that the sweep sets itself.
    """
    if not runs:
        raise UserError("every run is finished: there is nothing to launch; --report collects the results")
    template = LAUNCH / {"slurm": "slurm.sbatch", "gke": "gke.sh", "tpu_vm": "tpu_vm.sh"}[kind]
    if not template.is_file():
        raise UserError(f"{template} is not below {Path.cwd()}; start from the repository's folder")
    if own := [text for text in arguments if text.partition("=")[0] in TAKEN]:
        raise UserError(f"--launch_args has {' '.join(own)}, which the sweep sets for each run; leave it out")
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
    # launch/slurm.sbatch takes the arguments of dit_jax.main.
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
    """Names that Kubernetes and Cloud TPU take: at most 40 lower-case letters, digits and -, different for every run.

    They stay the same when other runs are done or added. Of a long name the first and last letters are kept, as the seed is at
    the end, and a hash tells apart what is equal in these.
    """

    def plain(text):
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    found = []
    for name in names:
        code = hashlib.sha256(f"{title}/{name}".encode()).hexdigest()[:6]
        text = plain(name)
        text = text if len(text) <= 27 else f"{text[:12].strip('-')}-{text[-14:].strip('-')}"
        found.append(f"sweep-{text}-{code}")
    return found
