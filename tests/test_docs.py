"""README and docs as a reader follows them: commands and Python are read out of the pages; what can be run is run."""

import ast
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import FILES, blocks, commands, runnable, spans, text_of
from paths import ROOT
from PIL import Image
from verbs import Forks, quick_environment, start

from dit_jax import build, config_file, registry
from dit_jax.__main__ import verbs

assert build  # registers the package's constructors
BLOCKS, COMMANDS = blocks(), commands()
MARKED = [block for block in BLOCKS if block.mark]

# Parses commands as the verbs do: every verb in a fork of its own, because two define the same flags.
PARSE = """
import importlib, json, os, sys
from absl import flags
from dit_jax import build, config_file
from dit_jax.errors import UserError
from dit_jax.runtime import command_line
for verb, calls in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        importlib.import_module("dit_jax.main" if verb == "main" else f"dit_jax.{verb}.__main__")
        command_line.define_common_flags()
        errors = []
        for args in calls:
            flags.FLAGS.unparse_flags()
            try:
                unexpected = flags.FLAGS(command_line.config_fields([verb, *args]))[1:]
                config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
                if config and "<" not in config and not flags.FLAGS["import"].value:
                    config_file.read(config, flags.FLAGS[command_line.CONFIG_FIELD].value)
                errors.append(f"{unexpected[0]} is no flag" if unexpected else "")
            except (flags.Error, UserError) as error:
                errors.append(str(error))
        print(json.dumps([verb, list(flags.FLAGS), errors]), flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, verb
"""


@pytest.fixture(scope="module")
def parsed():
    """({verb: its flags}, ["place: command: why it is refused"])."""
    calls = {verb: [command for command in COMMANDS if command.verb == verb] for verb in verbs()}
    process = start(["-c", PARSE, json.dumps({verb: [c.args for c in found] for verb, found in calls.items()})], ROOT)
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    refusals = [
        f"{command.place}: {verb} {shlex.join(command.args)}: {error}"
        for verb, _, errors in results
        for command, error in zip(calls[verb], errors, strict=True)
        if error
    ]
    return {verb: found for verb, found, _ in results}, refusals


def config_paths():
    """The paths of all fields that some config has, or that a constructor of a section takes."""
    found = set()

    def walk(section, place):
        for key, value in section.items():
            found.add(f"{place}{key}")
            if hasattr(value, "items"):
                walk(value, f"{place}{key}.")

    for path in (ROOT / "configs").glob("*.py"):
        walk(config_file.read(str(path)), "")
    for section in registry.SECTIONS:
        for name in registry.names(section):
            found |= {f"{section}.{key}" for key in registry.parameters(section, name)}
    return found


def test_the_patterns_find_something():
    """A page that is written in another way, and is then not checked."""
    assert {command.verb for command in COMMANDS} >= set(verbs())
    assert len(MARKED) >= 15 and len(spans()) > 200


def test_every_command_is_accepted(parsed):
    """A flag, a field, a value or a config that was renamed while a page still has the old one."""
    flags, refusals = parsed
    assert not refusals, "\n".join(refusals)
    for command in COMMANDS:
        if command.verb not in flags:
            assert importlib.util.find_spec(f"dit_jax.{command.verb}"), command


def test_every_flag_and_field_in_prose_exists(parsed):
    """`--flag` or `section.field` in a sentence, after the name was changed."""
    flags = {flag for found in parsed[0].values() for flag in found}
    scripts = " ".join(path.read_text() for folder in ("launch", "examples") for path in (ROOT / folder).glob("*.*"))
    paths, wrong = config_paths(), []
    sections = {path.partition(".")[0] for path in paths if "." in path}
    for place, span in spans():
        if span.startswith("--"):
            for name in re.findall(r"(?<!\S)--([\w.]+)", span):
                field = name.removeprefix("config.")
                known = field in paths if field != name else {name, name.removeprefix("no")} & flags or f"--{name}" in scripts
                wrong += [] if known else [f"{place}: --{name}"]
        elif (match := re.fullmatch(r"([a-z_]+(?:\.\w+)+)(=.*)?", span)) and match[1].split(".")[0] in sections:
            wrong += [] if match[1] in paths or match[1].endswith(".py") else [f"{place}: {span}"]
    assert not wrong, "\n".join(wrong)


