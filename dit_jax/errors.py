"""The exceptions for mistakes that the user can fix; the message says how."""

import difflib
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """A config, flag, file or folder is wrong; verbs print its message without a stack trace and exit with status 2."""


class Failure(RuntimeError):
    """Work failed for a reason that the message says in full; verbs print it without a stack trace and exit with status 1."""


class NotFinite(Failure):
    """Weights or results hold NaN or infinity; nothing is written of them."""


class Unavailable(UserError):
    """A file cannot be read, and its content may be intact: a reader that can wait tries again.

    missing: the file does not exist, which for a single file is more likely to last.
    """

    def __init__(self, message: str, missing: bool = False):
        super().__init__(message)
        self.missing = missing


class TemporaryFailure(RuntimeError):
    """Something outside of the program failed, and the same command may go on: verbs exit with status 75, see `signals`."""


class UserErrors(UserError):
    """Several mistakes that are independent of one another, in one message."""

    def __init__(self, messages: list[str]):
        super().__init__(
            f"{len(messages)} things to mend:" + "".join(f"\n  {number}. {text}" for number, text in enumerate(messages, 1))
        )
        self.messages = messages


def failures(*checks: Callable[[], object]) -> list[str]:
    """Calls every check; the messages of the UserErrors that they raise, each text once."""
    messages: list[str] = []
    for check in checks:
        try:
            check()
        except UserErrors as error:
            messages += error.messages
        except UserError as error:
            messages.append(str(error))
    return list(dict.fromkeys(messages))


def raise_all(messages: list[str]) -> None:
    """Raises the messages as one error; returns if there are none.

    Raises:
        UserError: the message, if there is one.
        UserErrors: several.
    """
    if messages:
        raise UserError(messages[0]) if len(messages) == 1 else UserErrors(messages)


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
