"""Sweeps: from a file to runs, what they cost, running them, launching them elsewhere."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from kill_points import SHARES, check_every_kill, tree
from user_files import forgetful as forgetful
from user_files import write
from verbs import ROOT, quick_environment, start

from dit_jax.config_file import plain
from dit_jax.errors import UserError
from dit_jax.programs import chips
from dit_jax.report import style
from dit_jax.storage.claim import claim, claim_file
from dit_jax.sweep import checks, cost, grid, local, remote, report, scores
from dit_jax.sweep.folder import Folder, write_json
from dit_jax.sweep.grid import Sweep
from dit_jax.sweep.local import Child, Pace

DIGITS = "configs/digits.py"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def expand(**fields):
    return grid.expand(Sweep(**({"title": "t", "base": DIGITS} | fields)))


def test_grid_is_a_product():
    """A combination that is left out, or a run that does not get the values in its name."""
    runs = expand(
        variants={"small": {"model.depth": 1}, "large": {"model.depth": 2}},
        grid={"model.width": [32, 64], "optimizer.learning_rate": [1e-3, 1e-4], "num_steps": [7]},
        seeds=[3, 4],
    )
    assert len(runs) == len({run.name for run in runs}) == 16 and len({run.group for run in runs}) == 8
    run = next(run for run in runs if run.name == "large_width=64_learning_rate=0.0001_seed=4")
    config = run.config
    assert (config.model.depth, config.model.width, config.optimizer.learning_rate, config.seed, config.num_steps) == (
        2,
        64,
        1e-4,
        4,
        7,
    )
    assert config == grid.resolve(run.config_file, run.overrides, {})  # what main gets is what was checked


def test_variants_as_config_arguments():
    """Sizes of the config's own argument that all become the default one."""
    sweep = grid.load("configs/sweeps/gflops_imagenet256.py")
    runs = grid.expand(sweep, ["--config.data.path=/data"])
    assert len(runs) == 12 and runs[0].config_file == "imagenet:S/8,256"
    assert {run.config.model.patch_size for run in runs} == {2, 4, 8} and runs[-1].config.model.depth == 28
    assert all(run.config.data.path == "/data" for run in runs)


def test_sweep_file_as_its_own_config(tmp_path):
    """A config that exists as code only and could not be swept."""
    file = tmp_path / "own.py"
    file.write_text(
        textwrap.dedent("""
        from dit_jax import recipes
        from dit_jax.sweep.grid import Sweep
        def get_config(arg="1"):
            c = recipes.digits()
            c.model.depth = int(arg)
            return c
        def get_sweep():
            return Sweep(title="own", variants={"one": "1", "three": "3"})
        """)
    )
    assert [run.config.model.depth for run in grid.expand(grid.load(str(file)))] == [1, 3]


@pytest.mark.usefixtures("forgetful")
def test_names_in_the_grid_and_user_code(tmp_path):
    """A grid of samplers that is refused for their fields; a run whose process does not know what the sweep file registers."""
    source = """
        import dit_jax
        from dit_jax.diffusion.samplers import Euler
        from dit_jax.sweep.grid import Sweep
        class Mine(Euler): pass
        dit_jax.register("sampler", "mine", Mine)
        def get_sweep():
            return Sweep(title="t", base="configs/digits.py", grid={"sampler.name": ["ddpm", "heun", "mine"]})
        """
    file = write(tmp_path / "sweep.py", source)
    runs = grid.expand(grid.load(str(file)), ["--config.process.name=flow"])
    assert [set(run.config.sampler) for run in runs] == [{"name", "num_steps", "spacing"}, *[{"name", "num_steps"}] * 2]
    assert all(run.flags[0] == f"--import={file}" for run in runs) and runs[2].imports == [f"--import={file}"]


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"grid": {"model.wid": [1]}}, "no field"),
        ({"grid": {"model.width": [32.5]}}, "width must be a whole number"),
        ({"grid": {"mesh.zero1": ["False"]}}, "the flag would set False"),
        ({"grid": {"model.width": [None]}}, "width must be a whole number"),
        ({"base": "configs/nowhere.py"}, "does not exist"),
        ({"variants": {"a": "process=steam"}}, "process 'steam' does not exist"),
        ({"variants": {"a/b": {"model.width": 32}, "a-b": {"model.width": 64}}}, "same folder"),
        ({"variants": {"a": {"model.width": 32}}, "grid": {"model.width": [64]}}, "both set model.width"),
        ({"base": "configs/imagenet.py:S/2,256", "variants": {"a": "S/4,256"}}, "already has one"),
    ],
)
def test_bad_sweeps(fields, text):
    """A mistake in a sweep file that is found in the middle of the night, or never."""
    with pytest.raises(UserError, match=text):
        expand(**fields)


