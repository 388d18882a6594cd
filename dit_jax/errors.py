"""The exception for mistakes that the user can fix; the message says how."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A config, flag, file or folder is wrong; verbs print its message without a stack trace and exit with status 2."""


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant: of similar spelling, with these initials (lr: learning_rate), or with this word in it."""
    if close := difflib.get_close_matches(name, names, 1):
        return close[0]
    words = {known: known.split("_") for known in names}
    candidates = [known for known in names if "".join(word[:1] for word in words[known]) == name or name in words[known]]
    return candidates[0] if len(candidates) == 1 else None


def suggest(name: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: "; did you mean a? There are a, b"."""
    near, known = nearest(name, names), ", ".join(names)
    return f"; did you mean {near}? There are {known}" if near else f"; there are {known}"
