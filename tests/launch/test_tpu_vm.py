"""launch/tpu_vm.sh and tpu_worker.sh against stand-ins for gcloud and the workers' tools; no cloud was ever asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT, STAND_INS

OPTIONS = ["--name=run", "--zone=z1", "--accelerator-type=v5litepod-8", "--runtime-version=r1", "--poll-seconds=0.05"]
WORDS = ["--config.title=two words", "it's", '"quoted" $HOME `id` \\ *', "", "new\nline", "a|b"]

# The run on a worker: records its arguments and start, then does what the test wants at that start (1, 2, ...).
PYTHON = """#!/usr/bin/env bash
count=$(ls "$CLOUD" | grep -c "^start_${FAKE_WORKER}_" || true)
start=$((count + 1))
printf '%s\\0' "$@" >"$CLOUD/start_${FAKE_WORKER}_$start"
echo "worker $FAKE_WORKER, start $start"
BEHAVIOUR
"""
PREEMPTED_ONCE = """
if [[ $start == 1 ]]; then sleep 0.3; echo SUSPENDED >"$CLOUD/request"; exit 75; fi
echo '{"step": 4}'
"""


class Cloud:
    def __init__(self, folder: Path):
        self.folder, self.repository, self.shared = folder / "cloud", folder / "repository", folder / "shared"
        self.script = self.repository / "launch" / "tpu_vm.sh"
        for path in (self.folder, self.shared):
            path.mkdir()
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message=x")
        self.tools = folder / "tools"
        shutil.copytree(STAND_INS, self.tools)
        self.gcloud(lambda text: text.replace("#!/usr/bin/env -S python3 -S -E", f"#!{sys.executable} -SE"))
        self.environment = os.environ | {"CLOUD": str(self.folder), "PATH": f"{self.tools}:{os.environ['PATH']}"}

    def gcloud(self, change):
        (self.tools / "gcloud").write_text(change((self.tools / "gcloud").read_text()))

    def git(self, *words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=self.repository, check=True)

    def behave(self, text):
        (self.folder / "python").write_text(PYTHON.replace("BEHAVIOUR", text))
        (self.folder / "python").chmod(0o755)

    def start(self, *options, command=(), folder=None):
        words = ["python", "-m", "dit_jax.main", f"--workdir={folder or self.shared}/b4", *command]
        return subprocess.Popen(
            [self.script, *OPTIONS, *options, "--", *words],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *options, **more):
        process = self.start(*options, **more)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def action(self, option):
        return subprocess.run(
            [self.script, "--name=run", "--zone=z1", option], env=self.environment, capture_output=True, text=True, timeout=60
        )

    def calls(self, verb=None):
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [words for words in map(json.loads, lines) if verb in (None, *words)]

    def starts(self, worker=0):
        files = sorted(self.folder.glob(f"start_{worker}_*"))
        return [file.read_text().split("\0")[:-1] for file in files]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_through_a_preemption_to_the_end(cloud):
    """A preemption that ends the training, a command whose words are split or expanded, a slice that is paid for afterwards."""
    cloud.behave(PREEMPTED_ONCE)
    status, stdout, stderr = cloud.call("--spot", "--create-flag=--network=n 1", "--delete-when-done", command=WORDS)
    assert status == 0, stderr
    assert stdout.splitlines()[-1] == '{"step": 4}' and "worker 1" not in stdout
    for worker in (0, 1):
        assert cloud.starts(worker) == [["-m", "dit_jax.main", f"--workdir={cloud.shared}/b4", *WORDS]] * 2
    requests = cloud.calls("create")
    assert len(requests) == 2 and len(cloud.calls("delete")) == 2 and not (cloud.folder / "request").exists()
    assert {"--spot", "--node-id=run", "--zone=z1", "--accelerator-type=v5litepod-8", "--network=n 1"} <= set(requests[0])
    logs = sorted((cloud.folder / "logs" / "run").glob("*/worker_1.log"))
    assert [log.read_text() for log in logs] == ["worker 1, start 1\n", 'worker 1, start 2\n{"step": 4}\n']
    assert "BILLED" not in stderr


def test_versions_are_those_of_the_commit(cloud):
    """A worker that is installed after a preemption with newer libraries than the run began with."""
    cloud.behave("cp ~/uv_calls $CLOUD/uv_calls")
    assert cloud.call()[0] == 0
    date = subprocess.check_output(["git", "show", "--no-patch", "--format=%cI"], cwd=cloud.repository, text=True).strip()
    assert f"--exclude-newer {date} -e" in (cloud.folder / "uv_calls").read_text()


def test_a_lost_connection_starts_nothing_twice(cloud):
    """gcloud and this script connect again after ssh fails: a second process on the same TPU, also if the first has ended."""
    cloud.behave("sleep 0.2")
    (cloud.folder / "lose").touch()
    status, stdout, stderr = cloud.call()
    assert status == 0, stderr
    assert not (cloud.folder / "lose").exists() and [len(cloud.starts(worker)) for worker in (0, 1)] == [1, 1]
    assert "worker 0, start 1" in stdout and "EXISTS AND IS BILLED" in stderr and "--zone=z1 --delete" in stderr


@pytest.mark.slow
def test_ctrl_c_leaves_the_run_and_the_same_call_adopts_it(cloud):
    """Ctrl-C at the laptop that ends a run on a pod; a second call that starts another beside it, or requests another slice."""
    cloud.behave('for _ in {1..400}; do [[ ! -e "$CLOUD/go" ]] || break; sleep 0.05; done; echo done')
    process = cloud.start()
    while len(cloud.starts(1)) + len(cloud.starts(0)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130 and "EXISTS AND IS BILLED" in process.stderr.read()
    status, _, stderr = cloud.call(command=["--other"])
    assert status == 2 and "another command runs here" in stderr
    adopted_by = cloud.folder / "workers" / "1" / "dit_jax_run" / "attempt"
    first = adopted_by.read_text()
    again = cloud.start()
    while adopted_by.read_text() in (first, ""):
        assert again.poll() is None
        time.sleep(0.05)
    (cloud.folder / "go").touch()
    stdout, stderr = again.communicate(timeout=20)
    assert again.returncode == 0 and "worker 0, start 1\ndone\n" in stdout, stderr
    assert len(cloud.starts()) == 1 and len(cloud.calls("create")) == 1


def test_stop_by_hand_is_not_a_preemption(cloud):
    """A run that comes back after --stop; a SIGTERM to every worker, the later of which kills a run that is saving."""
    cloud.behave("""
        touch "$CLOUD/ready_$FAKE_WORKER"
        trap 'echo x >>"$CLOUD/terms_$FAKE_WORKER"; touch "$CLOUD/stop"' TERM
        for _ in {1..400}; do [[ ! -e "$CLOUD/stop" ]] || break; sleep 0.05; done
        exit 75""")
    process = cloud.start()
    while not all((cloud.folder / f"ready_{worker}").exists() for worker in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    assert cloud.action("--stop").returncode == 0
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 75 and len(cloud.starts()) == 1, stderr
    assert (cloud.folder / "terms_0").exists() and not (cloud.folder / "terms_1").exists()
    assert cloud.action("--delete").returncode == 0 and not (cloud.folder / "request").exists()


def test_stopped_without_a_preemption_goes_on(cloud):
    """Status 75 with a slice that is well (maintenance, a SIGTERM from elsewhere) taken for done or for a failure."""
    cloud.behave("[[ $start == 2 ]] || exit 75")
    status, _, stderr = cloud.call()
    assert status == 0 and len(cloud.starts()) == len(cloud.starts(1)) == 2 and len(cloud.calls("create")) == 1, stderr


def test_a_failure_is_not_repeated(cloud):
    """A program that fails on a healthy slice started over and over, at the price of a pod."""
    cloud.behave("exit 3")
    status, _, stderr = cloud.call("--delete-when-done")
    assert status == 3 and len(cloud.starts()) == 1 and not cloud.calls("delete") and "EXISTS AND IS BILLED" in stderr, stderr


def test_results_that_would_die_with_the_vm_are_refused(cloud, tmp_path):
    """Checkpoints on a boot disk, found out at the first preemption."""
    cloud.behave("true")
    status, _, stderr = cloud.call(folder=tmp_path)
    assert status == 2 and "is on the boot disk" in stderr and not cloud.starts()


def test_gcloud_that_fails_is_not_an_absent_slice(cloud):
    """An expired login taken for `no such slice`, and a second slice requested."""
    cloud.behave("true")
    assert cloud.call()[0] == 0
    (cloud.folder / "unreachable").touch()
    status, _, stderr = cloud.call()
    assert status == 0 and "refreshing your current auth" in stderr and len(cloud.calls("create")) == 1


def test_requests_that_fail_are_given_up(cloud):
    """A request that can never be granted made again and again, all night."""
    cloud.behave("true")
    cloud.gcloud(lambda text: text.replace('STATES = "WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE\\n"', 'STATES = "FAILED"'))
    status, _, stderr = cloud.call()
    assert status == 1 and len(cloud.calls("create")) == 3 and "3 requests in a row failed" in stderr


MISTAKES = {
    "relative": (["--", "python", "--workdir=here"], "absolute path"),
    "no workdir": (["--", "python"], "absolute path"),
    "no command": ([], "after --"),
    "word": (["python"], "unknown option python"),
    "name": (["--name=Run_1", "--", "python"], "lower-case"),
    "mount": (["--mount=/mnt/x", "--", "python", "--workdir=/mnt/x/y"], "needs --bucket"),
    "revision": (["--revision=nothing", "--", "python", "--workdir=/s/x"], "is not a commit"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(cloud, mistake):
    """A mistake found out after the slice was requested."""
    words, text = MISTAKES[mistake]
    process = subprocess.run([cloud.script, *OPTIONS, *words], env=cloud.environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and text in process.stderr and not cloud.calls()


def test_what_is_there_must_be_what_was_asked_for(cloud):
    """Uncommitted code that silently does not run; a flat bucket; a slice of another size that bears the name."""
    cloud.behave("true")
    (cloud.repository / "new").touch()
    assert "uncommitted changes" in cloud.call()[2] and not cloud.calls()
    (cloud.repository / "new").unlink()
    (cloud.folder / "hierarchical").write_text("")
    assert "no hierarchical namespace" in cloud.call("--bucket=b")[2] and not cloud.calls("create")
    assert cloud.call()[0] == 0
    status, _, stderr = cloud.call("--accelerator-type=v5litepod-16")
    assert status == 2 and "exists as a v5litepod-8, not a v5litepod-16" in stderr and len(cloud.starts()) == 1


def test_dry_run_shows_all_and_does_nothing(cloud):
    """A dry run that costs money, or that hides a step."""
    status, stdout, stderr = cloud.call("--dry-run", "--bucket=b", "--delete-when-done")
    assert status == 0 and not cloud.calls() and not (cloud.folder / "logs").exists(), stderr
    steps = (
        "describe gs://b",
        "queued-resources create run",
        " scp ",
        r"\ install\ ",
        r"\ mount\ b\ /mnt/b",
        r"\ run\ ",
        "delete run",
    )
    places = [stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), stdout
