"""The log of starts, and what a start of a finished run leaves as it is."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
import tiny

from dit_jax import build, session
from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.runtime import signals
from dit_jax.storage.atomic import write_json
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir, read_result, write_class_names
from dit_jax.training import starts
from dit_jax.training.records import Records
from dit_jax.training.starts import Start


def lines(folder):
    return [json.loads(line) for line in (folder / starts.FILE).read_text().splitlines()]


def test_a_start_has_its_place_and_its_end(tmp_path):
    """A log without the facts that tell one start from another; an end that is recorded twice."""
    with Start(tmp_path) as start:
        start.begin(3, 10)
        start.step = 7
        start.end("stopped", 75)
        start.end("later", 1)
    first, last = lines(tmp_path)
    assert first["start"] == last["start"] and first["first_step"] == 3 and first["num_steps"] == 10 and first["host"]
    assert first["devices"] == f"{jax.device_count()} x cpu" and first["versions"]["jax"] == jax.__version__
    assert last["last_step"] == 7 and last["ended"] == "stopped" and last["status"] == 75
    (read,) = starts.read(tmp_path)
    assert read["began"] == first["time"] and read["time"] == last["time"] and read["status"] == 75


def test_a_start_that_was_killed_has_no_end(tmp_path):
    """A half line, as a power failure leaves it, that spoils the next start's; a log from elsewhere that ends in a trace."""
    Start(tmp_path).begin(0, 10)
    with open(tmp_path / starts.FILE, "a") as file:
        file.write('[1]\n{"start": 5}\n{"sta')
    with Start(tmp_path) as start:
        start.begin(4, 10)
        start.end("finished", 0)
    assert [read.get("ended") for read in starts.read(tmp_path)] == [None, "finished"]


def test_errors_and_signals_end_a_start(tmp_path, monkeypatch):
    """A start that seems to be killed although the run said why it ended."""
    with pytest.raises(UserError), Start(tmp_path) as start:
        start.begin(0, 10)
        raise UserError("no\nsuch thing")
    with pytest.raises(RuntimeError), Start(tmp_path) as start:
        start.begin(0, 10)
        raise RuntimeError("x" * 1000)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    with Start(tmp_path) as start:
        start.begin(0, 10)
        signals._end(signal.SIGTERM, None)
    assert not signals.before_exit
    first, second, third = starts.read(tmp_path)
    assert (first["ended"], first["status"]) == ("UserError: no such thing", 2)
    assert second["status"] == 1 and len(second["ended"]) < 400
    assert (third["ended"], third["status"]) == ("SIGTERM", 75)


def test_a_disk_that_hangs_at_the_end(monkeypatch):
    """A stopped run that lingers because its log is on a disk that does not respond."""
    ended = []
    monkeypatch.setattr(signals, "TELL_SECONDS", 0.05)
    monkeypatch.setattr(signals, "before_exit", [lambda why, status: time.sleep(30)])
    monkeypatch.setattr(os, "_exit", ended.append)
    start = time.monotonic()
    signals._end(signal.SIGTERM, None)
    assert ended == [75] and time.monotonic() - start < 10


def test_a_log_that_cannot_be_written(tmp_path, caplog):
    """A run that ends because of its log."""
    with Start(tmp_path / "nowhere") as start:
        start.begin(0, 10)
        start.end("finished", 0)
    assert caplog.text.count("the run continues without") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, without its training."""
    folder, config = tmp_path_factory.mktemp("finished") / "run", tiny.config(num_steps=2, log__every_steps=1)
    run = build.Run(config)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), run.abstract_state)
    with Workdir(folder, plain(config)), Checkpointer(folder / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(2, state.replace(step=state.step + 2), {"data": run.source.fingerprint})
        with Records(folder) as records:
            records.scalars(2, {"loss": 0.5})
        write_class_names(folder, run.source.class_names)
    (folder / "result.json").write_text(json.dumps({"step": 2, "loss": 0.5, "samples": None}))
    (folder / "report.html").touch()
    return folder


RECORDS = ("config.json", "metrics.jsonl", "result.json", "classes.json")


@pytest.mark.slow
def test_a_start_of_a_finished_run_writes_no_record(finished, capsys):
    """A finished run whose loss becomes null, or whose config becomes that of a start that did nothing."""
    before = {name: (finished / name).read_bytes() for name in RECORDS}
    assert session.train(tiny.config(num_steps=2, log__every_steps=2), finished) == {"step": 2, "loss": 0.5, "samples": None}
    said = capsys.readouterr().err
    assert "nothing to train" in said and "its records are kept" in said
    assert "without effect: log.every_steps: 1 -> 2" in said
    assert {name: (finished / name).read_bytes() for name in RECORDS} == before
    last = starts.read(finished)[-1]
    assert (last["first_step"], last["last_step"], last["ended"], last["status"]) == (2, 2, "nothing to train", 0)


@pytest.mark.slow
def test_other_results_of_a_finished_run_are_refused(finished):
    """Samples that are asked for and never drawn, exit status 0."""
    with pytest.raises(UserError, match=r"finished, with other settings .*evaluation.num_images: 0 -> 9\).*dit_jax.sample"):
        session.train(tiny.config(num_steps=2, log__every_steps=1, evaluation__num_images=9), finished)
    assert json.loads((finished / "config.json").read_text())["evaluation"]["num_images"] == 0


def test_what_is_not_finished(tmp_path, caplog):
    """A longer run that is taken for finished, or one whose samples were removed and never come back."""
    assert read_result(tmp_path, 3) is None
    write_json(tmp_path / "result.json", {"step": 3, "samples": "/moved/samples/00000003_final.npz"})
    assert read_result(tmp_path, 3) is None
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00000003_final.npz").touch()
    assert read_result(tmp_path, 3)["step"] == 3 and read_result(tmp_path, 4) is None
    (tmp_path / "result.json").write_text("[]")
    assert read_result(tmp_path, 3) is None and "the results are made again" in caplog.text
