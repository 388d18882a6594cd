"""storage/claim.py: one command at a time works in a folder."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from paths import ROOT

from dit_jax.errors import UserError
from dit_jax.storage import claim as claims
from dit_jax.storage.atomic import partial_path
from dit_jax.storage.claim import LOCK, claim, claim_file

HOLDER = (
    "import subprocess, sys, time\nfrom dit_jax.storage.claim import claim\n"
    "with claim(sys.argv[1], 'training') as claimed:\n"
    "    {before}\n    print('claimed', flush=True)\n    time.sleep(600)\n"
)


def holder(folder, before="pass"):
    """A process that has claimed the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER.format(before=before), folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_claim_one_folder(tmp_path):
    """Two commands that write the same files; a claim that outlives its process, so that a killed run never starts again."""
    folder = tmp_path / "new" / "run"
    process = holder(folder)
    try:
        text = rf"another command.* at work in {folder}; .*before drawing.* another --out"
        with pytest.raises(UserError, match=text), claim(folder, "drawing", "--out"):
            pass
    finally:
        kill(process)
    with claim(folder, "drawing", "--out") as claimed:
        assert claimed.folder == folder and (folder / LOCK).exists()
        with pytest.raises(UserError, match="another command"), claim(folder, "training"):
            pass
    assert list(folder.iterdir()) == []


def test_a_child_keeps_the_claim_of_a_killed_parent(tmp_path):
    """A sweep that was killed and started again trains a run that is still being trained."""
    child = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[claimed.descriptor], "
        "stdout=subprocess.DEVNULL); print(child.pid, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", HOLDER.format(before=child), tmp_path], stdout=subprocess.PIPE, text=True)
    number = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "claimed\n"
        kill(process)
        with pytest.raises(UserError, match="left behind"), claim(tmp_path, "sweeping"):
            pass
    finally:
        os.kill(number, signal.SIGKILL)


def test_a_lock_file_that_was_removed_is_no_claim(tmp_path, monkeypatch):
    """Two holders: one of a lock file that the last holder removed after it was opened, one of its successor."""
    real, opened = os.open, []

    def open_then_lose(path, *args):
        descriptor = real(path, *args)
        if not opened:
            os.unlink(path)
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", open_then_lose)
    with claim(tmp_path, "training"):
        assert len(opened) == 2
        monkeypatch.undo()
        with pytest.raises(UserError, match="another command"), claim(tmp_path, "training"):
            pass


def test_one_of_many_at_a_time(tmp_path):
    """A claim that is released while another takes it, so that two hold it at once."""
    inside, worst, entered = [], [0], [0]

    def work():
        for _ in range(200):
            try:
                with claim(tmp_path, "training"):
                    inside.append(1)
                    worst[0] = max(worst[0], len(inside))
                    entered[0] += 1
                    inside.pop()
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] and entered[0] > 0


def test_a_folder_that_cannot_be_claimed(tmp_path):
    """A stack trace instead of the folder's name and a remedy."""
    (tmp_path / "file").touch()
    text = r"file/run cannot be written or locked \(Not a directory\); give another --workdir"
    with pytest.raises(UserError, match=text), claim(tmp_path / "file" / "run", "training"):
        pass


