"""docs/reliability.md against the tests: each fault has its outcome, its exit status and tests that exist."""

import ast
import re
from functools import cache
from typing import NamedTuple

import pytest
from paths import ROOT

SECTIONS = [
    "Signals",
    "Kills",
    "Disk",
    "Data",
    "Checkpoints",
    "Hangs",
    "Numbers",
    "Labels",
    "Files from elsewhere",
    "Many processes",
]
ONE = r"(0|1|2|75|not 0|128 \+ (9|its number))"
STATUS = re.compile(rf"{ONE}( or {ONE})*")
# Faults that users of this or of other programs have met: words of the row that has each.
MET = (
    "start-up",
    "final sampling",
    "second signal",
    "one of several processes",
    "kill -9",
    "`sample`",
    "`encode`",
    "`prepare`",
    "`evaluate`",
    "`sweep`",
    "`metrics.jsonl`",
    "TensorBoard",
    "a preview",
    "three",
    "the disk is full",
    "no HOME",
    "passwd",
    "a URL",
    "locked",
    "`loader.max_bad_share`",
    "another data set",
    "`@eaDir`",
    "`__MACOSX`",
    "hidden files",
    "a link to a folder above",
    "UTF-8",
    "latent cache",
    "a bit,",
    "every checkpoint damaged",
    "another model",
    "fewer steps",
    "a finished run again",
    "rate would be 0",
    "two commands in one folder",
    "`log.watchdog_seconds`",
    "a worker of the data loader",
    "not finite",
    "in a row",
    "NaN in weights",
    "without label dropout",
    "the null label",
    "scale below 0",
    "scale of 0",
    "a label that the network does not have",
    "no null row",
    "class folders that are numbers",
    "a pickle",
    "a Python module",
    "terabytes",
    "deep JSON",
    "`[]`, `null`",
    "`module.`",
    "state_dict",
    "negates lazily",
    "cannot be joined",
    "number of processes",
)


class Row(NamedTuple):
    section: str
    head: list[str]
    cells: list[str]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@cache
def rows():
    """The rows of all tables of the page, in order."""
    found = []
    for part in (ROOT / "docs" / "reliability.md").read_text().split("\n## ")[1:]:
        section = part.partition("\n")[0]
        for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE):
            head, rule, *lines = table.splitlines()
            assert set(rule) <= set("|-: ")
            found += [Row(section, cells(head), cells(line)) for line in lines]
    return found


@cache
def names_of_tests():
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_has_its_outcome(section):
    """A section without a table, a row without an outcome, or a status that no verb has."""
    table = [row for row in rows() if row.section == section]
    assert table
    for row in table:
        assert row.head[1:] == ["what happens", "exit status", "test"] and len(row.cells) == 4 and all(row.cells), row
        assert STATUS.fullmatch(row.cells[2]), row


def test_every_test_exists():
    """A promise that no test holds, or whose test was renamed."""
    for row in rows():
        named = re.findall(r"`(test_\w+)`", row.cells[-1])
        files = re.findall(r"`(tests/[\w/.]+)`", row.cells[-1])  # "the same in `tests/a.py`": as in the row above
        assert named or files, row
        assert not [name for name in named if name not in names_of_tests()], row
        assert not [file for file in files if not (ROOT / file).is_file()], row


def test_every_fault_that_was_met_has_a_row():
    """A row that was lost when the page was edited."""
    faults = [row.cells[0] for row in rows()]
    assert not [words for words in MET if not any(words in fault for fault in faults)]
