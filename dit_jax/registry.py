"""Constructors by config section and name.

A config's section is `name` and keyword arguments of one constructor. The package registers its own constructors where they are
built; user code adds others with `dit_jax.register`, in a config file or in a file given by --import:

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

# Arguments that `build` computes, by section: no config sets them.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "task": (
        *("network", "process", "codec", "conditioner", "optimizer", "image_shape", "latent_shape", "discriminator"),
        *("ema_decay", "microbatches", "zero1", "offload"),
    ),
    "model": ("out_channels", "parent", "name"),
    "process": (),
    "codec": (),
    "data": (),
    "transform": (),
    "optimizer": (),
    "sampler": (),
    "guidance": (),
    "conditioner": ("num_classes", "rules"),
    "metric": ("weights",),
}
SECTIONS = tuple(SUPPLIED)
_NOUNS = {"model": "network", "data": "data set", "metric": "extractor"}
_PACKAGE = Path(__file__).parent


class Entry(NamedTuple):
    """A constructor, and the file whose code registered it (a module's name where there is no file)."""

    constructor: Callable[..., Any]
    origin: str


_ENTRIES: dict[str, dict[str, Entry]] = {section: {} for section in SECTIONS}
_RECORDED: dict[tuple[str, str], str] = {}


def register(section: str, name: str, constructor: Callable[..., Any]) -> None:
    """Makes `constructor` what `<section>.name = name` of a config builds.

    The constructor's parameters are the section's fields; those without a default must be given. Registering again is allowed to
    the file that registered first, which may be loaded twice.

    Raises:
        UserError: no such section; the name is registered by another file.
    """
    if section not in SECTIONS:
        raise UserError(f"section {section!r} holds no constructors; register one of {', '.join(SECTIONS)}")
    caller = sys._getframe(1).f_globals
    origin = os.path.realpath(caller["__file__"]) if "__file__" in caller else str(caller.get("__name__"))
    known = _ENTRIES[section].get(name)
    if known is not None and known.constructor is not constructor and known.origin != origin:
        raise UserError(f"{noun(section)} {name!r} is registered twice, by {known.origin} and by {origin}; rename one of them")
    _ENTRIES[section][name] = Entry(constructor, origin)


def noun(section: str) -> str:
    """What messages call a constructor of the section: "network" of `model`, else the section's name."""
    return _NOUNS.get(section, section)


def names(section: str) -> list[str]:
    """Names registered for a section, sorted."""
    return sorted(_ENTRIES[section])


def get(section: str, name: str) -> Callable[..., Any]:
    """The constructor of that name.

    Raises:
        UserError: it is not registered; the message says which names are, or which --import registers it.
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
    found = _ENTRIES[section][name].origin
    return None if Path(found).is_relative_to(_PACKAGE) else found


def entries() -> dict[tuple[str, str], Entry]:
    """Everything that is registered, by (section, name)."""
    return {(section, name): entry for section, found in _ENTRIES.items() for name, entry in found.items()}


def record_import(section: str, name: str, given: str) -> None:
    """Lets `get` say `add --import=given` if the name is not registered; nothing is imported."""
    _RECORDED[section, name] = given


def parameters(section: str, name: str) -> dict[str, inspect.Parameter]:
    """The constructor's parameters that a config can set, annotations as types where they can be evaluated.

    Raises:
        UserError: see `get`.
    """
    constructor = get(section, name)
    try:
        signature = inspect.signature(constructor, eval_str=True)
    except NameError:  # of an annotation that exists for type checkers only
        signature = inspect.signature(constructor)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in signature.parameters.items() if p.kind in named and key not in SUPPLIED[section]}


def defaults(section: str, name: str) -> dict[str, Any]:
    """The fields of a section that have a default, as a config holds them: dtypes are names, optional fields may be None.

    Raises:
        UserError: see `get`.
    """
    given = {k: p.default for k, p in parameters(section, name).items() if p.default is not p.empty}
    return {key: value.__name__ if hasattr(value, "__name__") else value for key, value in given.items()}
