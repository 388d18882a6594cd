"""The exceptions for mistakes that the user can fix; the message says how."""

from collections.abc import Callable


class UserError(ValueError):
    """A config, flag, file or folder is wrong; verbs print its message without a stack trace and exit with status 2."""


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
