"""What the main thread does now, and when something last finished: read by the `watchdog`.

A phase is a key of `watchdog.LIMITS`. Whatever finishes in it (a step, a batch, a shard) calls `beat`.
"""

import contextlib
import time
from collections.abc import Iterator

_name: str | None = None
_at = 0.0  # set before _name and read after it, so that a phase never has the time of an earlier one


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what the main thread does in the block; phases may be nested. Call it on the main thread only."""
    global _name, _at
    before = _name
    _at = time.monotonic()
    _name = name
    try:
        yield
    finally:
        _at = time.monotonic()
        _name = before


def beat(name: str | None = None) -> None:
    """Says, from any thread, that something has finished, or waits with a limit of its own.

    name: counts in this phase only.
    """
    global _at
    if name is None or name == _name:
        _at = time.monotonic()


def current() -> tuple[str | None, float]:
    """(phase, or None outside of any; `time.monotonic` when something last finished)."""
    name = _name
    return name, _at
