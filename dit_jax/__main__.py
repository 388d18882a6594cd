"""Lists the verbs, one line each.

python -m dit_jax
"""

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
ORDER = ("main", "sample", "evaluate", "report", "sweep", "plan", "benchmark", "encode", "prepare", "convert")


def verbs() -> dict[str, str]:
    """{name of a verb: the first line of its help}, training first. Nothing is imported."""
    files = {path.parent.name: path for path in FOLDER.glob("*/__main__.py")} | {"main": FOLDER / "main.py"}
    names = sorted(files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: (ast.get_docstring(ast.parse(files[name].read_text())) or "").partition("\n")[0] for name in names}


if __name__ == "__main__":
    print("usage: python -m dit_jax.<verb> --help\n")
    for name, line in verbs().items():
        print(f"  {name:10} {line}")