def test_names_in_prose_exist():
    """`dit_jax.module.Name` in a sentence, or a module or member of the API reference, after it moved."""
    names = [span.partition("(")[0] for _, span in spans() if re.fullmatch(r"dit_jax(\.\w+)+(\(.*\))?", span)]
    reference = (ROOT / "docs" / "api.md").read_text()
    for module, members in re.findall(r"^::: (\S+)\n(?:    options: \{members: \[(.*)\]\})?", reference, re.MULTILINE):
        names += [module, *(f"{module}.{member}" for member in members.split(", ") if member)]
    for name in names:
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.language == "python"])
def test_python_names_exist(block):
    """Python that does not compile, or takes from dit_jax what it no longer has."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dit_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit_jax":
            assert hasattr(importlib.import_module("dit_jax"), node.attr), ast.unparse(node)


def test_links_of_files_exist():
    """A link of README, which the build of the site does not see as GitHub does, to a file that was moved."""
    for path in FILES:
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text_of(path)):
            made = path.parent.name == "docs" and target in ("fields.md", "index.md", "contributing.md", "changelog.md")
            assert made or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_readme_is_short():
    """A front page that grows back into a manual."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder by name, with what a checkout has."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            for link in ("configs", "launch", "examples"):
                if (ROOT / link).exists():
                    (made[name] / link).symlink_to(ROOT / link)
        return made[name]

    return folder


def put_photographs(folder, count):
    """Coloured gradients: they compress and crop like photographs."""
    (folder / "photographs").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        corners = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        corners.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "photographs" / f"{number}.jpg")


def with_additions(lines, mark):
    """The commands with the arguments that the mark adds for their verbs; parts between " | " are for the first, second, ..."""
    left = {verb: added.split(" | ") for verb, added in mark.items()}

    def add(found):
        added = left.get(found[1], [""])
        return f"{found[0].rstrip()} {added.pop(0) if len(added) > 1 else added[0]} "

    return [re.sub(r"python -m dit_jax\.(\w+)[^&|;]*", add, line) for line in lines]


def as_call(line):
    """([verb, *args], {variables}) of a command that needs no shell, else None."""
    if {"&&", "||", "|", ";", "&", ">", "<"} & set(shlex.shlex(line, posix=True, punctuation_chars=True)):
        return None
    words, variables = shlex.split(line), {}
    while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    if words[:2] != ["python", "-m"] or not words[2].startswith("dit_jax."):
        return None
    return [words[2].removeprefix("dit_jax."), *words[3:]], variables


def in_a_shell(folder, line, timeout):
    env = quick_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-e", "-o", "pipefail", "-c", line]
    process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    return process.returncode, process.stdout, process.stderr


@pytest.fixture(scope="module")
def forks():
    with Forks() as running:
        yield running


@pytest.mark.slow
@pytest.mark.pages
@pytest.mark.parametrize("block", MARKED, ids=[block.place for block in MARKED])
def test_block_runs(block, folders, forks):
    """A command that is accepted and then fails, or takes minutes where the page says seconds."""
    folder, timeout = folders(block.mark["folder"]), 300 + float(block.mark["seconds"])
    if "photographs" in block.mark:
        put_photographs(folder, int(block.mark["photographs"]))
    if file := re.match(r"# (\w+\.py)\n", block.text):
        (folder / file[1]).write_text(block.text)
        return
    for line in [block.text] if block.language == "python" else with_additions(runnable(block), block.mark):
        call = (block.text, {}) if block.language == "python" else as_call(line)
        status, stdout, stderr = in_a_shell(folder, line, timeout) if call is None else forks(folder, *call, timeout)
        assert status == 0, f"{line}\n{stdout}{stderr}"
