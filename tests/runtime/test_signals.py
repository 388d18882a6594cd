"""The first signal asks, the second ends."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from paths import ROOT

from dit_jax.runtime.signals import StopSignal


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


BEFORE = """
    import os, signal, sys
    from dit_jax.runtime.signals import StopSignal, end_at_once
    assert "jax" not in sys.modules
    number = signal.Signals[sys.argv[1]]
    end_at_once()
"""
AFTER = {  # what stands after it: (exit status, text on stderr)
    "os.kill(os.getpid(), number)": (75, "stopped; the same command goes on"),
    "with StopSignal(unsaved=False): os.kill(os.getpid(), number)": (75, "stopped; the same command goes on"),
    "with StopSignal() as stop: os.kill(os.getpid(), number); print(stop.requested(1))": (0, "saving and stopping"),
    "with StopSignal(): os.kill(os.getpid(), number); os.kill(os.getpid(), number)": (None, "saving and stopping"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("code", AFTER)
def test_a_signal_while_there_is_nothing_to_save(code, number):
    """A stop that waits for minutes of compiling, a trace, or a status after which no supervisor starts the run again."""
    status, text = AFTER[code]
    program = [sys.executable, "-c", textwrap.dedent(BEFORE) + code, number.name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # without the warnings of libtpu, where it is installed
    process = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert process.returncode == (-number if status is None else status), process.stderr
    assert process.stderr == f"{number.name}: {text}{'; a second signal ends the process immediately' * (status != 75)}\n"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_a_hung_process_at_once(second):
    """Catches a second Ctrl-C that waits for the save which hangs, as KeyboardInterrupt in a `with` block would."""
    program = """
        import contextlib, time
        from dit_jax.runtime.signals import StopSignal
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


PROCESS = """
    import sys, time, jax
    jax.config.update("jax_num_cpu_devices", 2)
    from dit_jax.parallel import hosts
    from dit_jax.runtime.signals import StopSignal
    hosts.initialize(sys.argv[1], 2, int(sys.argv[2]))
    step = 0
    with StopSignal() as stop:
        while not stop.requested(step):
            step += 1
            if step == 5: print("ready", flush=True)
            time.sleep(0.01)
        print("saving", step, flush=True)
        sys.stdin.readline()
    print("saved", flush=True)
    sys.stdin.readline()
"""


def lines_until(child, start):
    """Reads what a process says up to the line that starts so; Gloo and JAX speak in between."""
    for line in child.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"the process ended with {child.wait()} before it said {start}")


@pytest.fixture
def pair():
    """Two processes of one program, which have trained a few steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), address]
    children = [
        subprocess.Popen(
            [*command, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for i in range(2)
    ]
    try:
        for child in children:
            lines_until(child, "ready")
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def release(child):
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("late", ["saving", "saved"])
def test_a_host_signalled_late_lives_on(pair, late):
    """A cluster that signals its hosts seconds apart, and so kills the second one while it saves, or before it can say so."""
    late_one, asked = pair
    asked.send_signal(signal.SIGTERM)
    assert lines_until(asked, "saving") == lines_until(late_one, "saving")
    if late == "saved":
        release(late_one)
        lines_until(late_one, "saved")
    late_one.send_signal(signal.SIGTERM)
    lines_until(late_one, "SIGTERM: saving and stopping")
    for child in pair:
        release(child)
        release(child)
    assert [child.wait(timeout=60) for child in pair] == [0, 0]


@pytest.mark.slow
@pytest.mark.faults
def test_a_second_signal_ends_one_of_two_processes(pair):
    """JAX's handler, which swallows every SIGTERM: a save that hangs could not be ended."""
    hung, asked = pair
    asked.send_signal(signal.SIGTERM)
    lines_until(hung, "saving")
    hung.send_signal(signal.SIGTERM)
    lines_until(hung, "SIGTERM: saving and stopping")
    hung.send_signal(signal.SIGTERM)
    assert hung.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.faults
def test_other_verbs_end_at_sigterm():
    """JAX's preemption service left on: `sample` and `encode` on many processes would outlive every SIGTERM."""
    program = """
        import os, signal, socket
        from dit_jax.parallel import hosts
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        hosts.initialize(f"127.0.0.1:{port}", 1, 0)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == -signal.SIGTERM, process.stderr
