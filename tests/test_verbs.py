"""The verbs as a user meets them: a process, its exit status, and the last line of stdout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verbs import ROOT, refused, run_verbs, start

from dit_jax.runtime.console import duration

TINY = [
    f"--config.{field}"
    for field in (
        "num_steps=4",
        "batch_size=8",
        "model.depth=1",
        "model.width=32",
        "preview.every_steps=0",
        "sampler.num_steps=3",
        "evaluation.num_images=20",
        "evaluation.batch_size=20",
    )
]


def verb(name, *args):
    return start(["-m", f"dit_jax.{name}", *args], ROOT)


def result(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("verbs") / "run"
    done = result(verb("main", "--config=configs/digits.py", f"--workdir={path}", *TINY))
    assert done["step"] == 4 and done["num_samples"] == 20 and done["fid"] > 0 and Path(done["checkpoint"]).is_dir()
    assert (path / "report.html").is_file() and done["machine"]["cores"] > 0
    assert Path(done["samples"]).is_file() and Path(done["samples"]).with_suffix(".png").is_file()
    return path


def test_sample_and_evaluate(workdir, tmp_path):
    """Sampling that needs more than the folder, ignores its flags, or writes what evaluate cannot read."""
    moved = tmp_path / "elsewhere"
    workdir.rename(moved)
    out = tmp_path / "x.npz"
    done = result(
        verb(
            "sample",
            f"--workdir={moved}",
            "--num_samples=6",
            "--labels=3,5",
            "--guidance_scale=1.5",
            "--sampler=ddim",
            "--num_steps=2",
            "--seed=4",
            f"--out={out}",
        )
    )
    moved.rename(workdir)
    assert done["num_samples"] == 6 and done["evaluations"] == 4 and done["step"] == 4
    with np.load(out) as file:
        assert file["arr_0"].shape == (6, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        assert file["labels"].tolist() == [3, 5, 3, 5, 3, 5]
        made_by = json.loads(str(file["made_by"]))
    assert made_by["sampler"]["name"] == "ddim" and made_by["guidance"]["scale"] == 1.5 and made_by["seed"] == 4
    assert Image.open(out.with_suffix(".png")).size[0] > 8
    scored = result(verb("evaluate", f"--samples={out}", "--reference=digits", "--features=pixels"))
    assert scored["num_samples"] == 6 and scored["num_reference"] == 1797 and scored["fid"] > 0


DIGITS = ["--config=configs/digits.py", "--workdir=W"]
MISTAKES = {
    "unknown key": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.batchsize=3"], "batchsize"),
    "unknown file": ("main", ["--config=configs/nowhere.py", "--workdir=W"], "nowhere.py"),
    "field of another constructor": (
        "main",
        ["--config.process.schedule=x", "--config.process.name=flow", *DIGITS],
        "no field schedule",
    ),
    "a field without its section": ("main", [*DIGITS, "--batch_size=64"], "--config.batch_size"),
    "a field without a config": ("plan", ["--config.batch_size=64"], "without --config"),
    "no such import": ("evaluate", ["--import=nowhere.py"], "nowhere.py does not exist"),
    "wrong type": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.batch_size=many"], "many"),
    "bad argument": ("main", ["--config=configs/imagenet.py:XL/3,256", "--workdir=W"], "XL/3"),
    "patch": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.transform.resolution=9"], "not a multiple"),
    "heads": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.model.heads=5"], "does not divide"),
    "mesh": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.mesh.fsdp=64"], "needs 64 devices"),
    "no vae": ("main", ["--config=configs/digits_latent.py", "--workdir=W"], "codec.path is empty"),
    "no data, no codec, no reference": (
        "main",
        [
            "--config=configs/xl2_imagenet256.py",
            "--workdir=W",
            "--config.data.path=W/data",
            "--config.codec.path=W/codec",
            "--config.evaluation.num_images=100",
            "--config.evaluation.features=inception",
            "--config.evaluation.reference=W.npz",
        ],
        "4 things to mend",
    ),
    "no reference": ("main", ["--config=configs/digits.py", "--workdir=W", "--config.evaluation.reference=/none"], "/none does"),
    "no run": ("sample", ["--workdir=W"], "config.json does not exist"),
    "no npz": ("evaluate", ["--samples=W/x.npz", "--reference=digits"], "does not exist"),
    "stray word": ("evaluate", ["digits"], "unexpected argument"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    calls = [[name, *(arg.replace("=W", f"={folder / 'run'}") for arg in args)] for name, args, _ in MISTAKES.values()]
    return folder, dict(zip(MISTAKES, run_verbs(folder, calls), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(outcomes, mistake):
    """A stack trace for a user's mistake, a zero exit status, or a folder left behind."""
    folder, found = outcomes
    refused(found[mistake], MISTAKES[mistake][2])
    assert not (folder / "run").exists()


