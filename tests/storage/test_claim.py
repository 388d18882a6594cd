"""storage/claim.py: one command at a time works in a folder."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dit_jax.errors import UserError
from dit_jax.storage.claim import LOCK, claim

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
