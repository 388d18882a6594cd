"""What a run shows on the screen: a first line at once, a bar on a terminal, lines elsewhere."""

import io
import os
import subprocess
import sys

from absl import logging

from dit_jax.runtime import console


def test_nothing_slow_is_imported_before_the_first_line():
    """A black screen for the seconds in which JAX is imported."""
    code = "import sys, dit_jax.main; print([name for name in ('jax', 'flax', 'orbax', 'matplotlib') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "[]", run.stdout + run.stderr[-500:]


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def terminal(monkeypatch, columns=100, lines=30):
    """Makes stderr a terminal; called in the test, because pytest sets stderr after the fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, lines)))
    return screen


def test_a_bar_on_a_terminal(monkeypatch):
    """A screen full of lines; a line or a warning that is written into the bar; a bar without rate or remaining time."""
    screen = terminal(monkeypatch)
    bar = console.progress_bar("training", 30, 10, " steps")
    bar.update(1)
    bar.set_postfix_str("loss 0.5")
    console.say("a line")
    record = logging.get_absl_logger().makeRecord("absl", logging.WARNING, "x", 1, "a warning", (), None)
    assert logging.get_absl_handler().filter(record) and screen.getvalue().endswith(" \r")
    bar.update(19)
    bar.close()
    shown = screen.getvalue()
    line = next(part for part in shown.split("\r") if "11/30" in part)
    assert line.startswith("training:") and " steps/s" in line and "<" in line
    assert any(part.startswith("a line\n") for part in shown.split("\r")) and "30/30" in shown and "loss 0.5" in shown
    assert shown.count("\n") == 2  # of the line and at the end


def test_lines_elsewhere(capsys, monkeypatch):
    """A log file with one line of a thousand redrawn bars."""
    assert console.progress_bar("training", 30) is None
    console.Progress("images", 2, every_seconds=0).update(1)
    assert capsys.readouterr().err.startswith("images 1/2  ")


def test_a_terminal_of_unknown_size(monkeypatch):
    """A bar that tqdm hides, and no line in its place."""
    terminal(monkeypatch, 0, 0)
    assert console.progress_bar("training", 30) is None


def test_a_failed_process_does_not_wait_for_its_threads():
    """A process that lingers for minutes after its error, because threads of a library wait for a full disk."""
    code = """
import threading, time
from dit_jax.runtime import console
console.EXIT_SECONDS = 0.2
threading.Thread(target=time.sleep, args=(60,)).start()
console.end_soon(3)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 3
