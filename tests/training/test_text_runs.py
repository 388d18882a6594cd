"""Runs of networks with pretrained text encoders, frozen and trained: start, resume, samples, exported weights, adapters."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_text
from flax.traverse_util import flatten_dict

import dit_jax
from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.convert.source import Source
from dit_jax.errors import UserError
from dit_jax.interop import text_encoders, weights
from dit_jax.tasks.state import create_sharded
from dit_jax.training.initial import with_encoders

DRAW = {"num_steps": 2, "guidance_scale": 2.0}


def run(folder, encoder, **fields):
    """Trains so fast that the text counts after two steps; on one device, whose programs compile faster."""
    fields = {"mesh__data": 1, "num_steps": 2, "checkpoint__every_steps": 1, "ema_decay": 0.0, **fields}
    fields = {"optimizer__learning_rate": 0.05, "optimizer__decay_steps": None, **fields}
    return dit_jax.train(tiny_text.config(encoder, **fields), workdir=folder)


def exported(folder, out):
    formats.write(formats.read(Source("workdir", folder)), "dit_jax", out)
    return out


@pytest.fixture(scope="module", autouse=True)
def one_device():
    devices = jax.devices()
    with tiny_text.known(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a run with a frozen encoder, the encoder's folder, its exported weights)."""
    folder = tmp_path_factory.mktemp("frozen")
    encoder = tiny_text.write_encoder(folder / "encoder")
    run(folder / "run", encoder)
    return folder / "run", encoder, exported(folder / "run", folder / "weights.safetensors")


def images(path, prompt, **options):
    files = {name: options.pop(name) for name in ("text_encoders", "tokenizers", "lora") if name in options}
    return dit_jax.load(path, **files)(prompt=prompt, **{**DRAW, **options}).images


@pytest.mark.slow
def test_exported_weights_draw_without_the_encoders(trained):
    """Catches a path of this machine in a file of weights, an unconditional sample that needs the encoders, another null
    condition than that of training, and a prompt that draws something without its encoder."""
    folder, encoder, file = trained
    section = weights.read(file).sections["conditioner"]
    assert list(section["weights"]) == list(section["tokenizers"]) == [] and section["sha256"][0].startswith("t5_tiny=")
    whole = images(folder, "")
    np.testing.assert_array_equal(images(file, ""), whole)
    for options in ({"prompt": "a three"}, {"prompt": "", "negative_prompt": "a three"}):
        with pytest.raises(UserError, match=r"'a three' needs the text encoders t5_tiny, which are not here; give --text_enc"):
            images(file, **options)
    given = {"text_encoders": [f"t5_tiny={encoder}"]}
    for options in ({}, {"negative_prompt": "a seven"}):
        drawn = images(file, "a three", **options, **given)
        np.testing.assert_array_equal(drawn, images(folder, "a three", **options))
        assert (drawn != whole).any()


@pytest.mark.slow
def test_other_weights_at_the_same_path_are_noticed(trained, tmp_path):
    """Catches images and steps with another text encoder than that of training."""
    folder, encoder, file = trained
    other = tiny_text.write_encoder(tmp_path / "other", seed=8)
    with pytest.raises(UserError, match=r"have the SHA-256 .*, and conditioner.sha256 is "):
        dit_jax.load(file, text_encoders=[f"t5_tiny={other}"])
    for wrong, text in ((["t5_tiny"], "write <encoder>=<path>"), ([f"t5_tiny={tmp_path / 'x'}"], "does not exist")):
        with pytest.raises(UserError, match=text):
            dit_jax.load(file, text_encoders=wrong)
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"conditioner.sha256: \['t5_tiny=.*'\] -> \['t5_tiny="):
        run(tmp_path / "run", other, num_steps=3)
    assert run(tmp_path / "run", shutil.copytree(encoder, tmp_path / "moved"), num_steps=3)["step"] == 3


@pytest.mark.exhaustive
def test_a_trained_encoder(tmp_path):
    """Catches an encoder that starts from random weights or is not trained, an average of other weights, and a resumed run,
    samples or exported weights that read the first weights again."""
    encoder = tiny_text.write_encoder(tmp_path / "encoder")
    c = tiny_text.config(encoder, mesh__data=1, conditioner__trainable=True)
    objects = Run(c)
    state = with_encoders(objects, create_sharded(objects.task, jax.random.key(0), objects.mesh))
    wanted = flatten_dict(text_encoders.read_all(objects.conditioner)["t5_tiny"], sep="/")
    for params in (state.params, state.ema_params):
        found = flatten_dict(params["conditioner"]["t5_tiny"], sep="/")
        assert found.keys() == wanted.keys() and all((found[name] == wanted[name]).all() for name in wanted)

    folder, fields = tmp_path / "run", {"conditioner__trainable": True}
    run(folder, encoder, **fields)
    shutil.rmtree(encoder)  # from here on the checkpoint has the encoder
    assert run(folder, encoder, **fields, num_steps=3)["step"] == 3
    tensors = formats.read(Source("workdir", folder, average="none")).tensors
    moved = {name: np.abs(tensors[f"conditioner/t5_tiny/{name}"].load() - x).max() for name, x in wanted.items()}
    assert min(moved.values()) > 1e-5
    file, given = exported(folder, tmp_path / "weights.safetensors"), {"tokenizers": ["t5_tiny=here"]}
    np.testing.assert_array_equal(images(file, "a three", **given), images(folder, "a three"))
    assert (images(file, "") != images(file, "a three", **given)).any()
    with pytest.raises(UserError, match="t5_tiny has no tokenizer; give"):
        images(file, "a three")


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_adapters(trained, tmp_path, trainable):
    """Catches adapters of a text network that cannot be started, resumed, sampled or exported, and a text encoder whose kernels
    are taken for the network's."""
    _, encoder, file = trained
    fields = {"init__weights": str(file), "init__lora__rank": 2, "conditioner__trainable": trainable}
    if trainable:
        fields["init__lora__targets"] = ("blocks/(qkv|context_qkv)/kernel", "attention/.*/kernel", "mlp/in/kernel")
    folder = tmp_path / "run"
    run(folder, encoder, **fields)
    assert run(folder, encoder, **fields, num_steps=3)["step"] == 3
    assert json.loads((folder / "initial_weights.json").read_text())["sha256"]
    out, given = exported(folder, tmp_path / "adapted.safetensors"), {"text_encoders": [f"t5_tiny={encoder}"]}
    adapted = images(folder, "a three")
    assert tiny.distance(images(out, "a three", **given), adapted) < 0.1
    formats.write_adapter(Source("workdir", folder), tmp_path / "peft")
    with_it = images(file, "a three", lora=tmp_path / "peft", **given) if not trainable else adapted
    assert tiny.distance(with_it, adapted) < 0.1