@pytest.mark.parametrize(
    "source, text",
    [
        ("def get_sweep(): return {}", r"s\.py, line 1: get_sweep\(\) returns a dict"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("y = 2", "get_sweep"),
        ("grid={'seed': 'abc'}", "list of at least"),
        ("seeds=[1, 1]", "twice"),
        ("samplers=['ddim']", "must be"),
    ],
)
def test_bad_sweep_files(tmp_path, source, text):
    """A stack trace instead of a sentence, or a text taken for a list of letters."""
    if not source.startswith(("def", "x", "y")):
        source = f"from dit_jax.sweep.grid import Sweep\ndef get_sweep(): return Sweep(title='t', {source})"
    (tmp_path / "s.py").write_text(source)
    with pytest.raises(UserError, match=text):
        grid.load(str(tmp_path / "s.py"))


def test_flags_of_all_runs_may_not_fight_the_grid():
    """An override that silently loses against the sweep file, or wins."""
    sweep = Sweep(title="t", base=DIGITS, grid={"model.width": [32, 64]})
    with pytest.raises(UserError, match=r"the sweep itself sets model\.width"):
        grid.expand(sweep, ["--config.model.width=16"])


def test_every_mistake_is_found_before_the_first_run():
    """A wrong run at the end of the grid that is found when its turn comes; an error that hides the others."""
    runs = expand(grid={"model.heads": [4, 3], "model.patch_size": [2, 3]})
    with pytest.raises(UserError, match=r"(?s)3 of 4 runs.*not a multiple.*does not divide"):
        checks.check(runs, [], "list")
    with pytest.raises(UserError, match=r"data\.path is empty"):
        checks.check(grid.expand(grid.load("configs/sweeps/gflops_imagenet256.py"))[:1], [], "remote")


@pytest.mark.parametrize(
    "sampler, text",
    [
        (("ddim", 2000), "steps"),
        (("dopri5", 5), "chooses its own"),
        (("ddim", None), "give its"),
        (("magic", 5), "is not registered"),
    ],
)
def test_bad_samplers(sampler, text):
    """A sampler that only fails when all models are trained."""
    with pytest.raises(UserError, match=text):
        checks.check(expand(), [sampler], "list")


def test_data_is_looked_for_before_local_runs(tmp_path):
    """A folder that does not exist, found by the first run, or by each."""
    with pytest.raises(UserError, match="2 of 2 runs cannot start"):
        checks.check(expand(base="configs/folder.py", grid={"data.path": [str(tmp_path / "none")]}, seeds=[0, 1]), [], "local")
    checks.check(expand(seeds=[0, 1]), [("ddim", 5)], "local")


def test_cost_of_xl2_is_the_papers():
    """Training compute off by the factor of the backward, the batch, or FLOPs against multiply-adds."""
    run = grid.expand(grid.load("configs/sweeps/gflops_imagenet256.py"))[-1]
    found = cost.count(run)
    assert found.parameters == 674_834_720
    assert found.gmacs == pytest.approx(118.64, rel=3e-3)
    assert found.compute_gmacs == pytest.approx(118.64 * 256 * 400_000 * 3, rel=3e-3)  # figure 9 of the paper: 3.6e10
    images_per_second = 0.4 * chips.CHIPS["h200"].peak_flops / (6 * found.gmacs * 1e9)
    assert cost.assumed_hours(found, "h200", 0.4) == pytest.approx(256 * 400_000 / images_per_second / 3600)
    measured = {"flops_per_image": 6 * found.gmacs * 1e9, "batch_size": 256, "images_per_second": 700.0, "num_devices": 2}
    assert cost.measured_hours(run, found, [measured]) == pytest.approx(2 * 256 * 400_000 / 700 / 3600)
    assert cost.measured_hours(run, found, [measured | {"batch_size": 64}]) is None
    with pytest.raises(UserError, match="choose one of v4"):
        cost.assumed_hours(found, "v7", 0.4)


def finish(folder, run, **result):
    where = folder.of(run)
    write_json(where / "config.json", plain(run.config))
    write_json(where / "result.json", {"step": run.config.num_steps, "loss": 0.1, "stopped": False} | result)


def test_states_of_runs(tmp_path):
    """A run that was cut or failed and is taken for finished, or finished and trained again."""
    folder = Folder(tmp_path, "t")
    done, cut, failed, _ = runs = expand(seeds=[0, 1, 2, 3])
    finish(folder, done)
    finish(folder, cut, step=cut.config.num_steps - 1)
    (folder.of(cut) / "checkpoints").mkdir()
    folder.of(failed).mkdir()
    (folder.of(failed) / "attempts.jsonl").write_text('{"status": 75}\n{"status": 1}\n{"stat')
    assert [folder.state(run) for run in runs] == ["done", "begun", "failed", "new"]


def test_a_folder_belongs_to_one_sweep(tmp_path):
    """Two sweeps that train the same runs at once, or one after the other with different settings."""
    runs = expand()
    with Folder(tmp_path, "t") as folder:
        folder.record(runs)
        with pytest.raises(UserError, match="a process that a killed one left behind"), Folder(tmp_path, "t"):
            pass
        finish(folder, runs[0])
        folder.check_configs(runs)
        with pytest.raises(UserError, match=r"model.width: 128 -> 64"):
            folder.check_configs([dataclasses.replace(expand(grid={"model.width": [64]})[0], name=runs[0].name)])
        assert folder.strangers([]) == ["run"]
    with pytest.raises(UserError, match="contains the sweep 't', not 'other'"), Folder(tmp_path, "other"):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child in /proc")
def test_a_run_left_behind_keeps_the_folder(tmp_path):
    """A killed sweep, started again, that trains a run a second time beside the one it left."""
    program = (
        "import sys\nfrom dit_jax.sweep.folder import Folder\nfrom dit_jax.sweep.local import Child\n"
        "from pathlib import Path\nw = Path(sys.argv[1])\nwith Folder(w, 't') as folder, Child(folder.lock) as child:\n"
        "    child.run(['sleep', '60'], w / 'log', lambda: None)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "w")], cwd=ROOT, env=environment)
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
    while not (left := children.read_text().split()):
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    with pytest.raises(UserError, match="left behind"), Folder(tmp_path / "w", "t"):
        pass
    os.kill(int(left[0]), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(UserError), Folder(tmp_path / "w", "t"):
            return
        time.sleep(0.05)
    pytest.fail("the folder is still locked")


MAIN = """
import json, pathlib, sys
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
if flags["config.seed"] == "1":
    print("Traceback\\nRuntimeError: the disk is on fire", file=sys.stderr); sys.exit(1)
if flags["config.seed"] == "2":
    sys.exit(75)
pathlib.Path(flags["workdir"], "result.json").write_text(json.dumps({"step": 1500, "loss": 0.1}))
"""


def test_a_failed_run_does_not_end_the_sweep_and_a_stopped_one_does(tmp_path, monkeypatch, capsys):
    """A night lost to the first run that fails; a preemption taken for a failure; a finished run trained again."""
    monkeypatch.setattr(local, "main_command", lambda run, workdir: ["-c", MAIN, *run.flags, f"--workdir={workdir}"])
    runs = expand(seeds=[0, 1, 3, 2, 4])
    costs = [cost.count(run) for run in runs]
    folder = Folder(tmp_path, "t")
    with Child() as child:
        assert local.train_all(runs, costs, folder, child) == [runs[1].name]
        assert child.stopping
    assert [folder.state(run) for run in runs] == ["done", "failed", "done", "new", "new"]
    said = capsys.readouterr().err
    assert "run 1 of 5" in said and "the disk is on fire" in said and "left" in said
    before = (folder.of(runs[0]) / "attempts.jsonl").read_text()
    with Child() as child:
        local.train_all(runs, costs, folder, child)
    assert (folder.of(runs[0]) / "attempts.jsonl").read_text() == before
    assert [a["status"] for a in folder.attempts(runs[1])] == [1, 1]


def test_a_signal_reaches_the_child(tmp_path):
    """A sweep that dies of SIGTERM and leaves its run training alone, or that starts the next one."""
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); print('x', flush=True)\n"
        "open(sys.argv[1], 'w').close(); time.sleep(60)"
    )

    def kill():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    with Child() as child:
        thread.start()
        status, _, seconds = child.run([sys.executable, "-c", program, str(tmp_path / "ready")], tmp_path / "log.txt")
        assert (status, child.stopping) == (75, True) and seconds < 30
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_scores_are_drawn_once(tmp_path, monkeypatch):
    """A finished score that is drawn again, images that fill the disk, or a failure recorded as a score."""
    calls = []

    class Fake:
        stopping = False

        def run(self, command, log):
            calls.append(command[2:])
            out = next((text for text in command if text.startswith("--out=")), None)
            if out:
                Path(out.removeprefix("--out=")).touch()
            return (1, "", 1.0) if "--num_steps=9" in command else (0, '{"fid": 2.5, "evaluations": 5, "seconds": 1.0}', 1.0)

    folder, (run,) = Folder(tmp_path, "t"), expand()
    finish(folder, run)
    (folder.of(run) / "samplers").mkdir()
    assert scores.score_all([run], [("ddim", 5), ("ddim", 9)], folder, Fake()) == ["run ddim-9"]
    assert scores.score_all([run], [("ddim", 5)], folder, Fake()) == [] and len(calls) == 3
    kept = {path.name for path in (folder.of(run) / "samplers").iterdir()}
    assert kept == {"ddim-5.json", "ddim-5.evaluation.json", "ddim-9.npz"}


@pytest.mark.parametrize("share", SHARES)
def test_killed_before_any_file_operation(tmp_path, monkeypatch, share):
    """A sweep that never starts again, a run or a score that is missing in its report, images or partial files that stay."""
    runs, sweep = expand(seeds=[0, 1]), Sweep(title="t", base=DIGITS, samplers=[("ddim", 5)])
    costs = [cost.count(run) for run in runs]

    def put(path, value):
        with claim_file(path, "writing"):
            write_json(path, value, indent=None)

    class Verbs(Child):  # that write at once what the verbs write
        def run(self, command, log, each_while=None):
            verb, flags = command[2], dict(text[2:].split("=", 1) for text in command[3:] if "=" in text)
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                file.write("...\n")
            if verb == "dit_jax.main":
                with claim(flags["workdir"], "training"):
                    put(Path(flags["workdir"]) / "metrics.jsonl", {"step": 9, "loss": 0.5})
                    put(Path(flags["workdir"]) / "result.json", {"step": 1500, "loss": 0.1, "stopped": False})
            else:
                put(flags["out"], {})
            return 0, '{"fid": 2.5, "evaluations": 5, "seconds": 1.0}', 1.0

    monkeypatch.setattr(style, "FORMATS", ("svg",))  # the quickest

    def whole(out):
        with Folder(out, "t") as folder:
            folder.record(runs)
            with Verbs(folder.lock) as child:
                failed = local.train_all(runs, costs, folder, child) + scores.score_all(runs, sweep.samplers, folder, child)
            assert not failed
            report.write(sweep, DIGITS, runs, costs, folder, "sweep")

    def ended(out):
        timed = re.compile(r".*\.log|log\.txt|results\.(json|csv)|report\.html")
        files = {name: data for name, data in tree(out).items() if not name.endswith("attempts.jsonl")}  # none of a killed start
        return {name: None if timed.fullmatch(Path(name).name) else data for name, data in files.items()}

    assert len(check_every_kill(tmp_path, whole, share, ended)) > 60


def test_a_line_of_attempts_that_a_kill_has_cut(tmp_path, monkeypatch):
    """The next attempt, written behind half a line and never read."""
    monkeypatch.setattr(local, "main_command", lambda run, workdir: ["-c", "pass"])
    folder, (run,) = Folder(tmp_path, "t"), expand()
    folder.of(run).mkdir(parents=True)
    (folder.of(run) / "attempts.jsonl").write_text('{"status": 1}\n{"stat')
    with Child() as child:
        local.train(run, folder, child)
    assert [attempt["status"] for attempt in folder.attempts(run)] == [1, 0]


def test_pace():
    """A time left that takes the small runs for the large ones."""
    pace = Pace([(10.0, 21.0)])
    assert pace.expect(500.0) == 21.0
    pace.seen.append((110.0, 121.0))
    assert pace.expect(210.0) == pytest.approx(221.0) and pace.expect(0.0) == 21.0


def test_launch_scripts(tmp_path):
    """Commands that a shell tears apart, a task that trains another run than its name says, or names that GKE refuses."""
    runs = expand(variants={"Big One/2": {"model.width": 64}, "small": {"model.width": 32}}, seeds=[0, 1])
    script, command = remote.write("slurm", "t", runs, tmp_path, "/shared/sw eep", ["--nodes=2"])
    assert command.startswith("sbatch --array=0-3 --nodes=2 ")
    text = script.read_text().replace("exec bash launch/slurm.sbatch", "printf '%s\\n'")
    environment = {"SLURM_ARRAY_TASK_ID": "2", "PATH": os.environ["PATH"]}
    shown = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown == [*runs[2].flags, f"--workdir=/shared/sw eep/runs/{runs[2].name}"]
    assert "#SBATCH --requeue" in script.read_text()

    options = ["--image=repo/dit:1", "--bucket=bucket", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--dry-run"]
    script, _ = remote.write("gke", "t", runs, tmp_path, "/gcs/sweep", options)
    shown = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True).stdout
    for run, name in zip(runs, remote.job_names("t", [run.name for run in runs]), strict=True):
        assert f'"--workdir=/gcs/sweep/runs/{run.name}"' in shown and f'name: "{name}"' in shown
    with pytest.raises(UserError, match="which the sweep sets"):
        remote.write("gke", "t", runs, tmp_path, "/gcs/sweep", ["--name=x"])


def sweep_file(folder, **fields):
    file = folder / "tiny.py"
    common = {
        "model.depth": [1],
        "preview.every_steps": [0],
        "batch_size": [8],
        "evaluation.num_images": [40],
        "evaluation.batch_size": [40],
        "sampler.num_steps": [3],
        "log.every_steps": [2],
        "num_steps": [6],
    }
    file.write_text(
        f"from dit_jax.sweep.grid import Sweep\ndef get_sweep():\n"
        f"    return Sweep(title='tiny', base='configs/digits.py', grid={common}, **{fields!r})\n"
    )
    return file


def test_the_verb_lists_and_refuses(tmp_path):
    """A list without its last line of JSON; a mistake that costs a stack trace."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    listed = start(
        [
            "-m",
            "dit_jax.sweep",
            f"--sweep={sweep_file(tmp_path, seeds=[0, 1])}",
            "--list",
            "--chip=h200",
            "--config.model.width=32",
        ],
        tmp_path,
    )
    assert listed.returncode == 0, listed.stderr
    rows = json.loads(listed.stdout.splitlines()[-1])["runs"]
    assert [row["name"] for row in rows] == ["run_seed=0", "run_seed=1"] and rows[0]["device_hours"] > 0
    assert "2 runs" in listed.stderr and "assumed MFU of 40%" in listed.stderr


@pytest.mark.slow
def test_a_whole_sweep(tmp_path):
    """A sweep whose pieces do not fit together: killed in the middle, gone on with, scored, reported."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    file = sweep_file(tmp_path, variants={"narrow": {"model.width": 16}, "wide": {"model.width": 32}}, samplers=[("ddim", 2)])
    args = ["-m", "dit_jax.sweep", f"--sweep={file}", f"--workdir={tmp_path / 'w'}"]
    process = subprocess.Popen([sys.executable, *args], cwd=tmp_path, env=quick_environment(), stderr=subprocess.PIPE, text=True)
    with contextlib.closing(process.stderr):
        while "run 2 of 2" not in (line := process.stderr.readline()):
            assert line, "the sweep ended early"
        process.terminate()
        process.stderr.read()
    assert process.wait(120) == 75
    ended = start(args, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "1 of 2 runs are finished" in ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    rows = json.loads((tmp_path / "w" / "results.json").read_text())["runs"]
    assert result["done"] == 2 and [row["state"] for row in rows] == ["done", "done"]
    assert all(row["fid"] > 0 and row["loss_curve"] and row["samplers"][0]["fid"] > 0 for row in rows)
    page = (tmp_path / "w" / "report.html").read_text()
    assert page.count("<figure") == 5 and "narrow" in page
