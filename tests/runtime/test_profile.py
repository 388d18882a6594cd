"""training/profile.py: a trace that a profiler opens."""

import gzip
import json

import pytest
import tiny

from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.runtime.profile import Profile
from dit_jax.storage.run_folder import differences
from dit_jax.training.loop import train


@pytest.mark.slow
def test_trace_holds_the_steps_asked_for(tmp_path):
    """A trace that is empty, holds other steps, or ends before the last of them is done."""
    run = tmp_path / "run"
    config = tiny.config(num_steps=5, model__depth=1, checkpoint__every_steps=100, profile__start_step=1, profile__num_steps=3)
    train(Run(config), run)
    (planes,), (trace,) = run.glob("profile/plugins/profile/*/*.xplane.pb"), run.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert planes.stat().st_size > 1000
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}
    assert steps == {"2", "3", "4"}


def test_another_profile_resumes():
    """A run that cannot be looked at because its config would be another."""
    assert differences({"profile": {"start_step": 0, "num_steps": 0}}, {"profile": {"start_step": 3, "num_steps": 2}}) == []


def test_a_failing_trace_does_not_stop_the_run(tmp_path, caplog):
    """A run that ends because its folder cannot take a trace."""
    caplog.set_level("WARNING", logger="absl")
    (tmp_path / "file").touch()
    with Profile(0, 1, last_step=2, folder=tmp_path / "file" / "profile") as profile, profile.step(0):
        pass
    assert not profile.running and "continues without it" in caplog.text


@pytest.mark.parametrize("start_step, num_steps", [(-1, 2), (0, -1), (9, 2)])
def test_steps_outside_of_the_run_are_refused(tmp_path, start_step, num_steps):
    """A trace that never comes, without a word."""
    with pytest.raises(UserError, match="do not lie within 0 to num_steps = 10"):
        Profile(start_step, num_steps, last_step=10, folder=tmp_path)
