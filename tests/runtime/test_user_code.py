"""Files and modules that --import names."""

import hashlib
import sys

import cloudpickle
import pytest
from user_files import forgetful as forgetful
from user_files import write

from dit_jax import registry
from dit_jax.errors import UserError
from dit_jax.runtime import user_code

pytestmark = pytest.mark.usefixtures("forgetful")

REGISTERS = """
from dataclasses import dataclass
import dit_jax

@dataclass(frozen=True)
class Mine:
    num_steps: int = 3

dit_jax.register("sampler", "mine", Mine)
"""


def test_files_and_modules(tmp_path, monkeypatch):
    """An import without its hash, or of which nobody knows what it registered; a module that only a file can name."""
    file = write(tmp_path / "mine.py", REGISTERS)
    write(tmp_path / "named_module.py", REGISTERS.replace('"mine"', '"other"'))
    monkeypatch.syspath_prepend(tmp_path)
    user_code.import_all([str(file), "named_module", str(file)])
    first, second = user_code.imports()
    assert first == (str(file), hashlib.sha256(file.read_bytes()).hexdigest(), ("sampler.mine",))
    assert (second.name, second.registers) == ("named_module", ("sampler.other",)) and len(second.sha256) == 64
    assert user_code.flags() == [f"--import={file}", "--import=named_module"]
    assert registry.origin("sampler", "mine") == str(file)


@pytest.mark.parametrize(
    "text, said",
    [
        ("import dit_jax\nx = 1\ny = x / 0\n", "line 3: ZeroDivisionError: division by zero\n    y = x / 0"),
        ("def f(:\n", "line 1: SyntaxError: invalid syntax\n    def f(:"),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError: No module named"),
        ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError"),
        ("import dit_jax\ndit_jax.register('samplers', 'x', 1)", "section 'samplers' does not exist"),
    ],
)
def test_failures_name_the_line(tmp_path, text, said):
    """Forty frames of a stack for a slip in the user's file, or a message without its line."""
    file = write(tmp_path / "mine.py", text)
    with pytest.raises(UserError) as caught:
        user_code.import_all([str(file)])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["nowhere.py", "nowhere_module", "nowhere.package.module", "./x"])
def test_missing(name):
    """A stack trace for a name that is mistyped."""
    with pytest.raises(UserError, match=f"--import={name}"):
        user_code.import_all([name])


def test_classes_of_a_file_reach_other_processes(tmp_path):
    """A data set of the user that the workers of the data loader cannot unpickle."""
    module = user_code.load_file(write(tmp_path / "mine.py", REGISTERS), "--import")
    pickled = cloudpickle.dumps(module.Mine(5))
    del sys.modules[module.__name__]
    assert cloudpickle.loads(pickled).num_steps == 5


def test_changes_are_told():
    """A run that goes on with other code than it was started with, and nobody knows."""
    old = [{"name": "a.py", "sha256": "0" * 64, "registers": []}, {"name": "b.py", "sha256": "1" * 64, "registers": []}]
    assert user_code.changes(old, old) == [] == user_code.changes([], old)
    (line,) = user_code.changes(old, [old[0], old[1] | {"sha256": "2" * 64}])
    assert line.startswith("b.py has changed") and "111" in line and "222" in line
