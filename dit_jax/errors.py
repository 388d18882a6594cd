"""The one exception that means: the user can mend this, and the message says how."""


class UserError(ValueError):
    """A config, flag, file or folder is wrong; verbs print its message without a stack trace and exit with status 2."""
