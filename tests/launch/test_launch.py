"""launch/: what all scripts must keep, local.py, slurm.sbatch against stand-ins for SLURM, the container file, exit status 75."""

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT, STAND_INS

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *(STAND_INS).iterdir()])


def test_shellcheck():
    """A quote that is missing where a path has a space."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install -e '.[test]')")
    shell = [str(path) for path in SCRIPTS if "python" not in path.read_text().splitlines()[0]]
    process = subprocess.run([shellcheck, *shell], capture_output=True, text=True)
    assert len(shell) >= 6 and process.returncode == 0, process.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.parent == LAUNCH], ids=lambda path: path.name)
def test_scripts_are_strict_and_hold_no_hyperparameters(script):
    """A failing line that is passed over, or a run that depends on the script it was started with."""
    lines = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert lines[0] == "set -euo pipefail" and os.access(script, os.X_OK)
    code = re.sub(r"cat (>&2 )?<<'?TEXT'?\n.*?\nTEXT", "", "\n".join(lines), flags=re.DOTALL)
    assert "--config" not in code.replace("--config=...", "") and "learning_rate" not in code


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "slurm.sbatch", "local.py"])
def test_help(name):
    """Scripts that ask for --help and see a failure, or start something."""
    command = [sys.executable] if name.endswith(".py") else ["bash"]
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    process = subprocess.run([*command, LAUNCH / name, "--help"], capture_output=True, text=True, env=environment, timeout=60)
    assert process.returncode == 0 and "dit_jax.main" in process.stdout and "set -euo" not in process.stdout


def local(folder, program, *options):
    (folder / "program.py").write_text(f"import os, signal, sys, time\nrank = int(sys.argv[-1][-1])\n{program}\n")
    launcher = [sys.executable, LAUNCH / "local.py", f"--logs={folder / 'logs'}", *options]
    return subprocess.Popen(
        [*launcher, "--", sys.executable, "program.py", "a b"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_local_arguments_and_logs(tmp_path):
    """Processes that are told the same rank or other addresses; a log in the wrong place; devices that are not simulated."""
    process = local(tmp_path, 'print(sys.argv[1:], os.environ["JAX_NUM_CPU_DEVICES"])', "--processes=3", "--devices=2")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    lines = [stdout, *((tmp_path / "logs" / f"process_{i}.log").read_text() for i in (1, 2))]
    flags = re.compile(r"'a b', '--coordinator_address=(127.0.0.1:\d+)', '--num_processes=3', '--process_id=(\d)'] 2\n$")
    addresses = {flags.search(line).groups() for line in lines}
    assert {rank for _, rank in addresses} == {"0", "1", "2"} and len({address for address, _ in addresses}) == 1
    assert not (tmp_path / "logs" / "process_0.log").exists()


@pytest.mark.parametrize(
    "program, status",
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(3 if rank == 1 else 75)", 3),
        ("os.kill(os.getpid(), 9) if rank == 1 else sys.exit(0)", 137),
        ("print('why', file=sys.stderr) or sys.exit(4) if rank == 1 else time.sleep(60)", 4),
        ("sys.exit(75) if rank == 0 else os.kill(os.getpid(), signal.SIGSTOP)", 75),
    ],
)
def test_local_status(tmp_path, program, status):
    """A failure that is not reported, or processes that go on for ever without the one that died."""
    process = local(tmp_path, program, "--grace=0.2")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert ("process 1 failed" in stderr) == (status not in (0, 75)) and ("[process 1] why" in stderr) == (status == 4)


def test_local_signals(tmp_path):
    """A stop that some processes do not hear of, so that a verb which cannot stop hangs; a second Ctrl-C without effect."""
    program = """
