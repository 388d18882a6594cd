"""Output of the verbs: text and progress on stderr, one JSON object as the last line of stdout, and the exit status."""

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging

from dit_jax.errors import UserError
from dit_jax.runtime import compilation_cache
from dit_jax.runtime.host_memory import reuse_freed_memory

USER_ERROR_STATUS = 2
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: no error; the same command resumes, and launch/ starts it again


def say(text: str):
    """Prints one line to stderr, on the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Formats a duration: 3725 -> "1h02m", 75 -> "1m15s", 8.2 -> "8s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def given_config(flag):
    """The value of a config flag, as `config_flags.DEFINE_config_file` returns it.

    Raises:
        UserError: its file does not exist or cannot be read, which ml_collections only tells at the first use.
    """
    try:
        flag.value.keys()
    except OSError:
        from ml_collections import config_flags

        name = config_flags.get_config_filename(flags.FLAGS[flag.name])
        raise UserError(f"--{flag.name}={name} does not exist or cannot be read") from None
    return flag.value


class Progress:
    """Prints the progress of a count with rate and remaining time, at most every `every_seconds`."""

    def __init__(self, what: str, total: int, every_seconds: float = 5.0):
        self.what, self.total, self.every_seconds = what, total, every_seconds
        self.start = self.last = time.monotonic()

    def update(self, done: int):
        now = time.monotonic()
        if now - self.last < self.every_seconds and done < self.total:
            return
        self.last = now
        rate = done / (now - self.start)
        left = "" if done >= self.total else f"  {duration((self.total - done) / rate)} left"
        say(f"{self.what} {done}/{self.total}  {rate:.1f}/s{left}")


def verb_of(program: str) -> str:
    """The verb of a program's path: ".../sample/__main__.py" -> "sample", ".../main.py" -> "main"."""
    path = Path(program)
    return path.parent.name if path.stem == "__main__" else path.stem


def _parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help: absl leaves with 1
        sys.exit(0)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        # ml_collections says nothing but the name of an unknown field, in as many quotes as there were exceptions.
        bare = str(error).strip("'\"") if isinstance(error, (KeyError, AttributeError)) else ""
        missing = f"the config has no field {bare!r}" if bare.replace(".", "").isidentifier() else ""
        message = missing or str(error).strip() or type(error).__name__
        if "Traceback (most recent call last)" in message:  # of a config file: what ml_collections says ends with the reason
            message = f"{message.splitlines()[0]} {message.splitlines()[-1].removeprefix('dit_jax.errors.UserError: ')}"
        print(f"error: {message}", file=sys.stderr)
        print(f"See python -m dit_jax.{verb_of(argv[0])} --help.", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)


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


def run(main):
    """Runs a verb; main() returns a dict, which is printed as the last line of stdout.

    Exit status: 0 if everything is done; 75 (STOPPED_STATUS), on every process, if the result says `stopped`: a signal ended the
    work early and everything is saved. A UserError becomes one or two lines on stderr and exit status 2, without a stack trace;
    with several processes the message names the process. JAX then ends the other processes: immediately if process 0, which they
    are all connected to, failed, otherwise within 100 s.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options begin with --")
            result = main()
        except UserError as error:
            print(f"error: {_which()}{error}", file=sys.stderr, flush=True)
            _leave(USER_ERROR_STATUS)
        except Exception:
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

    reuse_freed_memory()
    compilation_cache.use()
    app.run(guarded, flags_parser=_parse_flags)
