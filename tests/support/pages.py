"""The code of README and docs: its blocks with their marks, its commands, and what its prose names.

A mark stands in a comment before a block: <!-- test: folder=digits seconds=60 main="--config.num_steps=20" -->. The block is then
run in a folder that all blocks of that name share. `main="..."` adds arguments to the commands of that verb, to make them short
(`main="... | ..."` other ones to the first and to the second command);
`photographs=24` first puts that many pictures into `photographs/`. The seconds are for two quiet cores; five minutes more are
allowed. Python that begins with `# name.py` is written to that file. A block without a mark is only read.
"""

import re
import shlex
from typing import NamedTuple

from paths import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- test: ([^\n]*) -->\s*\Z")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
VERB = re.compile(r"python -m dit_jax\.([\w.]+)(.*)")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    mark: dict[str, str]  # empty without one

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    place: str
    verb: str
    args: list[str]


def text_of(path) -> str:
    return path.read_text()


def blocks() -> list[Block]:
    """All fenced blocks, in the order of the pages."""
    found = []
    for path in FILES:
        text = text_of(path)
        for fence in FENCE.finditer(text):
            mark = MARK.search(text[: fence.start()])
            fields = dict(part.split("=", 1) for part in shlex.split(mark[1])) if mark else {}
            found.append(Block(path.name, text[: fence.start()].count("\n") + 2, fence[1], fence[2], fields))
    return found


def runnable(block: Block) -> list[str]:
    """The parts of a shell block's lines that use dit_jax; installing and pytest are left out."""
    lines = (" && ".join(part for part in line.split(" && ") if "dit_jax" in part) for line in lines_of(block))
    return [line for line in lines if line]


def lines_of(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and empty lines left out."""
    lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def spans() -> list[tuple[str, str]]:
    """(place, text) of inline code."""
    found = []
    for path in FILES:
        text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text_of(path))
        for span in re.finditer(r"`([^`]+)`", text):
            found.append((f"{path.name}:{text[: span.start()].count(chr(10)) + 1}", " ".join(span[1].split())))
    return found


def commands() -> list[Command]:
    """Every `python -m dit_jax.<verb>` of blocks and prose."""
    shells = [(block.place, line) for block in blocks() if block.language != "python" for line in lines_of(block)]
    found = []
    for place, line in shells + spans():
        for part in re.split(r"&&|;|\|(?![^']*')", line):
            if match := VERB.search(part):
                found.append(Command(place, match[1], shlex.split(match[2], comments=True)))
    return found
