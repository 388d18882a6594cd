"""Writes report.html into the folder of a run: its curves, scores, pictures, config and machine on one page.

    python -m dit_jax.report --workdir=runs/digits

A run writes it at its end. The page needs no other file, font or script, and may be written while the run is training.
"""

from absl import flags

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console
from dit_jax.storage.paths import local_path

command_line.group("The run")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of dit_jax.main.")


def main() -> dict:
    if WORKDIR.value is None:
        raise UserError("give --workdir=<folder of a run of dit_jax.main>")
    from dit_jax.report import page

    return {"report": str(page.write(local_path(WORKDIR.value).absolute()))}


if __name__ == "__main__":
    console.run(main)
