"""training/signals.py: the first signal asks, the second ends. Two processes are tested in test_checkpoint.py."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dit_jax.training.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request_and_handlers_come_back(number):
    """Catches a signal that kills before the save, and handlers left behind that swallow a later Ctrl-C."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.requested(3)
        assert signal.getsignal(number) is signal.SIG_DFL
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_second_signal_reaches_the_handler_that_was_there():
    """A scheduler's own handler must not be lost, and must not see the first signal."""
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested(1)
            assert seen == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_ignored_signals_stay_ignored():
    """A run under nohup must not stop at an interrupt."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested(1)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_a_hung_process_at_once(second):
    """Catches a second Ctrl-C that waits for the save which hangs, as KeyboardInterrupt in a `with` block would."""
    program = """
        import contextlib, time
        from dit_jax.training.signals import StopSignal
        @contextlib.contextmanager
        def open_save():
            try: yield
            finally: time.sleep(60)
        with open_save(), StopSignal() as stop:
            print("ready", flush=True)
            while not stop.requested(1): time.sleep(0.01)
            print("hung", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "hung\n"
        child.send_signal(second)
        assert child.wait(timeout=5) == -second
        assert "SIGTERM: saving and stopping" in child.stderr.read()
    finally:
        child.kill()
        child.communicate()
