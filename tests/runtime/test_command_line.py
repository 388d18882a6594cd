"""Flags in groups, --help, and messages for mistakes in flags."""

import json
import re

import pytest
from paths import ROOT
from verbs import run_verbs

from dit_jax import build, registry
from dit_jax.__main__ import ORDER, configs, main
from dit_jax.errors import nearest
from dit_jax.interop import download

assert build  # registers the package's constructors

CONFIG = ["--config=digits", "--workdir=w"]
MISTAKES = {
    "a field of the config": (
        ["main", *CONFIG, "--batch_size=64"],
        "did you mean --config.batch_size=64 or --config.evaluation.b",
    ),
    "in a section": (["main", *CONFIG, "--learning_rate=1"], "did you mean --config.optimizer.learning_rate=1?"),
    "with its section": (["plan", "--config", "digits", "--model.depth=3"], "did you mean --config.model.depth=3?"),
    "config misspelt": (["main", *CONFIG, "--confg.model.depth=3"], "did you mean --config.model.depth=3?"),
    "a flag misspelt": (["main", *CONFIG, "--wrokdir=x"], "did you mean --workdir?"),
    "a flag without a config": (["benchmark", "--whta=vae"], "benchmark has no flag --whta; did you mean --what?"),
    "a field of all runs": (["sweep", "--sweep=digits", "--batch_size=64"], "given as --config.batch_size=64"),
    "a verb without a config": (["sample", "--workdir=w", "--config.sampler.num_steps=5"], "did you mean --num_steps=5?"),
    "a field of a sampler": (["sample", "--workdir=w", "--config.sampler.eta=1"], "did you mean --sampler_fields=eta=1?"),
    "a whole number": (["sample", "--workdir=w", "--num_samples=1e1.5"], "--num_samples=1e1.5 must be a whole number"),
    "a whole number in short": (["sample", "--workdir=w", "--num_samples=1e3"], "config.json does not exist"),
    "true or false": (["main", *CONFIG, "--show=maybe"], "--show=maybe must be true or false"),
    "one of a few": (["benchmark", "--what=train"], "--what=train must be one of train_step, forward, sampler"),
    "a value for --nolist": (["sweep", "--nolist=3"], "does not take an argument"),
    "a field before --config": (["main", "--config.num_steps=x", "--config", "digits"], "num_steps must be a whole number"),
    "a word": (["main", "digits"], "did you mean --config=digits?"),
    "a value with spaces": (["main", *CONFIG, "--config.optimizer={'a':", "1}"], "a value with spaces needs quotes"),
    "no value": (["main", "--config", "--workdir=w"], "--config has no value"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    calls = [args for args, _ in MISTAKES.values()]
    helps = [[verb, "--help"] for verb in ORDER]
    found = run_verbs(tmp_path_factory.mktemp("flags"), [*calls, *helps])
    return dict(zip(MISTAKES, found, strict=False)), dict(zip(ORDER, found[len(calls) :], strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(outcomes, mistake):
    """A flag that is refused without saying which one does it; Python's own words; more than two lines."""
    status, stdout, stderr = outcomes[0][mistake]
    assert status == 2 and MISTAKES[mistake][1] in stderr and not stdout, stderr
    assert len(stderr.strip().splitlines()) <= 2 and "Traceback" not in stderr and r"\'" not in stderr


@pytest.mark.parametrize("verb", ORDER)
def test_help(outcomes, verb):
    """A path of this machine as a heading, a default of None, examples below the flags, or a flag that is left out."""
    status, text, stderr = outcomes[1][verb]
    file = ROOT / "dit_jax" / ("main.py" if verb == "main" else f"{verb}/__main__.py")
    assert status == 0 and not stderr
    assert str(ROOT) not in text and ".py:\n" not in text and "None" not in text and "<float32|" not in text
    lines = text.splitlines()
    assert lines[2].startswith(f"    python -m dit_jax.{verb} ")
    flags = set(re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE))
    assert flags >= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', file.read_text())) | {"import"}
    headings = [
        number for number, line in enumerate(lines) if re.fullmatch(r"[A-Z].*:", line) and lines[number + 1][:4] == "  --"
    ]
    assert len(headings) >= 2 and max(map(len, lines)) <= 150


def test_the_list_of_verbs_and_configs(capsys, monkeypatch):
    """`python -m dit_jax train` that prints a list as if nothing was asked; a config that cannot be found without the folder."""
    monkeypatch.chdir(ROOT)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in (*ORDER, "digits", "imagenet", "gflops_imagenet256"))
    assert all(len(line) > 20 for line in (configs() | configs("sweeps")).values())
    assert main(["train", "--config=digits"]) == 2 and "write python -m dit_jax.main" in capsys.readouterr().err
    assert main(["evalaute"]) == 2 and "write python -m dit_jax.evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, names, found",
    [
        ("lr", ["learning_rate", "b1"], "learning_rate"),
        ("widht", ["width", "depth"], "width"),
        ("steps", ["num_steps", "seed"], "num_steps"),
        ("xyz", ["num_steps"], None),
    ],
)
def test_nearest(name, names, found):
    """A suggestion that is missing where there is one, or made up where there is none."""
    assert nearest(name, names) == found


def test_show(tmp_path):
    """Values that are not those of the command line; a last line that is no JSON."""
    ((status, stdout, _),) = run_verbs(tmp_path, [["main", "--config.sampler.name=heun", "--config=digits", "--show"]])
    assert status == 0 and "  name = 'heun'  (str)\n" in stdout and "\noptimizer\n" in stdout
    assert json.loads(stdout.splitlines()[-1])["num_fields"] > 60 and not (tmp_path / "runs").exists()


def test_choices_in_texts_are_those_that_exist(outcomes):
    """A sampler or a download that --help does not name; the texts are written out, so that flags need no imports of JAX."""
    helps = {verb: " ".join(outcomes[1][verb][1].split()) for verb in ("sample", "convert")}
    own = sorted(name for name in registry.names("sampler") if registry.origin("sampler", name) is None)
    assert f"One of {', '.join(own)}, or one of --import" in helps["sample"]
    assert f"{', '.join([*download.PUBLISHED][:-1])} or {[*download.PUBLISHED][-1]}." in helps["convert"]
