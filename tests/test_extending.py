"""What a user adds from outside of the package: in the config file itself, or in a file that --import names."""

import json

import pytest
from user_files import forgetful as forgetful
from user_files import write
from verbs import refused, run_verbs

from dit_jax.config_file import plain, read
from dit_jax.storage.run_folder import Workdir, read_config

USER_FILE = '''
"""A network, a process, a sampler, a data set and a codec that dit_jax does not have."""
from dataclasses import dataclass

import numpy as np
import dit_jax
from dit_jax import recipes
from dit_jax.codecs.pixels import Pixels
from dit_jax.data.sources import fingerprint
from dit_jax.diffusion.flow import Flow
from dit_jax.models.dit import DiT


class Stripes:
    """Images with one bright column, which is the label."""

    num_classes, class_names = 8, tuple("01234567")

    def __init__(self, count: int, brightness: int = 255):
        self.count, self.brightness = count, brightness
        self.fingerprint = fingerprint(name="stripes", count=count, brightness=brightness)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.zeros((8, 8, 1), np.uint8)
        image[:, index % 8] = self.brightness
        return {"image": image, "label": index % 8}


@dataclass(frozen=True)
class Backwards:
    """Euler's method on a flow."""

    num_steps: int = 3
    stretch: float | None = None

    def evaluations(self, process):
        return self.num_steps

    def __call__(self, process, denoise, noise, keys):
        x, memory, times = noise, denoise.init(noise), np.linspace(1, 0, self.num_steps + 1)
        for now, after in zip(times[:-1], times[1:]):
            prediction, memory = denoise(x, now, memory)
            x = x + (now - after) * process.slope(prediction, now)
        return x * (self.stretch or 1)


@dataclass(frozen=True)
class SlowFlow(Flow):
    scale: float = 10.0

    def network_time(self, t):
        return self.scale * super().network_time(t)


@dataclass(frozen=True)
class Inverted(Pixels):
    def encode(self, params, images):
        return -images

    def decode(self, params, latents):
        return -super().decode(params, latents)


class MyNet(DiT):
    pass


dit_jax.register("data", "stripes", Stripes)
dit_jax.register("sampler", "backwards", Backwards)
dit_jax.register("process", "slow_flow", SlowFlow)
dit_jax.register("codec", "inverted", Inverted)
dit_jax.register("model", "my_net", MyNet)


def get_config():
    c = recipes.digits()
    c.data = {"name": "stripes", "count": 64}
    c.sampler = {"name": "backwards"}
    c.process = {"name": "slow_flow"}
    c.codec = {"name": "inverted", "image_channels": 1}
    c.model.update({"name": "my_net", "depth": 1, "width": 32, "num_classes": 8})
    c.update({"num_steps": 2, "batch_size": 8})
    c.preview.every_steps = c.evaluation.num_images = 0
    return c
'''


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extending")
    write(folder / "mine.py", USER_FILE)
    trained = ["main", "--config.sampler.num_steps=2", "--config=mine.py", "--config.data.brightness=200", "--workdir=run"]
    imported = ["main", "--import=mine.py", "--config=configs/digits.py", "--config.codec.name=inverted", "--workdir=other"]
    imported += ["--config.codec.image_channels=1", "--config.num_steps=0"]
    drawn = ["sample", "--workdir=run", "--num_samples=4", "--sampler_fields=stretch=0.5", "--out=x.npz"]
    calls = [trained, drawn, [*drawn, "--import=mine.py"], [*drawn, "--import=nowhere.py"], imported]
    return folder, run_verbs(folder, calls)


@pytest.mark.slow
def test_a_run_of_user_code(outcomes):
    """User code that configs, the training loop or config.json take for unknown."""
    folder, ((status, stdout, stderr), *_) = outcomes
    assert status == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["step"] == 2
    config = read_config(folder / "run")
    assert config["sampler"] == {"name": "backwards", "num_steps": 2}
    assert config["data"] == {"name": "stripes", "count": 64, "brightness": 200}
    (entry,) = config["imports"]
    assert entry["name"] == "mine.py" and len(entry["sha256"]) == 64
    assert set(entry["registers"]) == {
        "data.stripes",
        "sampler.backwards",
        "process.slow_flow",
        "codec.inverted",
        "model.my_net",
    }


@pytest.mark.slow
def test_sampling_imports_only_what_the_command_line_names(outcomes):
    """A run folder of somebody else whose code is executed; or a user who is not told what is missing."""
    _, (_, without, given, wrong, _) = outcomes
    refused(without, "is not registered; add --import=mine.py")
    assert without[0] == 2
    status, stdout, stderr = given
    assert status == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["num_samples"] == 4
    refused(wrong, "--import=nowhere.py: nowhere.py does not exist")


@pytest.mark.slow
def test_import_comes_before_the_config(outcomes):
    """A name of user code that the config's own flags cannot have."""
    refused(outcomes[1][-1], "num_steps is 0")


@pytest.mark.usefixtures("forgetful")
def test_a_run_may_go_on_with_other_code(tmp_path, capsys):
    """A file that was edited between two starts: refused though it may be a comment, or not mentioned."""
    file = write(tmp_path / "mine.py", USER_FILE)
    with Workdir(tmp_path / "run", plain(read(str(file)))) as folder:
        folder.checkpoints.mkdir()
    file.write_text(file.read_text() + "# a comment\n")
    with Workdir(tmp_path / "run", plain(read(str(file)))):
        assert f"{file} has changed since this run last started" in capsys.readouterr().err
