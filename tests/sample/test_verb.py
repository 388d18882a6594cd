"""The flags of `sample` that choose guidance, labels and sampler, on runs with random weights."""

import json

import numpy as np
import pytest
import tiny
from runs import save_run
from verbs import refused, run_verbs

from dit_jax import recipes
from dit_jax.errors import UserError
from dit_jax.sample.labels import chosen_labels, random_labels

RUNS = {"strong": tiny.config(), "weak": tiny.config(model__depth=1), "flow": tiny.config(process=recipes.flow())}
DRAW = "--labels=random --seed=3 --sampler=heun --num_steps=3"
DRAWS = {
    "plain": f"--workdir=strong --num_samples=6 {DRAW}",
    "classifier-free": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2",
    "auto": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2 --autoguidance_workdir=weak",
    "by itself": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2 --autoguidance_workdir=strong",
    "interval": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2 --guidance_interval=0.9,1",
    "skipped": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2 --skip_layers=1 --skip_interval=0,0.5 --skip_scale=2",
    "bfloat16": f"--workdir=strong --num_samples=6 {DRAW} --guidance_scale=2 --autoguidance_workdir=weak --dtype=bfloat16",
    "flow": f"--workdir=flow --num_samples=9 {DRAW}",
}
MISTAKES = {
    "--workdir=strong --autoguidance_workdir=weak": "needs guidance_scale above 1",
    "--workdir=strong --autoguidance_workdir=weak --guidance_scale=1": "needs guidance_scale above 1",
    "--workdir=strong --autoguidance_workdir=flow --guidance_scale=2": "was trained with another process",
    "--workdir=strong --autoguidance_workdir=nowhere --guidance_scale=2": "nowhere is not the --workdir",
    "--workdir=strong --dtype=float16": "--dtype=float16 must be one of float32, bfloat16",
    "--workdir=strong --sampler=dopri5": "sampler 'dopri5' needs a continuous process",
    "--workdir=flow --sampler=dopri5 --num_steps=3": "chooses its own",
    "--workdir=strong --guidance_channels=3 --guidance_scale=2": "the data has 1",
    "--workdir=strong --guidance_interval=0.2": "give two times",
    "--workdir=strong --skip_layers=one": "--skip_layers=one: give numbers of blocks",
    "--workdir=strong --skip_layers=1 --skip_interval=0.2": "give two shares of the steps",
    "--workdir=strong --sampler_fields=eta=1": "'dpmpp' has the fields num_steps",
}


def outcomes_of(folder, flags_by_name):
    """{name: (exit status, stdout, stderr)}, for RUNS saved in the folder."""
    for seed, (name, config) in enumerate(RUNS.items()):
        save_run(folder / name, config, seed)
    calls = [["sample", *flags.split(), f"--out={i}.npz"] for i, flags in enumerate(flags_by_name.values())]
    return dict(zip(flags_by_name, run_verbs(folder, calls), strict=True))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: (exit status, stdout, stderr)} and {name: the images' file} of DRAWS."""
    folder = tmp_path_factory.mktemp("sample")
    outcomes = outcomes_of(folder, DRAWS)
    assert not [outcomes[name][2] for name in DRAWS if outcomes[name][0]]
    return outcomes, {name: dict(np.load(folder / f"{i}.npz")) for i, name in enumerate(DRAWS)}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """{flags: (exit status, stdout, stderr)} of MISTAKES."""
    return outcomes_of(tmp_path_factory.mktemp("mistakes"), {flags: flags for flags in MISTAKES})


def images(found, name):
    return found[1][name]["arr_0"].astype(int)


def differ(a, b):
    """Mean difference of the images in steps of 8 bits."""
    return np.abs(a - b).mean()


@pytest.mark.slow
def test_autoguidance_leads_away_from_the_weak_run(found):
    """The weak run not loaded, the network without labels in its place, or the two taken for each other."""
    plain, free, auto, itself = (images(found, name) for name in ("plain", "classifier-free", "auto", "by itself"))
    assert plain.std() > 10
    assert differ(auto, free) > 5
    assert differ(auto, plain) > 5
    assert np.abs(itself - plain).max() <= 1  # w + 2 (w - w) = w
    assert json.loads(str(found[1]["auto"]["made_by"]))["autoguidance"] == "weak"


@pytest.mark.slow
def test_dtype_is_the_users(found):
    """A run that is drawn from in the dtype that it was trained in whatever --dtype says, or does not say how it was drawn."""
    auto, narrow = (found[1][name] for name in ("auto", "bfloat16"))
    assert [json.loads(str(file["made_by"]))["model"]["dtype"] for file in (auto, narrow)] == ["float32", "bfloat16"]
    assert 0 < differ(images(found, "bfloat16"), images(found, "auto")) < 5
    weights = [json.loads(str(file["made_by"]))[key] for file in (auto, narrow) for key in ("weights", "autoguidance_weights")]
    assert weights[:2] == weights[2:] and len(set(weights)) == 2  # of the checkpoint, not of what is held


def test_a_choice_of_labels_without_classes():
    """A word about labels that a network without classes ignores."""
    for word in ("random", "balanced"):
        with pytest.raises(UserError, match="unconditional"):
            chosen_labels(word, 2, 0, 0)
    assert chosen_labels("none", 2, 0, 0)[0].tolist() == chosen_labels(None, 2, 0, 0)[0].tolist() == [0, 0]


@pytest.mark.slow
def test_random_labels_depend_on_the_seed_alone(found):
    """Labels drawn anew at each call, by the number of images or the run, or from one seed for all."""
    labels = {name: found[1][name]["labels"].tolist() for name in DRAWS}
    assert labels["plain"] == labels["classifier-free"] == labels["auto"] == labels["flow"][:6]
    assert labels["plain"] != random_labels(6, 10, seed=4).tolist()
    assert len(set(labels["flow"])) > 2 and set(labels["flow"]) <= set(range(10))


@pytest.mark.slow
def test_evaluations_are_counted(found):
    """Steps reported in place of the network's calls, of which Heun's takes two, and guidance twice as many."""
    counts = {name: json.loads(found[0][name][1].splitlines()[-1])["evaluations"] for name in DRAWS}
    # The last step of a process with timesteps is Euler's.
    wanted = {"plain": 5, "classifier-free": 10, "auto": 10, "by itself": 10, "bfloat16": 10, "flow": 6}
    assert counts == wanted | {"interval": None, "skipped": None}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(mistaken, flags):
    """Guidance that does nothing, a guide of another kind, or a sampler that the network cannot serve."""
    refused(mistaken[flags], MISTAKES[flags])


@pytest.mark.slow
def test_interval_guides_some_steps(found):
    """An interval that is ignored, or guides everywhere."""
    assert differ(images(found, "interval"), images(found, "classifier-free"))
    assert differ(images(found, "interval"), images(found, "plain"))


@pytest.mark.slow
def test_skip_layers(found):
    """A flag that does not reach the sampler."""
    assert differ(images(found, "skipped"), images(found, "classifier-free"))
