"""Paths that users give."""

import os
import re
from pathlib import Path

from dit_jax.errors import UserError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash where pathlib has removed the other


def local_path(path: str | os.PathLike) -> Path:
    """A path on a mounted file system; ~ is the home folder.

    Raises:
        UserError: it is a URL, such as gs://bucket/run; the home folder is unknown.
    """
    text = os.fspath(path)
    if URL.match(text):
        raise UserError(
            f"{text} is a URL; only files and folders are read and written. Mount the bucket (gcsfuse, s3fs) and give the path "
            "there, or copy the files"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:  # neither HOME nor an entry in passwd
        raise UserError(f"{text}: the home folder of ~ is unknown; set HOME, or give the whole path") from None
