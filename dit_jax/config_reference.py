"""The fields of a config with their values, types and meanings, for `--show` and the documentation.

A section with a `name` is documented by the docstring of its constructor, as are the sections of
`config_file.CONSTRUCTORS`; the fields that
the training loop reads are documented in `recipes.MEANINGS`.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from docstring_parser.google import DEFAULT_SECTIONS, GoogleParser, Section, SectionType
from ml_collections import ConfigDict

from dit_jax import build, config_file, recipes, registry

PARSER = GoogleParser([*DEFAULT_SECTIONS, Section("Fields", "param", SectionType.MULTIPLE)])
CONSTANT = re.compile(r"one of ([A-Z][A-Z_]+)\b")
WIDTH = 110  # of a line of `text`


class Field(NamedTuple):
    """A field of a config.

    Fields:
        path: as on the command line behind --config., such as "optimizer.learning_rate".
        value: None where it is unset.
        type: as in Python, such as "int | None".
        meaning: one or more sentences on one line; "" where user code does not say.
    """

    path: str
    value: Any
    type: str
    meaning: str


def fields(config: ConfigDict) -> list[Field]:
    """All fields of a config, in the order: those of the loop, then section by section."""
    ordered = sorted(config.items(), key=lambda item: isinstance(item[1], ConfigDict))
    return [field for key, value in ordered for field in _fields(config, key, value)]


def text(config: ConfigDict) -> str:
    """`fields` for a terminal: below the name of each section `field = value  (type)`, and below that the meaning."""
    lines: list[str] = []
    place = ""
    for field in fields(config):
        outer, _, key = field.path.rpartition(".")
        if outer != place:
            place, lines = outer, [*lines, "", outer]
        lines.append(f"  {key} = {field.value!r}  ({field.type})")
        lines += textwrap.wrap(field.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def meanings(constructor: Callable[..., Any]) -> dict[str, str]:
    """{parameter: its meaning} by the docstring of a constructor; "one of CONSTANT" lists the constant's names."""
    found = {}
    for parameter in PARSER.parse(inspect.getdoc(constructor) or "").params:
        described = " ".join((parameter.description or "").split())
        for name in parameter.arg_name.split(","):
            found[name.strip()] = CONSTANT.sub(lambda match: _choices(constructor, match), described)
    return found


def _choices(constructor: Callable[..., Any], match: re.Match) -> str:
    names = getattr(sys.modules[constructor.__module__], match[1], None)
    return f"one of {', '.join(map(str, names))}" if names else match[0]


def _fields(config: ConfigDict, path: str, value: Any) -> Iterator[Field]:
    if not isinstance(value, ConfigDict):
        meaning = _meaning(config, path)
        yield Field(path, value, config_file.type_of(config, path).python(), meaning[:1].upper() + meaning[1:])
        return
    sections = [key for key, inner in value.items() if isinstance(inner, ConfigDict)]
    names = [key for key in value if key not in sections]
    for key in sorted(names, key=lambda key: key != "name") + sections:
        yield from _fields(config, f"{path}.{key}", value[key])


def _meaning(config: ConfigDict, path: str) -> str:
    if path in recipes.MEANINGS:
        return recipes.MEANINGS[path]
    place, _, key = path.rpartition(".")
    constructor = _constructor(config, place)
    if constructor is None:
        return ""
    if key == "name":
        kind = place.rpartition(".")[2]
        summary = PARSER.parse(inspect.getdoc(constructor) or "").short_description or ""
        return f"The {registry.noun(kind)}, one of {', '.join(registry.names(kind))}. {summary}".strip()
    return meanings(constructor).get(key, "")


def _constructor(config: ConfigDict, place: str) -> Callable[..., Any] | None:
    """The constructor whose keyword arguments are the fields of a section; None where there is none."""
    section: Any = config
    for key in place.split(".") if place else []:
        section = section[key]
    kind = place.rpartition(".")[2]
    if kind in registry.SECTIONS and "name" in section:
        return registry.get(kind, section.name)
    return config_file.unnamed_constructor(config, place)


assert build  # registers the package's constructors
