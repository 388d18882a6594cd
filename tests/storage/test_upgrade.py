"""Configs of older versions."""

import tiny

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.storage.upgrade import upgrade, upgrade_path

OLD = {"seed": 0, "task": {"name": "diffusion", "label_dropout": 0.2}, "model": {"num_classes": 10}}


def test_an_older_config_gets_todays_fields():
    """A run of e778c7f that is refused, or trained without its dropout; a config that is changed where it is kept."""
    new = upgrade(OLD)
    assert new["task"] == {"name": "diffusion", "cond_dropout": 0.2, "masks": []} and new["conditioner"] == {"name": "labels"}
    assert OLD["task"] == {"name": "diffusion", "label_dropout": 0.2} and "conditioner" not in OLD
    assert upgrade(new) == new
    assert upgrade_path("task.label_dropout") == "task.cond_dropout" and upgrade_path("task.name") == "task.name"


def test_what_a_config_has_is_kept():
    """Today's conditioner replaced by that of older configs; an autoencoder that gets one; sections of weights without a task."""
    conditioned = OLD | {"conditioner": {"name": "none"}}
    assert upgrade(conditioned)["conditioner"] == {"name": "none"}
    assert upgrade({"task": {"name": "autoencoder"}}) == {"task": {"name": "autoencoder"}, "ema_warmup": False}
    assert upgrade({"model": {"name": "dit"}, "ema_decay": 0.9}) == {"model": {"name": "dit"}, "ema_decay": 0.9}


def test_the_older_name_wins():
    """A config file that sets label_dropout on top of a recipe with cond_dropout, and has no effect."""
    both = {"task": {"name": "diffusion", "label_dropout": 0.5, "cond_dropout": 0.1}}
    assert upgrade(both)["task"] == {"name": "diffusion", "cond_dropout": 0.5, "masks": []}


def test_a_schedule_of_guidance_is_added_to_older_configs():
    """Catches a finished run that is refused for a field that it could not have, and a schedule that a config has and loses."""
    for given in ({}, {"schedule": "power_cosine", "power": 2.0}):
        section = {"name": "classifier_free", "scale": 2.0, **given}
        new = upgrade({"task": {"name": "diffusion"}, "guidance": section})["guidance"]
        assert {name: new[name] for name in ("schedule", "power", *section)} == {"schedule": "constant", "power": 4.0} | section
    mine = {"name": "mine", "scale": 2.0}
    assert upgrade({"task": {"name": "diffusion"}, "guidance": mine})["guidance"] == mine


def test_what_a_run_could_not_have_is_off():
    """Catches a run that cannot resume, and a network whose rotary positions become others, for fields that came later."""
    config = plain(recipes.digits_text())
    old = {name: dict(section) if isinstance(section, dict) else section for name, section in config.items()}
    later = {
        "task": ["masks"],
        "guidance": ["skip_layers", "skip_scale", "skip_low", "skip_high", "image_scale"],
        "conditioner": ["sha256", "trainable"],
        "model": ["known_frames", "base_fps", "rope_frequencies", "rope_grid"],
    }
    for section, fields in later.items():
        for field in fields:
            del old[section][field]
    assert upgrade(old) == config | {"model": config["model"] | {"rope_frequencies": "geometric"}}


def test_the_convention_of_a_flow_is_added_to_older_configs():
    """Catches a run of a flow that cannot resume, and a guide that is refused, for fields that they could not have."""
    old = {name: value for name, value in recipes.flow().items() if name not in ("convention", "sampling_grid")}
    assert upgrade({"task": {"name": "diffusion"}, "process": old})["process"] == recipes.flow()
    runs = [Run(tiny.config(process=process)) for process in (old, recipes.flow(), recipes.flow() | {"sampling_grid": "sd3"})]
    assert runs[0].predicts() == runs[1].predicts() == runs[2].predicts()
    assert Run(tiny.config(process=recipes.flow() | {"convention": "sd3"})).predicts() != runs[0].predicts()
