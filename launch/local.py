"""Starts one verb as N processes on this machine, which find each other over a local port: a pod in small.

    python launch/local.py --processes=2 --devices=4 -- python -m dit_jax.main --config=configs/digits.py --workdir=runs/two

The first process writes to this terminal, the others to <workdir or .>/process_<i>.log. If one ends with an error the
others are ended too. --devices gives each process so many simulated CPU devices.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=0, help="simulated CPU devices per process; 0 leaves the real ones")
    parser.add_argument("--logs", default=".", help="folder for the other processes' output")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1:
        parser.error("give --processes >= 1, and after -- the command")
    environment = dict(os.environ)
    if options.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    address = f"127.0.0.1:{free_port()}"
    os.makedirs(options.logs, exist_ok=True)
    processes = []
    for i in range(options.processes):
        flags = [f"--coordinator_address={address}", f"--num_processes={options.processes}", f"--process_id={i}"]
        output = None if i == 0 else open(os.path.join(options.logs, f"process_{i}.log"), "w")  # noqa: SIM115
        processes.append(subprocess.Popen([*command, *flags], env=environment, stdout=output, stderr=output))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: processes[0].send_signal(signal.SIGTERM))
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(10)  # let the others say why
            for process in processes:
                process.kill()
        time.sleep(0.1)
    failed = [i for i, process in enumerate(processes) if process.returncode]
    sys.exit(f"processes {failed} failed; see {options.logs}/process_<i>.log" if failed else 0)


if __name__ == "__main__":
    main()
