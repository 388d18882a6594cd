"""The exception for mistakes that the user can fix; the message says how."""


class UserError(ValueError):
    """A config, flag, file or folder is wrong; verbs print its message without a stack trace and exit with status 2."""
