"""Each flag of each verb is used by the chosen mode, or refused."""

import json

import pytest
from pages import commands
from paths import ROOT
from verbs import start

# Runs `check_flags` of a verb, each verb in a fork of its own, because two define the same flags.
CHECK = """
import importlib, json, os, sys
from absl import flags
from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console

def outcome(module, args):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(command_line.config_fields(["verb", *args]))
    try:
        module.check_flags()
    except UserError as error:
        return str(error)
    return ""

def value(flag):
    kinds = {flags.IntegerParser: "3", flags.FloatParser: "0.5", flags.EnumParser: None, flags.BooleanParser: "true"}
    text = next((text for kind, text in kinds.items() if isinstance(flag.parser, kind)), "x")
    return flag.parser.enum_values[-1] if text is None else text

modes, values, documented = json.loads(sys.argv[1])
command_line.define_common_flags()
before = set(flags.FLAGS)
for verb, bases in modes.items():
    child = os.fork()
    if not child:
        module = importlib.import_module("dit_jax.main" if verb == "main" else f"dit_jax.{verb}.__main__")
        found = {}
        names = sorted(set(flags.FLAGS) - before)
        for mode, base in bases.items():
            given = {arg.lstrip("-").partition("=")[0] for arg in base}
            for name in set(names) - given:
                text = values.get(name) or value(flags.FLAGS[name])
                arg = "--config.seed=3" if name == command_line.CONFIG_FIELD else f"--{name}={text}"
                found[f"{mode} {name}"] = outcome(module, [*base, arg])
            found[f"{mode} "] = outcome(module, base)
        uses = {mode: sorted(names) for mode, names in getattr(module, "USES", {}).items()}
        print(json.dumps([verb, names, uses, found, [outcome(module, args) for args in documented[verb]]]), flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, verb
"""
NETWORK = ["train_step", "forward", "sampler"]
MODES = {  # of each verb that has several: what chooses the mode, as in its USES
    "main": {"--show": ["--config=digits", "--show"], "--from": ["--from=runs/a"], "no --from": ["--config=digits"]},
    "sample": {
        f"{source} --job={job}": [f"{source}={path}", f"--job={job}", *more]
        for source, path in (("--workdir", "w"), ("--weights", "w.safetensors"))
        for job, more in (("generate", []), ("edit", []), ("inpaint", []), ("interpolate", ["--seeds=1,2"]))
    },
    "demo": {"--workdir": ["--workdir=w"], "--weights": ["--weights=w.safetensors"]},
    "evaluate": {
        "--table": ["--table=a.json,b.json"],
        "--make_reference": ["--make_reference=r.npz", "--data=folder:x"],
        "--samples": ["--samples=x.npz", "--reference=r.npz"],
        "--validation": ["--validation=runs/a"],
    },
    "encode": {"--verify": ["--verify", "--out=cache"], "encoding": ["--out=cache"]},
    "convert": {
        "the download of an autoencoder, which is used as it is": ["--download=sd-vae-ft-mse"],
        "--download without --out": ["--download=dit-xl2-256"],
        "a conversion": ["--from=official", "--weights=w.pt", "--out=w.safetensors"],
    },
    "sweep": {
        "--list": ["--sweep=digits", "--list", "--chip=h200"],
        "--report": ["--sweep=digits", "--report", "--chip=h200", "--workdir=w"],
        "--launch=slurm": ["--sweep=digits", "--launch=slurm", "--chip=h200", "--workdir=w"],
        "--launch=local": ["--sweep=digits", "--chip=h200", "--workdir=w"],
    },
    "plan": {
        "--models": ["--models"],
        "--table": ["--table=v5e:4x4"],
        "--table --bill": ["--table=v5e:4x4", "--bill"],
        "--bill": ["--config=digits", "--bill"],
        "--search": ["--config=digits", "--search"],
        "no --search": ["--config=digits"],
    },
    "benchmark": {what: [f"--what={what}", "--compare"] for what in NETWORK}
    | {what: [f"--what={what}"] for what in ("vae", "images", "latents", "checkpoint", "startup", "scaling", "evaluation")},
}
VALUES = {"metrics": "fid", "from": "official", "to": "diffusers", "launch": "gke", "axis": "data"}
# Flags that belong to every mode; those that choose another mode; those that a mode refuses with words of its own.
EVERYWHERE = {
    "main": {"config", "config.<field>"},
    "encode": {"out"},
    "benchmark": {"what", "table"},
    "sweep": {"sweep", "workdir", "config.<field>", "chip", "mfu"},
}
CHOOSES = {
    "main no --from": {"show", "from"},
    "encode encoding": {"verify"},
    "plan no --search": {"search", "bill"},
    "plan --bill": {"search"},
    "plan --table": {"bill"},
    "convert --download without --out": {"out"},
}
OTHERWISE = {
    "convert": {"a conversion": {"step", "average"}},  # of runs alone, see `formats.Source`
    "sweep": {  # three ways to estimate; what starts nothing has no launch
        "--list": {"report", "launch", "launch_args", "remote_workdir", "topology", "benchmarks"},
        "--report": {"list", "launch", "launch_args", "remote_workdir", "topology", "benchmarks"},
        "--launch=slurm": {"list", "report", "topology", "benchmarks"},
        "--launch=local": {"launch_args", "remote_workdir", "topology", "benchmarks"},
    },
}


@pytest.fixture(scope="module")
def outcomes():
    """{verb: (its flags, its USES, {"mode flag": what `check_flags` says}, [what it says of documented commands])}."""
    documented = {verb: [command for command in commands() if command.verb == verb] for verb in MODES}
    args = {verb: [command.args for command in found] for verb, found in documented.items()}
    process = start(["-c", CHECK, json.dumps([MODES, VALUES, args])], ROOT)
    assert process.returncode == 0, process.stderr
    found = {verb: rest for verb, *rest in map(json.loads, process.stdout.splitlines())}
    return {verb: (*rest, list(zip(documented[verb], refusals, strict=True))) for verb, (*rest, refusals) in found.items()}


@pytest.mark.parametrize("verb", MODES)
def test_a_flag_that_a_mode_does_not_use_is_refused(outcomes, verb):
    """A flag that is accepted and ignored, as `evaluate --split` was; a new flag that no mode names."""
    names, uses, found, _ = outcomes[verb]
    own = {name for used in uses.values() for name in used}
    if verb not in ("sample", "sweep"):
        assert set(names) == own | EVERYWHERE.get(verb, set())
    wrong = []
    for mode, base in MODES[verb].items():
        assert found[f"{mode} "] == "", f"{verb} {mode}"
        given = {arg.lstrip("-").partition("=")[0] for arg in base}
        unused = own - set(uses.get(mode, own)) | OTHERWISE.get(verb, {}).get(mode, set())
        for name in set(names) - given - CHOOSES.get(f"{verb} {mode}", set()):
            said = found[f"{mode} {name}"]
            if name in unused:
                wrong += [] if said and f"--{name}".replace("<field>", "seed") in said else [f"{mode}: --{name} is ignored"]
            else:
                wrong += [f"{mode}: {said}"] if "no effect" in said else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("verb", MODES)
def test_documented_commands_use_their_flags(outcomes, verb):
    """A command of the documentation with a flag that has no effect."""
    wrong = [f"{command.place}: {said}" for command, said in outcomes[verb][-1] if "no effect" in said]
    assert not wrong, "\n".join(wrong)
