"""Output of the verbs: text and progress on stderr, one JSON object as the last line of stdout, and the exit status."""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
import typing
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

from dit_jax.errors import Failure, TemporaryFailure, UserError
from dit_jax.runtime import command_line, phases, user_code, watchdog
from dit_jax.runtime.host_memory import reuse_freed_memory
from dit_jax.runtime.signals import STOPPED_STATUS, end_at_once

if typing.TYPE_CHECKING:
    from tqdm import tqdm

flags.disclaim_key_flags()  # --help lists --import as the verb's own

EXIT_SECONDS = 5.0  # from the end of a failed verb to the end of its process

_bars: "weakref.WeakSet[tqdm]" = weakref.WeakSet()  # progress bars on the terminal


def say(text: str) -> None:
    """Prints one line to stderr, on the first process only."""
    import jax  # takes a second, in which `run` has already printed a line

    if jax.process_index() == 0:
        print_above_bars(text)


def print_above_bars(text: str) -> None:
    """Prints to stderr; progress bars stay below the text."""
    if not _bars:
        print(text, file=sys.stderr, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def progress_bar(what: str, total: int, first: int = 0, unit: str = "") -> "tqdm | None":
    """A bar with rate and remaining time, redrawn in one line; None where stderr is no terminal, or on another process.

    first: what was done before; it does not count towards the rate.
    """
    import jax

    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or jax.process_index() != 0:
        return None
    if min(os.get_terminal_size(sys.stderr.fileno())) < 3:  # unknown, as in some containers: tqdm would hide the bar
        return None
    from tqdm import tqdm

    # leave=None: a bar below another one, as that of a score during training, is removed at its end.
    bar = tqdm(desc=what, total=total, initial=first, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=None)
    if not _bars:
        logging.get_absl_handler().addFilter(_clear_bars)
    _bars.add(bar)
    return bar


def _clear_bars(record: Any) -> bool:
    """A filter of log records, which are written over the bars; the bars are redrawn at their next update."""
    for bar in _bars:
        bar.clear(nolock=True)
    return True


def duration(seconds: float) -> str:
    """Formats a duration: 3725 -> "1h02m", 75 -> "1m15s", 8.2 -> "8s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
    """Shows a count with its rate and remaining time: a bar on a terminal, elsewhere a line at most every `every_seconds`."""

    def __init__(self, what: str, total: int, every_seconds: float = 5.0):
        self.what, self.total, self.every_seconds = what, total, every_seconds
        self.start = self.last = time.monotonic()
        self._bar = progress_bar(what, total)

    def update(self, done: int) -> None:
        """Shows that so many are done. It is also a sign of life for the watchdog."""
        phases.beat()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= self.total:
                self._bar.close()
            return
        now = time.monotonic()
        if now - self.last < self.every_seconds and done < self.total:
            return
        self.last = now
        rate = done / (now - self.start)
        left = "" if done >= self.total else f"  {duration((self.total - done) / rate)} left"
        say(f"{self.what} {done}/{self.total}  {rate:.1f}/s{left}")


def _which() -> str:
    """ "process 1 of 4: "; "" for one alone."""
    if "jax" not in sys.modules:
        return ""
    import jax

    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return f"process {jax.process_index()} of {jax.process_count()}: " if several else ""


def _leave(status: int):
    """Exits a failed process. One of several exits immediately: a normal exit waits for the others, which may wait for it."""
    if _which():
        for child in multiprocessing.active_children():  # the data loader's, which a normal exit would stop
            child.terminate()
        sys.stdout.flush()
        os._exit(status)
    end_soon(status)
    sys.exit(status)


@contextlib.contextmanager
def watched(phase: str) -> Iterator[None]:
    """Ends the process if its `Progress` stands still for too long; does nothing without a phase."""
    if not phase:
        yield
        return
    with watchdog.Watchdog(watchdog.DEFAULT_SECONDS), phases.phase(phase):
        yield


def end_soon(status: int) -> None:
    """Ends the process EXIT_SECONDS after its main thread: Python waits for threads, which may wait for a dead disk."""

    def end():
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS)
        sys.stdout.flush()
        os._exit(status)

    threading.Thread(target=end, name="end soon", daemon=True).start()


def run(main: Callable[[], dict], continues: bool = False, phase: str = "") -> None:
    """Runs a verb: imports what --import names, then calls main(), which returns a dict, printed as the last line of stdout.

    Exit status: 0 when all is done; 75 (STOPPED_STATUS), on every process, when the result says `stopped`, that is when a
    signal ended the work early with everything saved. With `continues`, a signal that comes while there is nothing to save ends
    the verb at once with 75, see `signals`; without, it has its usual effect. A UserError becomes one or two lines on stderr
    and exit status 2, without a stack trace, and a TemporaryFailure one line and 75; of several processes it says which. JAX ends
    the others: at once where the first failed, which they all talk to, else within 100 s. With a `phase`, the watchdog ends the
    verb with 75 once nothing has finished within the limit of that phase.
    """

    if continues:
        end_at_once()

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        print(f"dit_jax {command_line.verb_of(argv[0])}: starting", file=sys.stderr, flush=True)  # importing JAX takes a second
        try:
            if len(argv) > 1:
                raise UserError(command_line.explain_argument(argv[1]))
            from dit_jax.runtime import compilation_cache, platforms

            if note := platforms.unused_gpu():
                print(note, file=sys.stderr, flush=True)
            platforms.leave_out_tpu()
            platforms.check()
            compilation_cache.use()
            user_code.import_all(flags.FLAGS["import"].value or ())
            with watched(phase):
                result = main()
        except UserError as error:
            print(f"error: {_which()}{error}", file=sys.stderr, flush=True)
            _leave(command_line.USER_ERROR_STATUS)
        except Failure as error:
            print(f"error: {_which()}{error}", file=sys.stderr, flush=True)
            _leave(1)
        except TemporaryFailure as error:
            print(f"error: {_which()}{error}", file=sys.stderr, flush=True)
            _leave(STOPPED_STATUS)
        except Exception as error:
            watchdog.wait_if_ending()
            from dit_jax.runtime import platforms

            if said := platforms.explain(error):
                print(f"error: {said}", file=sys.stderr, flush=True)
                _leave(command_line.USER_ERROR_STATUS)
            if not _which():
                end_soon(1)
                raise
            traceback.print_exc()
            print(f"error: {_which()}failed with the error above", file=sys.stderr, flush=True)
            if silent := watchdog.silent_peers():
                print(f"error: {_which()}{silent}", file=sys.stderr, flush=True)
            _leave(1)
        import jax

        if jax.process_index() == 0:
            sys.stderr.flush()
            print(json.dumps(result), flush=True)
        if result.get("stopped"):
            sys.exit(STOPPED_STATUS)

    command_line.define_common_flags()
    reuse_freed_memory()
    doc = getattr(main, "__globals__", {}).get("__doc__") or ""  # of the verb's module, which --help prints
    app.run(guarded, flags_parser=lambda argv: command_line.parse(argv, doc))
