"""Lists the verbs and the configs, one line each.

python -m dit_jax
"""

import ast
import sys
from pathlib import Path

from dit_jax import config_file
from dit_jax.errors import nearest
from dit_jax.runtime.command_line import print_page

FOLDER = Path(__file__).parent
ORDER = ("main", "sample", "demo", "evaluate", "report", "sweep", "plan", "benchmark", "encode", "prepare", "convert")
OTHER_NAMES = {"train": "main", "generate": "sample", "score": "evaluate", "fid": "evaluate"}


def verbs() -> dict[str, str]:
    """{name of a verb: the first line of its help}, training first. The verbs are not imported."""
    files = {path.parent.name: path for path in FOLDER.glob("*/__main__.py")} | {"main": FOLDER / "main.py"}
    names = sorted(files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: _first_line(files[name]) for name in names}


def configs(folder: str = "") -> dict[str, str]:
    """{name of a config, or of a sweep in the folder "sweeps": the first line of its docstring}."""
    return {name: _first_line(file) for name, file in config_file.known(folder).items()}


def _first_line(file: Path) -> str:
    try:
        return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
    except SyntaxError as error:
        return f"cannot be read: line {error.lineno}: {error.msg}"


def _listed(lines: dict[str, str]) -> list[str]:
    width = max(map(len, lines), default=0) + 2
    return [f"  {name:{width}}{line}" for name, line in lines.items()]


def main(arguments: list[str]) -> int:
    """Prints the lists; returns the exit status, 2 if there are arguments."""
    if arguments and arguments[0] not in ("--help", "-h", "-help", "--helpshort"):
        verb = OTHER_NAMES.get(arguments[0]) or nearest(arguments[0], list(verbs()))
        meant = f"; write python -m dit_jax.{verb} and then the flags" if verb else ""
        print(f"error: python -m dit_jax takes no arguments{meant}\nThe verbs are {', '.join(verbs())}.", file=sys.stderr)
        return 2
    lines = ["Diffusion Transformers in JAX and Flax.", "", "    python -m dit_jax.main --config=digits --workdir=runs/digits"]
    lines += ["", "Verbs, each started as python -m dit_jax.<verb>; --help explains it:", *_listed(verbs())]
    for title, folder in (("Configs, for --config=<name>", ""), ("Sweeps, for dit_jax.sweep --sweep=<name>", "sweeps")):
        if found := configs(folder):
            lines += ["", f"{title}:", *_listed(found)]
    print_page("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
