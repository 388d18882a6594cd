"""Text files with the names of classes, one per line."""

import collections

from dit_jax.errors import UserError
from dit_jax.storage.paths import local_path


def read(file: str, field: str) -> list[str]:
    """The names in the file that a field names.

    Raises:
        UserError: the file cannot be read, is empty, or has an empty or repeated line.
    """
    try:
        names = local_path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{field}={file} cannot be read ({error}): give a UTF-8 text file, one name per line") from None
    twice = [name for name, times in collections.Counter(names).items() if times > 1 or not name.strip()]
    if twice or not names:
        problem = f"an empty or repeated line, {twice[0]!r}" if twice else "no line"
        raise UserError(f"{field}={file} has {problem}: write one name per class")
    return names
