"""Output of the verbs: text and progress on stderr, one JSON object as the last line of stdout, and the exit status."""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, compilation_cache, platforms, user_code
from dit_jax.runtime.host_memory import reuse_freed_memory

flags.disclaim_key_flags()  # --help lists --import as the verb's own

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: no error; the same command resumes, and launch/ starts it again


def say(text: str) -> None:
    """Prints one line to stderr, on the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Formats a duration: 3725 -> "1h02m", 75 -> "1m15s", 8.2 -> "8s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """Prints the progress of a count with rate and remaining time, at most every `every_seconds`."""

    def __init__(self, what: str, total: int, every_seconds: float = 5.0):
        self.what, self.total, self.every_seconds = what, total, every_seconds
        self.start = self.last = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < self.every_seconds and done < self.total:
            return
        self.last = now
        rate = done / (now - self.start)
        left = "" if done >= self.total else f"  {duration((self.total - done) / rate)} left"
        say(f"{self.what} {done}/{self.total}  {rate:.1f}/s{left}")


def _which() -> str:
    """ "process 1 of 4: "; "" for one alone."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return f"process {jax.process_index()} of {jax.process_count()}: " if several else ""


def _leave(status: int):
    """Exits a failed process. One of several exits immediately: a normal exit waits for the others, which may wait for it."""
    if _which():
        for child in multiprocessing.active_children():  # the data loader's, which a normal exit would stop
            child.terminate()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def run(main: Callable[[], dict]) -> None:
    """Runs a verb: imports what --import names, then calls main(), which returns a dict, printed as the last line of stdout.

    Exit status: 0 when all is done; 75 (STOPPED_STATUS), on every process, when the result says `stopped`, that is when a
    signal ended the work early with everything saved. A UserError becomes one or two lines on stderr and exit status 2,
    without a stack trace; of several processes it says which. JAX ends the others: at once where the first failed, which they
    all talk to, else within 100 s.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise UserError(command_line.explain_argument(argv[1]))
            platforms.check()
            user_code.import_all(flags.FLAGS["import"].value or ())
            result = main()
        except UserError as error:
            print(f"error: {_which()}{error}", file=sys.stderr, flush=True)
            _leave(command_line.USER_ERROR_STATUS)
        except Exception as error:
            if said := platforms.explain(error):
                print(f"error: {said}", file=sys.stderr, flush=True)
                _leave(command_line.USER_ERROR_STATUS)
            if not _which():
                raise
            traceback.print_exc()
            print(f"error: {_which()}failed with the error above", file=sys.stderr, flush=True)
            _leave(1)
        if jax.process_index() == 0:
            sys.stderr.flush()
            print(json.dumps(result), flush=True)
        if result.get("stopped"):
            sys.exit(STOPPED_STATUS)

    command_line.define_common_flags()
    platforms.leave_out_tpu()
    reuse_freed_memory()
    compilation_cache.use()
    doc = getattr(main, "__globals__", {}).get("__doc__") or ""  # of the verb's module, which --help prints
    app.run(guarded, flags_parser=lambda argv: command_line.parse(argv, doc))
