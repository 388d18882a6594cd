"""Trains the digits with every block kind and both processes, samples with every sampler, and prints a table of scores.

    python -m dit_jax.benchmark.digits_table --workdir=runs/table

Takes half an hour on two cores. Finished parts are not repeated; the table is written to <workdir>/table.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dit_jax.storage.atomic import write_atomic

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
SAMPLERS = {
    "gaussian": ("ddpm", "ddim", "euler", "heun", "ab", "dpmpp", "unipc"),
    "flow": ("euler", "heun", "ab", "dopri5", "sde", "dpmpp", "unipc"),
}


def verb(name: str, *args) -> dict:
    """Runs a verb and returns the last line of its output."""
    command = [sys.executable, "-m", f"dit_jax.{name}", *map(str, args)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def train(workdir: Path, process: str, conditioning: str, num_steps: int) -> Path:
    run = workdir / f"{process}_{conditioning}"
    verb(
        "main",
        f"--config=configs/digits.py:process={process},conditioning={conditioning}",
        f"--workdir={run}",
        f"--config.num_steps={num_steps}",
        f"--config.optimizer.decay_steps={num_steps}",
        "--config.preview.every_steps=0",
        "--config.evaluation.num_images=0",
    )
    return run


def score(run: Path, sampler: str) -> dict:
    """{"fid", "evaluations", "seconds"} of 1,000 samples without guidance; read from disk if they exist."""
    file = run / f"{sampler}.json"
    if not file.exists():
        drawn = verb("sample", f"--workdir={run}", f"--sampler={sampler}", "--num_samples=1000", f"--out={run / sampler}.npz")
        scored = verb("evaluate", f"--samples={run / sampler}.npz", "--reference=digits", "--features=pixels")
        write_atomic(file, json.dumps({"fid": scored["fid"], "evaluations": drawn["evaluations"], "seconds": drawn["seconds"]}))
    return json.loads(file.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1500, help="training steps of each run")
    options = parser.parse_args()
    combinations = [("gaussian", c, "ddpm") for c in CONDITIONINGS]
    combinations += [("gaussian", "adaln_zero", s) for s in SAMPLERS["gaussian"] if s != "ddpm"]
    combinations += [("flow", "adaln_zero", s) for s in SAMPLERS["flow"]]
    lines = ["| process | conditioning | sampler | evaluations | Fréchet distance (pixels) |", "|---|---|---|---|---|"]
    for process, conditioning, sampler in combinations:
        scored = score(train(options.workdir, process, conditioning, options.num_steps), sampler)
        count = scored["evaluations"] or "adaptive"
        lines.append(f"| {process} | {conditioning} | {sampler} | {count} | {scored['fid']:.2f} |")
        write_atomic(options.workdir / "table.md", "\n".join(lines) + "\n")
    print((options.workdir / "table.md").read_text())


if __name__ == "__main__":
    main()
