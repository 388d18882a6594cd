"""Python files and modules of the user: config files, and what --import names.

They are executed when a command line names them, never because a run folder or a weights file does.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from dit_jax import registry
from dit_jax.errors import UserError
from dit_jax.storage.paths import local_path

Result = TypeVar("Result")
LONGEST_MESSAGE = 200
OTHER_FIELDS = re.compile(r'\s*Other fields present: "\{.*\}"', re.DOTALL)  # ml_collections prints the config


class Import(NamedTuple):
    """Code that was imported.

    Fields:
        name: as the command line has it, a file or a module.
        sha256: of the file; of a package, of its __init__.py; "" where there is no file.
        registers: "<section>.<name>" of what it registered.
    """

    name: str
    sha256: str
    registers: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"name": self.name, "sha256": self.sha256, "registers": list(self.registers)}


_IMPORTS: list[Import] = []  # of --import, in order


def imports() -> list[Import]:
    """What --import has imported in this process."""
    return list(_IMPORTS)


def flags() -> list[str]:
    """The --import flags of this process, for a child."""
    return [f"--import={found.name}" for found in _IMPORTS]


def import_all(names: Iterable[str]) -> None:
    """Imports files (`my_net.py`) and modules (`my_package.nets`), once each; what they register is known afterwards.

    Raises:
        UserError: there is no such file or module; its code fails.
    """
    for name in names:
        if name in {found.name for found in _IMPORTS}:
            continue
        before = registry.entries()
        file = _import(name)
        added = [
            f"{section}.{key}" for (section, key), entry in registry.entries().items() if before.get((section, key)) != entry
        ]
        _IMPORTS.append(Import(name, file_sha256(file) if file else "", tuple(added)))


def _import(name: str) -> Path | None:
    """Imports a file or a module; returns the file."""
    if name.endswith(".py") or "/" in name:
        path = local_path(name)
        load_file(path, f"--import={name}")
        return path
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"--import={name}: there is no such module; give a file, as in --import={name}.py, or set PYTHONPATH")
    file = spec.origin if spec.has_location else None
    run(lambda: importlib.import_module(name), file or name)
    return Path(file) if file else None


def load_file(path: Path, what: str) -> ModuleType:
    """Executes a Python file and returns its module; executes it anew if it was loaded before.

    The module is in sys.modules, where dataclasses and pickle look for it, and is pickled by value, since no other process can
    import it by name: workers of the data loader get its classes.

    Args:
        what: the flag that names the file, for messages.

    Raises:
        UserError: there is no such file; its code fails.
    """
    if not path.is_file():
        raise UserError(f"{what}: {path} does not exist or is no file")
    name = f"dit_jax_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    execute = spec.loader.exec_module
    run(lambda: execute(module), str(path))
    with contextlib.suppress(ImportError):
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return module


def run(code: Callable[[], Result], file: str) -> Result:
    """code(), of a user's file.

    Raises:
        UserError: it fails; the message has the line of that file, what was raised, and no other frames.
    """
    try:
        return code()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_explain(error, file)) from error


def wrong_result(path: Path, function: Callable, result: Any, wanted: str) -> str:
    """The message about a function of the user's file that returns None or another type than it must, with its line."""
    hint = "; it has no return statement that is reached" if result is None else ""
    code = inspect.unwrap(function).__code__ if inspect.isfunction(inspect.unwrap(function)) else None
    place = f"{path}, line {code.co_firstlineno}" if code and _same_file(code.co_filename, str(path)) else str(path)
    found = "None" if result is None else f"a {type(result).__name__}"
    return f"{place}: {function.__name__}() returns {found}{hint}; it must return {wanted}"


def _explain(error: BaseException, file: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _same_file(frame.filename, file)]
    number, line = (frames[-1].lineno, frames[-1].line) if frames else (None, None)
    said = " ".join(OTHER_FIELDS.sub("", _message(error)).split())
    if isinstance(error, SyntaxError) and _same_file(error.filename or file, file):
        number, line, said = error.lineno, error.text, error.msg
    if len(said) > LONGEST_MESSAGE:
        said = f"{said[: LONGEST_MESSAGE // 2]} ... {said[-LONGEST_MESSAGE // 2 :]}"
    place = file if number is None else f"{file}, line {number}"
    return f"{place}: {type(error).__name__}: {said}" + (f"\n    {line.strip()}" if line else "")


def _message(error: BaseException) -> str:
    """str(error) without the quotes and escapes of a KeyError, also of one that another error wraps, as ml_collections does."""
    inner = error.args[0] if len(error.args) == 1 else None
    if isinstance(inner, BaseException):
        return _message(inner)
    return inner if isinstance(error, KeyError) and isinstance(inner, str) and " " in inner else str(error)


def _same_file(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expect(recorded: Iterable[Mapping[str, Any]]) -> None:
    """Lets errors name the --import that a run was started with; imports nothing.

    Args:
        recorded: the `imports` of a config.json or a weights file.
    """
    for entry in recorded:
        for registered in entry["registers"]:
            section, _, name = registered.partition(".")
            registry.record_import(section, name, entry["name"])


def changes(recorded: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each import whose file is not the one that was recorded."""
    before = {entry["name"]: entry["sha256"] for entry in recorded}
    return [
        f"{name} has changed since this run last started: its SHA-256 was {before[name][:12]}..., and is {sha256[:12]}..."
        for name, sha256 in ((entry["name"], entry["sha256"]) for entry in now)
        if before.get(name, sha256) != sha256
    ]
