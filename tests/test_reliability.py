"""docs/reliability.md against the tests: each fault has its outcome, its exit status and tests that exist."""

import ast
import re
from functools import cache

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"
SECTIONS = (
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
)
STATUS = re.compile(r"not 0|(0|1|2|75|128 \+ (9|its number))( or (0|1|2|75|128 \+ (9|its number)))*")
# Faults that were met by users of this or of other programs: words of the row that has each.
MET = {
    "Signals": ["start-up", "steps", "final sampling", "second signal"],
    "Kills": ["`main`", "Orbax", "sample", "encode", "prepare", "evaluate", "sweep", "convert", "flock", "metrics.jsonl"],
    "Disk": [
        "metrics, TensorBoard",
        "preview",
        "three checkpoints",
        "latent plane",
        "final samples",
        "full",
        "HOME",
        "passwd",
        "URL",
        "locked",
    ],
    "Data": [
        "cannot be read",
        "another data set",
        "@eaDir",
        "__MACOSX",
        "hidden",
        "link",
        "UTF-8",
        "cache",
        "away for",
        "cannot open",
        "worker",
    ],
    "Checkpoints": [
        "a bit",
        "every checkpoint",
        "another model",
        "fewer steps",
        "finished run again",
        "rate would be 0",
        "two commands",
        "none can be used",
        "first checkpoint",
        "jax_default_prng_impl",
    ],
    "Hangs": ["limit of a phase", "processes hangs", "is killed"],
    "Numbers": ["NaN or infinite", "in a row", "after that", "float16", "NaN in weights", "an image is NaN"],
    "Labels": ["guidance of a network", "null label", "below 0", "scale of 0", "does not have", "no null row", "numbers"],
    "Files from elsewhere": [
        "pickle",
        "Python module",
        "terabytes",
        "null",
        "module.",
        "state_dict",
        "negates lazily",
        "deep JSON",
    ],
    "Many processes": ["SIGTERM", "cannot be joined", "number of processes"],
}


def rows(section):
    """The cells of the table of a section, without its head."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    head, rule, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| what happens | exit status | test |"), head and set(rule) <= set("|-")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@cache
def names_of_tests():
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_is_shown_by_tests(section):
    """A promise that no test holds, one whose test was renamed, or a status that no verb has."""
    table = rows(section)
    assert table
    for cells in table:
        assert len(cells) == 4 and all(cells), cells
        *_, status, tests = cells
        assert STATUS.fullmatch(status), cells
        named = re.findall(r"`(test_\w+)`", tests)
        assert named and re.sub(r"`test_\w+`|[, ]", "", tests) == "", cells
        assert not (missing := set(named) - names_of_tests()), missing


@pytest.mark.parametrize("section", SECTIONS)
def test_every_fault_that_was_met_has_a_row(section):
    """A row that was lost when the page was edited."""
    faults = [cells[0] for cells in rows(section)]
    assert not [words for words in MET[section] if not any(words in fault for fault in faults)]


def test_the_page_has_no_other_table():
    """A table in a section that is not checked."""
    tables = re.findall(r"\n\n\|", PAGE.read_text())
    assert len(tables) == len(SECTIONS)
