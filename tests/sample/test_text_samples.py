"""Samples of a network with text: prompts, negative prompts, seeds of their own, and the texts that stay with the images."""

import json

import numpy as np
import pytest
import tiny
from runs import save_run
from verbs import refused, run_verbs

import dit_jax
from dit_jax import recipes, registry
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.sample import shards, trained
from dit_jax.sample.jobs import Interpolate
from dit_jax.sample.prompts import Prompts

WIDTH = 16


def config():
    c = tiny.config(process=recipes.flow(), sampler=recipes.default_sampler("euler")).copy_and_resolve_references()
    c.unlock()
    fields = {"patch_size": 2, "depth": 2, "width": 32, "heads": 2, "context_width": WIDTH, "pooled_width": WIDTH}
    c.model = {**registry.defaults("model", "mmdit"), "name": "mmdit", **fields}
    c.conditioner = {"name": "text", "encoders": ("bytes",), "lengths": (12,), "width": WIDTH}
    c.sampler.num_steps = 2
    return c.lock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    save_run(folder, config(), 0)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return dit_jax.load(folder)


def test_an_image_depends_on_its_prompt_alone(pipe):
    """Catches prompts that are put to other images, and a negative prompt without effect."""
    both = pipe(prompt=["a cat", "a dog"], guidance_scale=2.0)
    assert both.texts == {"captions": ("a cat", "a dog")} and both.labels.tolist() == [0, 0]
    again = pipe(prompt="a cat", guidance_scale=2.0)
    assert (again.images[0] == both.images[0]).all() and (both.images[0] != both.images[1]).any()
    other = pipe(prompt="a cat", negative_prompt="a dog", guidance_scale=2.0)
    assert (other.images != again.images).any() and other.texts["negative_prompts"] == ("a dog",)
    empty = pipe(prompt="a cat", negative_prompt="", guidance_scale=2.0)
    assert (empty.images == again.images).all()


def test_a_prompt_with_a_seed_is_the_first_image_of_that_seed(pipe):
    """Catches seeds of a file of prompts that are ignored, or move with the place in the file."""
    own = pipe(prompt=Prompts(("a", "b", "a"), seeds=(None, 5, 5)), seed=1)
    assert (own.images[1] == pipe(prompt="b", seed=5).images[0]).all()
    assert (own.images[2] == pipe(prompt="a", seed=5).images[0]).all()
    assert (own.images[0] == pipe(prompt="a", seed=1).images[0]).all()


def test_texts_stay_with_the_samples(pipe, tmp_path):
    """Catches samples without their texts, in an npz or a folder; a second call that draws again; other texts under the same
    name."""
    prompts = Prompts(("a photo of a cat", "ein Hünd"), asked=("cat", "Hund"))
    result = pipe.write(tmp_path / "x.npz", prompt=prompts)
    pipe.write(tmp_path / "folder", prompt=prompts)
    with np.load(result["out"], allow_pickle=False) as file:
        assert file["captions"].tolist() == list(prompts.texts) and file["prompts"].tolist() == list(prompts.asked)
        assert "labels" not in json.loads(str(file["made_by"]))
    assert shards.read(tmp_path / "folder").texts == prompts.stored()
    before = (tmp_path / "x.npz").read_bytes()
    pipe.write(tmp_path / "x.npz", prompt=prompts)
    assert (tmp_path / "x.npz").read_bytes() == before
    (tmp_path / "saved.npz").write_bytes(b"")
    assert pipe(prompt=prompts).save(tmp_path / "saved.npz").read_bytes() == before
    with pytest.raises(UserError, match="texts_sha256"):
        pipe.write(tmp_path / "x.npz", prompt=Prompts(prompts.texts, asked=("cat", "dog")))
    (tmp_path / "folder" / "texts.npz").unlink()
    with pytest.raises(UserError, match=r"texts\.npz"):
        shards.read(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "draws from text; give prompt="),
        ({"labels": [3], "prompt": "a"}, "takes text; give prompt=.* and no labels"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt='b' has no effect where guidance is off"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3, "guidance_scale": 2.0}, "3 negative prompts for 2 prompts"),
        ({"prompt": Prompts(("a",) * 8, seeds=(3,) * 8), "job": Interpolate((1, 2))}, "leave those of the prompts out"),
    ],
)
def test_other_requests_are_refused(pipe, arguments, said):
    """Catches a request that draws something else than it asks for."""
    with pytest.raises(UserError, match=said):
        pipe(**arguments)


def test_labels_take_no_prompt(tmp_path):
    """Catches a prompt that a network with labels ignores."""
    save_run(tmp_path / "run", tiny.config(), 0)
    with pytest.raises(UserError, match="takes labels and no text; leave prompt out"):
        dit_jax.load(tmp_path / "run")(prompt="a")


@pytest.mark.parametrize("lacks", ["", "text_encoder_3"])
def test_a_folder_of_diffusers_brings_its_encoders(tmp_path, lacks):
    """Catches an encoder or a tokenizer of another place of the pipeline, and a missing T5 that is asked for."""
    for number in ("", "_2", "_3"):
        for part in ("text_encoder", "tokenizer"):
            if f"{part}{number}" != lacks:
                (tmp_path / f"{part}{number}").mkdir()
    opened = trained._with_text_folders(trained.Trained(tmp_path, recipes.sd3()), tmp_path)
    text = Run(opened.config).conditioner
    assert text.missing == (("t5_xxl",) if lacks else ())
    assert text.by_encoder("weights").get("clip_g") == str(tmp_path / "text_encoder_2")
    assert text.by_encoder("tokenizers")["t5_xxl"] == str(tmp_path / "tokenizer_3")
    assert set(text.by_encoder("weights")) == set(text.used)


@pytest.mark.slow
def test_the_verb(folder, pipe, tmp_path):
    """Catches flags that draw other images than the library, and prompts and files of prompts given together."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    out = tmp_path / "x.npz"
    arguments = [f"--workdir={folder}", f"--out={out}", "--guidance_scale=2"]
    calls = [["sample", *arguments, "--prompts=prompts.txt", *more] for more in (["--negative_prompt=c"], ["--prompt=a"])]
    drawn, both = run_verbs(tmp_path, calls)
    assert drawn[0] == 0 and json.loads(drawn[1].splitlines()[-1])["num_samples"] == 2, drawn[2]
    refused(both, "give one of them")
    with np.load(out) as file:
        assert (file["arr_0"] == pipe(prompt=["a", "b"], negative_prompt="c", guidance_scale=2.0).images).all()
