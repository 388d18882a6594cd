"""Minutes long: the README's run, a run killed again and again, a run on photographs."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from verbs import command, environment, run

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_digits(tmp_path):
    """A model, loss, sampler or guidance that trains without complaint and draws something else than the asked-for digit."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    result, progress = run("main", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}")
    assert result["num_samples"] == 1000 and result["num_reference"] == 1797
    assert result["fid"] < 1.0, progress
    guided, _ = run(
        "sample", f"--workdir={tmp_path / 'run'}", "--num_samples=1000", "--guidance_scale=1.5", f"--out={tmp_path / 'x.npz'}"
    )
    digits = load_digits()
    judge = SVC(gamma=0.001, C=10).fit(digits.data[:1500], digits.target[:1500])
    assert judge.score(digits.data[1500:], digits.target[1500:]) > 0.95
    with np.load(guided["out"]) as samples:
        features = samples["arr_0"].reshape(1000, 64) * (16 / 255)
        assert (judge.predict(features) == samples["labels"]).mean() >= 0.95


@pytest.mark.faults
@pytest.mark.parametrize("most, steps", [(5, 120), pytest.param(20, 400, marks=pytest.mark.exhaustive)])
def test_killed_while_it_saves(tmp_path, most, steps):
    """State that only survives an orderly exit: after kills while Orbax writes, the parameters equal those of an undisturbed run,
    bit for bit; leftovers of saves."""

    def start(workdir):
        return command(
            "main",
            "--config=configs/digits.py",
            f"--workdir={workdir}",
            f"--config.num_steps={steps}",
            "--config.checkpoint.every_steps=7",
            "--config.preview.every_steps=0",
            "--config.evaluation.num_images=0",
            "--config.model.depth=1",
            "--config.model.width=64",
            "--config.log.every_steps=5",
        )

    whole = subprocess.run(start(tmp_path / "whole"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    rng, kills = np.random.default_rng(int(time.time())), 0
    saves = tmp_path / "killed" / "checkpoints"
    for _ in range(most + 5):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(start(tmp_path / "killed"), cwd=ROOT, env=environment(), stdout=log, stderr=log)
        if kills == most:
            assert process.wait(300) == 0, (tmp_path / "log").read_text()
            break
        seen = old = set(saves.glob("*-tmp"))
        wanted = rng.integers(1, 4)  # saves: some are finished before the kill
        while process.poll() is None and len(seen - old) < wanted:
            seen = seen | set(saves.glob("*-tmp"))
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills > 0
    names = [sorted(str(path.relative_to(tmp_path / name)) for path in listed(tmp_path / name)) for name in ("whole", "killed")]
    assert names[0] == names[1]
    final = [arrays(tmp_path / name / "checkpoints", steps) for name in ("whole", "killed")]
    for a, b in zip(*final, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
@pytest.mark.parametrize("most", [100])
def test_killed_at_random_moments_of_whole_runs(tmp_path, most):
    """A run that some kill of start-up, steps, saves, previews, scores, sampling or the report leaves unable to finish, or that
    ends with other weights, samples, scores or files than an undisturbed one.

    A run is killed and started again until it ends; then the next run begins, until there were `most` kills.
    """

    def start(workdir):
        fields = ("num_steps=60", "checkpoint.every_steps=9", "log.every_steps=5", "model.depth=1", "model.width=32")
        fields += ("preview.every_steps=20", "preview.num_images=8", "scoring.every_steps=15", "scoring.num_images=200")
        fields += ("scoring.sampler.num_steps=4", "evaluation.num_images=400", "evaluation.batch_size=50", "sampler.num_steps=8")
        fields += ("loader.num_workers=2", "evaluation.reference=digits")
        return command("main", "--config=configs/digits.py", f"--workdir={workdir}", *(f"--config.{field}" for field in fields))

    def live(workdir, seconds):
        """The status of a life that is killed after so many seconds, unless it ends before."""
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(start(workdir), cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def ended(workdir):
        result = json.loads((workdir / "result.json").read_text())
        final = [arrays(workdir / "checkpoints", 60)[0].tobytes(), (workdir / "samples.npz").exists()]
        names = sorted(str(path.relative_to(workdir)) for path in listed(workdir))
        return [result[name] for name in ("step", "loss", "fid", "samples_sha256")], names, final

    begin = time.monotonic()
    assert live(tmp_path / "whole", 600) == 0, (tmp_path / "log").read_text()
    length, whole, rng, kills, runs = time.monotonic() - begin, ended(tmp_path / "whole"), np.random.default_rng(), 0, 0
    while kills < most:
        workdir, runs = tmp_path / f"run{runs}", runs + 1
        for _ in range(40):
            status = live(workdir, rng.uniform(0, 0.8 * length))
            kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), (status, (tmp_path / "log").read_text())
            if status == 0:
                break
        assert ended(workdir) == whole, f"run {runs}, after {kills} kills"
        print(f"{kills} kills, {runs} runs equal", flush=True)


def listed(workdir):
    """All files of a run but those of TensorBoard and inside of checkpoints, whose names are random."""
    return [path for path in workdir.rglob("*") if not re.search(r"tensorboard.|checkpoints/\d+/", str(path))]


def arrays(checkpoints, steps):
    """Every array of the last checkpoint."""
    import ml_collections

    from dit_jax import build
    from dit_jax.storage.checkpoints import restore_subtree
    from dit_jax.storage.run_folder import read_config
    from dit_jax.tasks.state import abstract_state

    config = ml_collections.ConfigDict(read_config(checkpoints.parent))
    state = abstract_state(build.Run(config).task, build.make_mesh(1, 1, 1, jax.devices()[:1]))
    names = ("params", "ema_params", "opt_state")
    restored, _, step = restore_subtree(checkpoints, {name: getattr(state, name) for name in names})
    assert step == steps
    return [np.asarray(x) for x in jax.tree.leaves(restored)]


@pytest.mark.exhaustive
def test_photographs(tmp_path):
    """The main job on a folder of JPEGs: a crop, channel order or scale that nothing can be learned from."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for photo, name in zip(load_sample_images().images, ("china", "flower"), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            side = int(rng.integers(100, 400))
            top, left = rng.integers(0, photo.shape[0] - side), rng.integers(0, photo.shape[1] - side)
            Image.fromarray(photo[top : top + side, left : left + side]).save(tmp_path / "photos" / name / f"{i}.jpg")
    run(
        "main",
        "--config=configs/folder.py:S/8,32,2",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'photos'}",
        "--config.num_steps=100",
        "--config.batch_size=16",
        "--config.log.every_steps=10",
        "--config.preview.every_steps=100",
        "--config.preview.num_images=8",
        "--config.sampler.num_steps=10",
        "--config.loader.num_workers=2",
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "run" / "samples" / "00000100.png").is_file()


@pytest.mark.exhaustive
def test_two_processes_are_one(tmp_path):
    """Hosts that read the same rows, draw the same noise, or write each other's part: two processes must give one's images."""
    fields = (
        "num_steps=12",
        "model.depth=2",
        "model.width=64",
        "log.every_steps=4",
        "checkpoint.every_steps=6",
        "mesh.fsdp=2",
        "preview.every_steps=0",
        "sampler.num_steps=5",
        "evaluation.num_images=64",
        "evaluation.batch_size=64",
    )
    losses, images = [], []
    for processes, devices in ((2, 4), (1, 8)):
        workdir = tmp_path / str(processes)
        train = command("main", "--config=configs/digits.py", f"--workdir={workdir}", *(f"--config.{field}" for field in fields))
        launcher = [sys.executable, "launch/local.py", f"--processes={processes}", f"--devices={devices}"]
        process = subprocess.run(
            [*launcher, f"--logs={workdir}_logs", "--", *train],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert process.returncode == 0, process.stderr
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        images.append(np.load(workdir / "samples" / "00000012_final.npz")["arr_0"].astype(int))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert np.abs(images[0] - images[1]).max() <= 1