open(f"ready{rank}", "w").close()
signal.signal(signal.SIGTERM, lambda *_: open(f"term{rank}", "w").close())
while True: time.sleep(0.02)"""
    process = local(tmp_path, program)
    try:
        while not all((tmp_path / f"ready{i}").exists() for i in (0, 1)):
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        while not all((tmp_path / f"term{i}").exists() for i in (0, 1)):
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 137
    finally:
        process.kill()


def test_local_mistakes(tmp_path):
    """A stack trace for a command that does not exist."""
    mistakes = {"no-such-command": ["--", "no-such-command"], "at least 1": ["--processes=0", "--", "true"], "after --": []}
    for text, words in mistakes.items():
        process = subprocess.run([sys.executable, LAUNCH / "local.py", *words], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 2 and text in process.stderr and "Traceback" not in process.stderr


def slurm(folder, status, state, *arguments, script="exit STATUS"):
    tools = folder / "bin"
    tools.mkdir()
    for name, text in {
        "srun": f"printf '%s\\0' \"$@\" >srun\n{script.replace('STATUS', str(status))}",
        "squeue": f"echo {state}",
        "scontrol": 'echo "$*" >scontrol',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "b4"}
    command = ["bash", LAUNCH / "slurm.sbatch", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "status, state, requeued",
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (75, "RUNNING", True),
        (143, "RUNNING", True),
        (75, "COMPLETING", False),
        (75, "", False),
    ],
)
def test_slurm_requeues_what_was_stopped(tmp_path, status, state, requeued):
    """A run that ends at its time limit for good; a failure that is repeated; a job that comes back after scancel."""
    words = ["--config=configs/imagenet.py:B/4,256", "--config.title=two words", "$HOME *", ""]
    process = slurm(tmp_path, status, state, *words)
    process.communicate(timeout=20)
    assert process.returncode == (75 if requeued else status)
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    started = (tmp_path / "srun").read_text().split("\0")[:-1]
    assert started[started.index("python") :] == ["python", "-m", "dit_jax.main", *words]
    assert "--output=b4-17-task%t.log" in started


def test_slurm_shell_outlives_a_preemption(tmp_path):
    """SIGTERM to the batch shell, which then dies before its tasks have saved and the job is lost."""
    process = slurm(tmp_path, 75, "RUNNING", script="touch ready; until [[ -e go ]]; do sleep 0.05; done; exit STATUS")
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    process.communicate(timeout=20)
    assert process.returncode == 75 and (tmp_path / "scontrol").exists()


def test_slurm_options():
    """One process that sees one GPU of eight, or a job that is killed without a word: what JAX's detection and a save need."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options
    assert re.fullmatch(r"TERM@\d+", options["signal"]) and "requeue" in options and options["open-mode"] == "append"


def test_container_file():
    """An extra that setup.cfg does not have, a file that .dockerignore keeps out, a container that runs as root."""
    text = (LAUNCH / "Dockerfile").read_text()
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    assert set(re.search(r"in (\w+) \| (\w+)\)", text).groups()) <= set(extras["options.extras_require"])
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for words in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE) for word in words.split()}
    assert copied == let_in and all((ROOT / name).exists() for name in copied)
    assert re.findall(r"^USER (.+)$", text, flags=re.MULTILINE) == ["1000"]
    assert "uid=1000" in (LAUNCH / "gke_jobset_gpu.yaml").read_text()


def test_what_was_stopped_ends_with_75():
    """The one status that every launcher relies on, lost in console.run."""
    program = "from dit_jax.runtime import console; console.run(lambda: {'stopped': True})"
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 75 and json.loads(process.stdout) == {"stopped": True}, process.stderr


@pytest.mark.slow
@pytest.mark.faults
def test_a_stopped_run_ends_with_75(tmp_path):
    """A run that was told to stop taken for done (0) or for a failure."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "dit_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    fields = ["num_steps=100000", "batch_size=8", "model.depth=1", "model.width=32", "log.every_steps=1", "preview.every_steps=0"]
    process = subprocess.Popen(
        [*command, *(f"--config.{field}" for field in fields)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    result = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 75 and result["stopped"] and Path(result["checkpoint"]).is_dir(), stderr
    assert f"stopped and saved at step {result['step']}; the same command goes on" in stderr


PHASES = {  # line on stderr at which a signal is sent: what is said then
    "dit_jax main: starting": (signal.SIGHUP, "stopped; the same command goes on"),
    "compiling the training step": (signal.SIGINT, "stopped; the same command goes on"),
    "compiling the sampler": (signal.SIGTERM, "stopped and saved at step 2; the same command goes on"),
}


@pytest.mark.slow
@pytest.mark.faults
def test_stopped_in_every_phase(tmp_path):
    """A signal outside of the steps that ends the run with a failure, or a run that does not go on from there."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "dit_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    fields = ["num_steps=2", "batch_size=8", "model.depth=1", "model.width=32", "log.every_steps=1", "preview.every_steps=0"]
    fields += ["optimizer.warmup_steps=0", "evaluation.num_images=600", "evaluation.batch_size=64"]
    command += [f"--config.{field}" for field in fields]

    for start, (number, said) in PHASES.items():
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if line.startswith(start):
                    process.send_signal(number)
                    start = "no other line"
            assert process.wait(60) == 75, "".join(lines)
        finally:
            process.kill()
        assert said in "".join(lines)
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0 and json.loads(process.stdout.splitlines()[-1])["fid"] > 0, process.stderr
