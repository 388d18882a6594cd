"""Constructors by config section and name.

A section of a config is the `name` and the keyword arguments of one constructor. `build` registers the package's constructors,
`diffusion.samplers` its samplers; user code adds others with `dit_jax.register`, in a config file or in a file given by --import:

    import dit_jax
    dit_jax.register("sampler", "my_euler", MyEuler)     # --config.sampler.name=my_euler
"""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.errors import UserError

# Arguments that `build` computes, by section. A config does not set them.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "task": (
        *("network", "process", "codec", "conditioner", "optimizer", "image_shape", "latent_shape", "discriminator"),
        "low_resolution",
        *("ema_decay", "ema_warmup", "averages", "adaptation", "microbatches", "zero1", "offload"),
    ),
    "model": ("out_channels", "parent", "name"),
    "process": (),
    "codec": (),
    "data": (),
    "transform": (),
    "optimizer": ("matrices",),
    "sampler": (),
    "guidance": (),
    "conditioner": ("num_classes", "rules"),
    "metric": ("weights",),
    "job": (),
}
SECTIONS = tuple(SUPPLIED)
_NOUNS = {"model": "network", "data": "data set", "metric": "extractor"}
_PACKAGE = Path(__file__).parent


class Entry(NamedTuple):
    """A constructor, and the file whose code registered it (the module's name if there is no file)."""

    constructor: Callable[..., Any]
    origin: str


_ENTRIES: dict[str, dict[str, Entry]] = {section: {} for section in SECTIONS}
_RECORDED: dict[tuple[str, str], str] = {}


def register(section: str, name: str, constructor: Callable[..., Any]) -> None:
    """Registers the constructor that a config selects with `<section>.name = name`.

    The constructor's parameters are the section's fields; those without a default are required. The file that registered a name
    may register it again, because it can be loaded twice.

    Raises:
        UserError: the section does not exist; another file registered the name.
    """
    if section not in SECTIONS:
        raise UserError(f"section {section!r} does not exist; register in one of {', '.join(SECTIONS)}")
    caller = sys._getframe(1).f_globals
    origin = os.path.realpath(caller["__file__"]) if "__file__" in caller else str(caller.get("__name__"))
    known = _ENTRIES[section].get(name)
    if known is not None and known.constructor is not constructor and known.origin != origin:
        raise UserError(f"{noun(section)} {name!r} is registered twice, by {known.origin} and by {origin}; rename one of them")
    _ENTRIES[section][name] = Entry(constructor, origin)


def noun(section: str) -> str:
    """The noun for a constructor of the section in messages: "network" for `model`, usually the section's name."""
    return _NOUNS.get(section, section)


def names(section: str) -> list[str]:
    """Names registered for a section, sorted."""
    return sorted(_ENTRIES[section])


def get(section: str, name: str) -> Callable[..., Any]:
    """The constructor with this name.

    Raises:
        UserError: the name is not registered. The message lists the registered names, or gives the --import.
    """
    if name in _ENTRIES[section]:
        return _ENTRIES[section][name].constructor
    recorded = _RECORDED.get((section, name))
    remedy = f"add --import={recorded}" if recorded else f"choose one of {', '.join(names(section))}, or add --import=<file.py>"
    raise UserError(f"{noun(section)} {name!r} is not registered; {remedy}")


def origin(section: str, name: str) -> str | None:
    """The file of user code that registered the name; None for this package's own constructors.

    Raises:
        UserError: see `get`.
    """
    get(section, name)
    file = _ENTRIES[section][name].origin
    return None if Path(file).is_relative_to(_PACKAGE) else file


def entries() -> dict[tuple[str, str], Entry]:
    """All registered constructors, by (section, name)."""
    return {(section, name): entry for section, named in _ENTRIES.items() for name, entry in named.items()}


def record_import(section: str, name: str, given: str) -> None:
    """Makes `get` suggest `--import=given` if the name is not registered. Imports nothing."""
    _RECORDED[section, name] = given


def parameters(section: str, name: str) -> dict[str, inspect.Parameter]:
    """The constructor's parameters that a config can set; annotations are types where they can be evaluated.

    Raises:
        UserError: see `get`.
    """
    constructor = get(section, name)
    try:
        signature = inspect.signature(constructor, eval_str=True)
    except NameError:  # an annotation that exists only for type checkers
        signature = inspect.signature(constructor)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in signature.parameters.items() if p.kind in named and key not in SUPPLIED[section]}


def defaults(section: str, name: str) -> dict[str, Any]:
    """The defaults of a section's fields, as in a config: dtypes are names, optional fields may be None.

    Raises:
        UserError: see `get`.
    """
    given = {k: p.default for k, p in parameters(section, name).items() if p.default is not p.empty}
    return {key: value.__name__ if hasattr(value, "__name__") else value for key, value in given.items()}
