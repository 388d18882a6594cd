"""storage/atomic.py: readers see old or new content, whatever happens to the writer."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_points import Killed, killed_before

from dit_jax.storage import atomic

PARTIAL = re.compile(r"\.x\.json\.[0-9a-f]{8}\.partial")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(folder: Path, body: str):
    """Runs `body` in a process that is killed where os.replace would be called; `path` is folder/x.json."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom dit_jax.storage import atomic\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"path = Path(sys.argv[1]) / 'x.json'\n{body}\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(folder)]).returncode == -signal.SIGKILL


def test_kill_before_the_rename(tmp_path):
    """A new file that is half there; a leftover that nobody knows for one, so that it stays for ever."""
    (tmp_path / "x.json").write_text("old")
    killed(tmp_path, "atomic.write_json(path, {'new': 1})")
    leftover, kept = names(tmp_path)
    assert kept == "x.json" and (tmp_path / "x.json").read_text() == "old"
    assert PARTIAL.fullmatch(leftover) and atomic.is_partial(leftover)
    atomic.remove_leftovers(tmp_path, "y.json")
    assert names(tmp_path) == [leftover, "x.json"]
    atomic.remove_leftovers(tmp_path, "x.json")
    assert names(tmp_path) == ["x.json"]


def test_folder_killed_before_the_rename(tmp_path):
    """Half a codec; the folder that a killed writer left taken for a file, or for the codec."""
    killed(tmp_path, "with atomic.replacing_folder(path) as partial: (partial / 'a').write_text('a')")
    (leftover,) = names(tmp_path)
    assert PARTIAL.fullmatch(leftover)
    atomic.remove_leftovers(tmp_path, "x.json")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", range(1, 12))
def test_a_folder_whose_replacement_is_killed(tmp_path, number):
    """No codec at all between two renames; two of them, one under a name that nobody removes."""
    path = tmp_path / "codec"

    def replace(text):
        with atomic.replacing_folder(path) as partial:
            atomic.write_atomic(partial / "a", text)

    replace("old")
    with contextlib.suppress(Killed), killed_before(tmp_path, number):
        replace("new")
    atomic.remove_leftovers(tmp_path, "codec")
    assert names(tmp_path) == ["codec"] and (path / "a").read_text() in ("old", "new")
    replace("new")
    assert names(tmp_path) == ["codec"] and (path / "a").read_text() == "new"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    """A partial file after a full disk or Ctrl-C; an old file that is lost with the new one."""
    path = tmp_path / "x.json"
    path.write_text("old")

    def parts():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomic(path, parts())
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), atomic.replacing(path):
        pass  # a writer that wrote elsewhere
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic.replacing_folder(tmp_path / "folder") as partial:
        (partial / "half").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == ["folder", "x.json"] and names(tmp_path / "folder") == ["old"]
    assert path.read_text() == "old"


def test_a_folder_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """An error between two renames that leaves no codec at all."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    real = os.replace

    def replace(source, target):
        if atomic.is_partial(Path(source).name):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"), atomic.replacing_folder(tmp_path / "x") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["old"]


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    """A file that is empty after a power failure: renamed before it was synced, or the rename itself never synced."""
    log = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda source, target: (log.append("replace"), real(source, target)))
    atomic.write_atomic(tmp_path / "x.json", "text")
    file, rename, folder = log
    assert PARTIAL.fullmatch(Path(file).name) and rename == "replace" and folder == str(tmp_path)
    log.clear()
    with atomic.replacing_folder(tmp_path / "y") as partial:
        (partial / "a").write_text("a")
    assert log == [str(partial / "a"), str(partial), "replace", str(tmp_path)]


def test_what_is_written_and_told_of_it(tmp_path):
    """Another encoding than UTF-8, buffers in the wrong order, a size in elements instead of bytes."""
    path = tmp_path / "new" / "x"
    for content, expected in (
        ("größe\n", "größe\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (memoryview(np.arange(3, dtype=np.int32)), np.arange(3, dtype=np.int32).tobytes()),
        (iter([b"a", memoryview(np.ones(2)), bytearray(b"b")]), b"a" + np.ones(2).tobytes() + b"b"),
    ):
        written = atomic.write_atomic(path, content)
        assert path.read_bytes() == expected
        assert written == (len(expected), hashlib.sha256(expected).hexdigest())
    atomic.write_json(path, {"b": [1], "a": None})
    assert path.read_text() == '{\n "b": [\n  1\n ],\n "a": null\n}\n'
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    atomic.write_atomic(path, atomic.npy(array))
    np.testing.assert_array_equal(np.load(path), array)


def test_several_writers_of_one_file(tmp_path):
    """Two hosts that write the settings of one cache at once and mix their bytes, or rename each other's file."""
    path = tmp_path / "x"
    with atomic.replacing(path) as first, atomic.replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["x"]


def test_leftovers_that_are_not_ours(tmp_path):
    """A download that could have gone on, or another command's work, deleted from a folder where they may lie."""
    ours, other = atomic.partial_path(tmp_path / "a"), atomic.partial_path(tmp_path / "b")
    for path in (ours, other, tmp_path / "a", tmp_path / ".a.partial", atomic.resumable_path(tmp_path / "a")):
        path.touch()
    work = atomic.resumable_path(tmp_path / "work")
    work.mkdir()
    atomic.remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == sorted([other.name, "a", ".a.partial", "a.partial", "work.partial"])
    atomic.remove_leftovers(tmp_path, re.compile("[b-z]"))
    assert names(tmp_path) == [".a.partial", "a", "a.partial", "work.partial"]
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a", "work.partial"]
    atomic.remove_leftovers(tmp_path / "missing")


def test_check_writable(tmp_path):
    """Hours of work before the error; a probe that stays or that truncates what is there."""
    (tmp_path / "x").write_text("old")
    atomic.check_writable(tmp_path / "x")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"
    with pytest.raises(OSError):
        atomic.check_writable(tmp_path / "x" / "y")