def test_a_block_that_fails_releases_the_claim(tmp_path):
    """A notebook that can never train again after one error; descriptors that pile up."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "training"):
        raise ZeroDivisionError
    with claim(tmp_path, "training"), pytest.raises(UserError), claim(tmp_path, "training"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_claim_says_who_holds_it(tmp_path):
    """A refusal after which the user looks for the other command on all machines."""
    process = holder(tmp_path)
    try:
        text = rf"wait for it or end it \(process {process.pid} on \S+: .*{re.escape(os.path.basename(sys.executable))} -c"
        with pytest.raises(UserError, match=text), claim(tmp_path, "training"):
            pass
        content = json.loads((tmp_path / LOCK).read_text())
        assert content["pid"] == process.pid and "claim(sys.argv[1]" in content["command"]
    finally:
        kill(process)
    (tmp_path / LOCK).write_text("[" * 50_000)  # damaged, or of another program
    with claim(tmp_path, "training"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_file_is_claimed_and_tidied(tmp_path):
    """Two commands that write one file; the partial file of a killed one that stays, or that of another file removed."""
    path = tmp_path / "new" / "x.json"
    path.parent.mkdir()
    ours, other = partial_path(path), partial_path(path.with_name("y.json"))
    ours.touch()
    other.touch()
    with claim_file(path, "scoring"):
        assert sorted(p.name for p in path.parent.iterdir()) == sorted([".x.json.lock", other.name])
        with pytest.raises(UserError, match=r"another command.*x\.json"), claim_file(path, "scoring"):
            pass
        with claim_file(path.with_name("y.json"), "scoring"):
            pass
    assert not list(path.parent.iterdir())


NO_FLOCK = "import fcntl\ndef flock(*args): raise OSError({number}, 'not here')\nfcntl.flock = flock\n"


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(request, monkeypatch):
    """A file system without flock. Returns the code that takes it from another process."""
    exec(NO_FLOCK.format(number=request.param), scope := {})
    monkeypatch.setattr("fcntl.flock", scope["flock"])
    monkeypatch.setattr(claims, "SETTLED_SECONDS", 0.02)
    monkeypatch.setattr(claims, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 0.02)
    return NO_FLOCK.format(number=request.param)


def test_without_flock(tmp_path, no_flock):
    """A verb that is refused on such a file system, or blames another command; two at once; a dead one that keeps others out."""
    with claim(tmp_path, "training"), pytest.raises(UserError, match="another command"), claim(tmp_path, "training"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / LOCK).touch()  # as version 0.1.0 left it when it was refused
    with claim(tmp_path, "training"), pytest.raises(UserError, match="another command"), claim(tmp_path, "training"):
        pass
    process = subprocess.Popen(
        [sys.executable, "-c", no_flock + HOLDER.format(before="pass"), tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    try:
        with pytest.raises(UserError, match=rf"another command.*process {process.pid}"), claim(tmp_path, "training"):
            pass
    finally:
        kill(process)
    with claim(tmp_path, "training"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_without_flock_on_another_host(tmp_path, no_flock, monkeypatch, alive):
    """A number of a process that means another one here: a claim taken from a living command, or kept for ever by a dead one."""
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(claims, "_host", lambda: "elsewhere")
        stack.enter_context(claim(tmp_path, "training"))
        monkeypatch.setattr(claims, "_host", lambda: "here")
        if alive:
            with pytest.raises(UserError, match="another command"), claim(tmp_path, "training"):
                pass
        else:
            (tmp_path / LOCK).rename(tmp_path / "left")
            (tmp_path / LOCK).write_bytes((tmp_path / "left").read_bytes())
            (tmp_path / "left").unlink()
            with claim(tmp_path, "training"):
                pass


def test_one_of_several_takes_over_a_dead_claim_without_flock(tmp_path, no_flock, monkeypatch):
    """Several that see the same dead claim and all take it."""
    inside, most, lock, seen = [], [0], threading.Lock(), threading.Barrier(4)
    monkeypatch.setattr(claims, "_lives", lambda file: seen.wait() < 0)
    monkeypatch.setattr(claims, "SETTLED_SECONDS", 0.2)

    def work():
        with contextlib.suppress(UserError), claim(tmp_path, "training"):
            with lock:
                inside.append(1)
                most[0] = max(most[0], len(inside))
            time.sleep(0.1)
            inside.pop()

    (tmp_path / LOCK).touch()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_no_other_module_locks():
    """A verb with a lock of its own, which fails where file systems have no flock."""
    users = [path.name for path in (ROOT / "dit_jax").rglob("*.py") if re.search(r"fcntl|flock\(|lockf", path.read_text())]
    assert users == ["claim.py"]