def test_sampling_mistakes(workdir, tmp_path):
    """A label, sampler or step that is clamped instead of refused; images from random weights where nothing was saved yet."""
    mistakes = {
        "--labels=3,10": "label 10 is out of range",
        "--out=/proc/x.npz": "cannot be written",
        "--labels=three": "separated by commas",
        "--num_samples=0": "at least 1",
        "--sampler=magic": "sampler 'magic' is not registered",
        "--num_steps=1001": "lie in 1 to 1000 (process.num_timesteps)",
        "--step=3": "no checkpoint of step 3",
        "--out=x.png": "must end in .npz",
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((workdir / "config.json").read_text())
    calls = [["sample", f"--workdir={workdir}", arg] for arg in mistakes] + [["sample", f"--workdir={empty}"]]
    for outcome, text in zip(run_verbs(tmp_path, calls), [*mistakes.values(), "no checkpoint in"], strict=True):
        refused(outcome, text)


def test_help_is_a_success(tmp_path):
    """Scripts that ask for --help and see a failure."""
    ((status, stdout, _),) = run_verbs(tmp_path, [["plan", "--help"]])
    assert status == 0 and "--models" in stdout.replace("--[no]models", "--models")


@pytest.mark.slow
def test_plan_models(tmp_path):
    """A table with another model under a name, or a count in other units than the paper's."""
    ((status, stdout, stderr),) = run_verbs(tmp_path, [["plan", "--models"]])
    assert status == 0, stderr
    models = json.loads(stdout.splitlines()[-1])["models"]
    assert models["XL/2@256"]["params"] == 674_834_720 and models["XL/2@512"]["gmacs"] == pytest.approx(524.6, rel=3e-3)
    names = "ADM@64 ADM@128 ADM@256 ADM@512 LDM-4@256 LDM-8@256 ADM-U@256 ADM-U@512 HDiT-S@256 HDiT-M@256 HDiT-L@256"
    names += " DiffiT@256 DiffiT@512"
    assert models.keys() >= set(names.split())
    assert models["LDM-4@256"]["params"] == 401_433_091 and models["ADM-U@256"]["cascade"]["gmacs"] == pytest.approx(
        741.3, rel=1e-4
    )
    assert models["B/4@256"]["train_flops_per_image"] == pytest.approx(6 * 5.56e9, rel=3e-3)
    assert models["XL/2@256 cross_attention"]["tokens"] == 256 and "XL/2@512" in stderr
    assert models["XL/2@256"]["fids"][-1] == {"value": 2.27, "setting": "guidance 1.5", "source": "Peebles & Xie 2023, table 2"}


@pytest.mark.parametrize("seconds, text", [(8.2, "8s"), (75, "1m15s"), (3725, "1h02m"), (59.7, "1m00s")])
def test_duration(seconds, text):
    """1m60s."""
    assert duration(seconds) == text


def test_every_verb_is_listed():
    """A verb that `python -m dit_jax` leaves out, or lists without saying what it does."""
    from dit_jax.__main__ import ORDER, verbs

    listed = verbs()
    assert set(listed) == set(ORDER)
    assert all(line.endswith(".") and 20 < len(line) <= 130 for line in listed.values()), listed
