"""Starts one verb as N processes on this machine, connected over a local port: a small pod.

    python launch/local.py --processes=2 --devices=4 -- python -m dit_jax.main --config=configs/digits.py --workdir=runs/two

Everything after -- is the command. It is started N times with --coordinator_address, --num_processes and --process_id appended.
Process 0 writes to this terminal, the others to <logs>/process_<i>.log. --devices sets the number of simulated CPU devices per
process; without it the processes share the real devices.

After Ctrl-C or SIGTERM all processes save and stop together; a second signal kills them. If one process fails, or ends with 75
because it hung, the others get --grace seconds to end and are then killed, so that none is left running; each writes its stacks
first. Exit status: 0 if all ended with 0; 75 if they were stopped and can be started again; otherwise that of the process that
failed first (128 + n: signal n).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STOPPED_STATUS = 75  # dit_jax.runtime.signals.STOPPED_STATUS; not imported, for a fast start and to run any command
LINES_SHOWN = 15
STACK_SECONDS = 2  # for the stacks of a process that hangs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number of processes; default 2")
    parser.add_argument("--devices", type=int, default=0, help="simulated CPU devices per process; 0 uses the real ones")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the other processes' output")
    parser.add_argument("--grace", type=float, default=30, help="seconds from a failure until the rest are killed; default 30")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    options = parser.parse_args(argv)
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.command or options.processes < 1 or options.devices < 0 or options.grace < 0:
        parser.error("give --processes of at least 1, --devices and --grace of at least 0, and the command after --")
    return options


def start(options, processes: list):
    """Starts the processes and appends each to `processes`, so that none is lost if a later one cannot be started."""
    environment = dict(os.environ)
    if options.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    address = f"127.0.0.1:{free_port()}"
    options.logs.mkdir(parents=True, exist_ok=True)
    for i in range(options.processes):
        flags = [f"--coordinator_address={address}", f"--num_processes={options.processes}", f"--process_id={i}"]
        output = None if i == 0 else open(log_file(options, i), "wb")  # noqa: SIM115
        # Each has its own session. Otherwise the terminal's Ctrl-C would reach it in addition to our signal, and a second signal
        # ends it immediately.
        processes.append(
            subprocess.Popen([*options.command, *flags], env=environment, stdout=output, stderr=output, start_new_session=True)
        )


def log_file(options, i: int) -> Path:
    return options.logs / f"process_{i}.log"


def status_of(process) -> int:
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def wait(processes, grace: float, asked: list[int]) -> list[int]:
    """Waits for all processes; returns those that failed on their own, in order. None is alive afterwards.

    asked: signals that were handed on; until there is one, a process that ends with 75 has hung.
    """
    failed, deadline = [], None
    while True:
        alive = [process for process in processes if process.poll() is None]
        failed += [i for i, p in enumerate(processes) if i not in failed and p.returncode not in (None, 0, STOPPED_STATUS)]
        if not alive:
            return failed
        hung = not asked and any(process.returncode == STOPPED_STATUS for process in processes)
        if (failed or hung) and deadline is None:
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for process in alive:  # Python's faulthandler writes the stacks at SIGABRT; a process may be stopped by a signal
                process.send_signal(signal.SIGABRT)
                process.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + STACK_SECONDS
            while time.monotonic() < deadline and any(process.poll() is None for process in alive):
                time.sleep(0.05)
            kill(alive)
            for process in alive:
                process.wait()
            return failed
        time.sleep(0.05)


def kill(processes):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the data loader's workers


def main(argv=None) -> int:
    options = parse(argv)
    processes, asked = [], []

    def hand_on(number, frame):
        asked.append(number)
        if len(asked) > 1:
            kill(processes)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    try:
        start(options, processes)
        failed = wait(processes, options.grace, asked)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        kill(processes)
    for i in failed:
        print(f"process {i} failed with status {status_of(processes[i])}", file=sys.stderr)
        if i:
            for line in log_file(options, i).read_text(errors="replace").splitlines()[-LINES_SHOWN:]:
                print(f"[process {i}] {line}", file=sys.stderr)
    if failed:
        return status_of(processes[failed[0]])
    return STOPPED_STATUS if any(process.returncode == STOPPED_STATUS for process in processes) else 0


if __name__ == "__main__":
    sys.exit(main())
