"""Reads a config from its file and from fields on the command line.

    --config=imagenet:B/4,256 --config.batch_size=512 --config.process.name=flow

A config is given by its path, such as configs/imagenet.py, or by its name, which is looked up in ./configs and then in the
package `dit_jax_configs`, as which `configs/` is installed. The text after the colon is the argument of the file's `get_config`.
Fields may be given in any order, also before --config.
Names are applied first: if `<section>.name` differs from the file's, the section is reset to the defaults of the new constructor
and of its recipe, if there is one; no other field of the file's section is kept. Then the given fields are set.
"""

import copy
import difflib
import importlib
import importlib.util
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dit_jax import registry
from dit_jax.errors import UserError, nearest, suggest
from dit_jax.runtime import command_line, user_code
from dit_jax.runtime.field_values import NONE, FieldType
from dit_jax.storage.paths import local_path
from dit_jax.storage.upgrade import upgrade, upgrade_path

if typing.TYPE_CHECKING:  # `benchmark --model` runs without ml_collections
    from ml_collections import ConfigDict

flags.disclaim_key_flags()  # --help lists --config as the verb's own

CONFIGS_SHOWN = 20
CONSTRUCTORS = {  # of the sections without a name
    "buckets": "dit_jax.data.buckets:Buckets",
    "captions": "dit_jax.data.captions:Captions",
    "mesh": "dit_jax.parallel.mesh:make_mesh",
    "checkpoint": "dit_jax.storage.checkpoints:Checkpointer",
    "profile": "dit_jax.runtime.profile:Profile",
    "forecast": "dit_jax.diffusion.forecast:Forecast",
    "task.discriminator": "dit_jax.codecs.discriminator:PatchDiscriminator",
    "task.low_resolution": "dit_jax.tasks.low_resolution:LowResolution",
}
LOADERS = {True: "dit_jax.data.latent_loader:LatentLoader", False: "dit_jax.data.loader:Loader"}  # by whether data is a cache


class ConfigFlag(NamedTuple):
    """The flag --config and the flags of fields."""

    file: flags.FlagHolder
    fields: flags.FlagHolder

    @property
    def given(self) -> bool:
        return self.file.value is not None

    def read(self) -> "ConfigDict":
        """The config that the flags select, see `read`."""
        return read(self.file.value, self.fields.value)


def define_flags(help_text: str) -> ConfigFlag:
    """Defines --config and the flags of fields, in a verb's `__main__`."""
    flag = ConfigFlag(flags.DEFINE_string("config", None, help_text), define_fields())
    # Called when the flags are wrong, and so not readable by their holders.
    command_line.know_fields(lambda: _paths(load(file)) if (file := flags.FLAGS["config"].value) else ())
    return flag


def define_fields() -> flags.FlagHolder:
    """Defines only the flags of fields: texts "<path>=<value>", or "<path>" without a value."""
    return flags.DEFINE_multi_string(
        command_line.CONFIG_FIELD,
        [],
        "Sets a field of the config, as in --config.batch_size=512 or --config.process.name=flow. All fields are listed by "
        "`python -m dit_jax.main --config=... --show`.",
    )


def plain(config: "ConfigDict") -> dict[str, Any]:
    """The config as JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def read(config_file: str, fields: Sequence[str] = ()) -> "ConfigDict":
    """The config of a file with these fields, locked.

    Args:
        config_file: a path or a name, see `find`, and after a colon the argument: "configs/digits.py", "digits:process=flow".
        fields: texts "<path>=<value>", as in "optimizer.learning_rate=1e-3"; the last one of a path counts. "<path>" alone sets
            a field to True.

    Raises:
        UserError: the file does not exist or its code fails; a field does not exist or has a value of another type; a required
            field of a new section is missing.
    """
    from ml_collections import ConfigDict

    config = copy.deepcopy(load(config_file)).unlock()  # keeps the references between its fields
    if (upgraded := upgrade(config.to_dict())) != config.to_dict():
        config = ConfigDict(upgraded)
    _apply(config, fields)
    if imports := _imports(config, config_file):
        config.imports = imports
    return config.lock()


def of_run(stored: Mapping[str, Any], fields: Sequence[str] = ()) -> "ConfigDict":
    """The config of a run, as `run_folder.read_config` reads it, with these fields, locked.

    fields: as for `read`.

    Raises:
        UserError: as `read`.
    """
    from ml_collections import ConfigDict

    config = ConfigDict({name: _with_tuples(section) for name, section in stored.items() if name != "imports"})
    _apply(config, fields)
    if imports := user_code.imports():
        config.imports = [entry.describe() for entry in imports]
    return config.lock()


def _with_tuples(value: Any) -> Any:
    """A JSON value with tuples for lists, as configs have them."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _apply(config: "ConfigDict", fields: Sequence[str]) -> None:
    """Sets the given fields; names come first."""
    given: dict[str, str | None] = {}
    for text in fields:
        path, equals, value = text.partition("=")
        given[upgrade_path(path)] = value if equals else None
    remade = _apply_names(config, given)
    for path, given_value in given.items():
        _set(config, path, given_value)
    for place in remade:
        _check_complete(config, place)


def load(config_file: str) -> "ConfigDict":
    """What `get_config` of a config file returns.

    Raises:
        UserError: the file does not exist; its code fails; its `get_config` is missing, does not take the argument, or does not
            return a ConfigDict.
    """
    from ml_collections import ConfigDict

    file, colon, argument = config_file.partition(":")
    path = find(file)
    module = user_code.load_file(path, f"--config={file}")
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} has no get_config(); a config file defines it and returns a ConfigDict, see the config digits")
    arguments = (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        wrong = f"takes no argument; leave out :{argument}" if colon else f"needs an argument; write --config={file}:<argument>"
        raise UserError(f"{config_file}: get_config() {wrong}") from None
    config = user_code.run(lambda: module.get_config(*arguments), str(path))
    if not isinstance(config, ConfigDict):
        raise UserError(user_code.wrong_result(path, module.get_config, config, "a ml_collections.ConfigDict"))
    return config


def find(given: str, flag: str = "config", folder: str = "") -> Path:
    """The file of a config or sweep that is given by its path or its name.

    Args:
        given: a path, such as "configs/digits.py", or a name, such as "digits". A file of that path comes first.
        flag: that gave it, for messages.
        folder: sub-folder of the configs in which names are looked up.

    Raises:
        UserError: there is no such file; the message lists those that there are.
    """
    path = local_path(given)
    if path.is_file():
        return path
    if not given or given.startswith("-"):
        raise UserError(f"--{flag} has no value; give a name or a file, as in --{flag}=digits")
    is_name = given == path.stem
    files = known(folder)
    if is_name and given in files:
        return files[given]
    if is_name:
        places = " or ".join(str(place) if place.is_absolute() else f"./{place}" for place in _places(folder))
        choice = suggest(given, list(files)[:CONFIGS_SHOWN]) if files else "; give the path of a file"
        raise UserError(f"--{flag}={given} does not exist: there is no {given}.py in {places}{choice}")
    named = f"; --{flag}={path.stem} exists" if path.stem in files else ""
    raise UserError(f"--{flag}={given} does not exist; {_files_near(path)}{named}")


def known(folder: str = "") -> dict[str, Path]:
    """{name: file} of the configs, or of those in a sub-folder, sorted by name; ./configs comes before the installed ones."""
    found = {file.stem: file for place in reversed(_places(folder)) for file in _python_files(place)}
    return dict(sorted(found.items()))


def _places(folder: str) -> list[Path]:
    """The folders in which a name is looked up: ./configs, and that of the installed package."""
    spec = importlib.util.find_spec("dit_jax_configs")
    # An editable install adds a name that is no folder.
    installed = [Path(place) for place in (spec and spec.submodule_search_locations) or () if Path(place).is_dir()]
    here = Path("configs")
    return [place / folder for place in (here, *(place for place in installed if place.resolve() != here.resolve()))]


def _python_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if file.stem != "__init__")


def _files_near(path: Path) -> str:
    """Lists the Python files in the folder of a missing one."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist in {Path.cwd()}"
    names = [file.name for file in _python_files(path.parent)]
    if not names:
        return f"the folder {path.parent} has no *.py"
    names = list(dict.fromkeys([*difflib.get_close_matches(path.name, names, 1), *names]))
    return f"the folder {path.parent} has {', '.join(names[:CONFIGS_SHOWN])}{', ...' * (len(names) > CONFIGS_SHOWN)}"


def _apply_names(config: "ConfigDict", given: Mapping[str, str | None]) -> list[str]:
    """Resets the sections whose given name differs from the config's; returns their places, such as "scoring.sampler".

    data.name also resets the section `loader`, because a latent cache has its own loader.
    """
    remade = []
    for path, name in given.items():
        place, _, field = path.rpartition(".")
        outer, _, kind = place.rpartition(".")
        if field != "name" or kind not in registry.SECTIONS or name is None:
            continue
        old = _section(config, place, path).get("name")
        if name == old:
            continue
        from dit_jax import recipes

        if kind == "task" and "autoencoder" in (old, name):
            raise UserError(
                f"--config.{path}={name}: a config of task {old!r} has other sections; give a config file of task {name!r}"
            )
        _section(config, outer, path)[kind] = new_section(kind, name)
        remade.append(place)
        if place == "data" and recipes.loader(name).keys() != recipes.loader(old).keys():
            config.loader = recipes.loader(name)
    return remade


def new_section(kind: str, name: str) -> dict[str, Any]:
    """`name`, all fields of the constructor with a default, and the fields of its recipe; optional fields are placeholders.

    Raises:
        UserError: the name is not registered.
    """
    from ml_collections import config_dict

    from dit_jax import recipes

    parameters, fields = _parameters(kind, name), registry.defaults(kind, name)
    for key, parameter in parameters.items():
        if key in fields and fields[key] is None:
            allowed = [t for t in FieldType.of_annotation(parameter.annotation).allowed if t is not NONE]
            fields[key] = config_dict.placeholder(allowed[0] if len(allowed) == 1 else object)
    return {"name": name, **fields, **recipes.section(kind, name)}


def _parameters(kind: str, name: str) -> dict[str, inspect.Parameter]:
    from dit_jax import build  # noqa: F401 - registers the package's constructors

    return registry.parameters(kind, name)


def _check_complete(config: "ConfigDict", place: str) -> None:
    section, kind = _section(config, place, place), place.rpartition(".")[2]
    missing = [key for key, p in _parameters(kind, section.name).items() if p.default is p.empty and key not in section]
    if missing:
        raise UserError(
            f"--config.{place}.name={section.name}: {registry.noun(kind)} {section.name!r} needs {', '.join(missing)}; add "
            + " ".join(f"--config.{place}.{key}=..." for key in missing)
        )


def _section(config: "ConfigDict", place: str, path: str) -> "ConfigDict":
    """The section at a place such as "scoring.sampler"; the config itself at "".

    Raises:
        UserError: the section does not exist, and so neither does the field `path`.
    """
    from ml_collections import ConfigDict

    section = config
    for name in place.split(".") if place else []:
        if not isinstance(section.get(name), ConfigDict):
            names = [key for key, value in section.items() if isinstance(value, ConfigDict)]
            raise UserError(f"--config.{path}: the config has no section {place}{suggest(name, names)}")
        section = section[name]
    return section


def _paths(section: "ConfigDict", prefix: str = "") -> Iterator[str]:
    from ml_collections import ConfigDict

    for key, value in section.items():
        yield from _paths(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else (f"{prefix}{key}",)


def _set(config: "ConfigDict", path: str, text: str | None) -> None:
    """Sets a field from its text.

    Raises:
        UserError: the field does not exist, or the text is not a value of its type.
    """
    from ml_collections import ConfigDict

    place, _, field = path.rpartition(".")
    section, kind = _section(config, place, path), place.rpartition(".")[2]
    values = dict(section.items(preserve_field_references=True))
    named = kind in registry.SECTIONS and "name" in section
    if field not in section and _parameter(section, place, field) is None:
        if not field:
            raise UserError(f"--config.{path}: the name of a field is missing; write --config.<field>=<value>")
        keys = (*section, *(_parameters(kind, section.name) if named else ()))
        names = list(dict.fromkeys(key for key in keys if key != "name"))
        owner = f"{registry.noun(kind)} {section.name!r}" if named else place or "the config"
        elsewhere = [known for known in _paths(config) if known.endswith(f".{field}")]
        if elsewhere and not nearest(field, names):
            raise UserError(
                f"--config.{path}: {owner} has no field {field}; did you mean --config.{' or --config.'.join(elsewhere)}?"
            )
        raise UserError(f"--config.{path}: {owner} has no field {field}{suggest(field, names)}")
    if isinstance(values.get(field), ConfigDict):
        written = [word for word in re.findall(r"\w+", text or "") if word in values[field]]
        example = " ".join(f"--config.{path}.{key}=..." for key in written or [next(iter(values[field]))])
        raise UserError(f"--config.{path}: {field} is a section; give its fields one by one, as in {example}")
    wanted = type_of(config, path)
    if text is None and bool not in wanted.allowed:
        raise UserError(f"--config.{path} has no value; write --config.{path}=...")
    try:
        value = wanted.parse("true" if text is None else text)
    except ValueError:
        raise UserError(f"--config.{path}={text}: {field} must be {wanted.describe()}") from None
    with config.ignore_type():
        section[field] = value


def type_of(config: "ConfigDict", path: str) -> FieldType:
    """The type of a field: that of its constructor's parameter, else that of its value."""
    from ml_collections.config_dict import FieldReference

    place, _, field = path.rpartition(".")
    section = _section(config, place, path)
    value = dict(section.items(preserve_field_references=True)).get(field)
    parameter = _parameter(section, place, field)
    if field in section and (constructor := unnamed_constructor(config, place)):
        parameter = inspect.signature(constructor, eval_str=True).parameters.get(field)
    wanted = FieldType.of_annotation(parameter.annotation) if parameter else FieldType()
    if not wanted.allowed and field in section:
        referenced = isinstance(value, FieldReference)
        wanted = FieldType.of_annotation(section.get_type(field)) if referenced else FieldType.of_value(value)
    if field in section and (section[field] is None or isinstance(value, FieldReference)):
        wanted = wanted.optional()
    return wanted


def _parameter(section: "ConfigDict", place: str, field: str) -> inspect.Parameter | None:
    """The parameter of the section's constructor that a field is; None for `name`, and in sections without a constructor."""
    kind = place.rpartition(".")[2]
    named = kind in registry.SECTIONS and "name" in section
    return _parameters(kind, section.name).get(field) if named and field != "name" else None


def unnamed_constructor(config: "ConfigDict", place: str) -> Callable[..., Any] | None:
    """The constructor whose keyword arguments are the fields of a section without a name; None for another section."""
    named = CONSTRUCTORS | {"loader": LOADERS[config.get("data", {}).get("name") == "latents"]}
    if place not in named:
        return None
    module, _, name = named[place].partition(":")
    return getattr(importlib.import_module(module), name)


def _imports(config: "ConfigDict", config_file: str) -> list[dict[str, Any]]:
    """Entries for config.json: the files of --import, and the config file if it registered names that the config uses."""
    imports = user_code.imports()
    covered = {name for entry in imports for name in entry.registers}
    used = {f"{kind}.{name}" for kind, name in _names(config) if name in registry.names(kind) and registry.origin(kind, name)}
    if own := sorted(used - covered):
        file = config_file.partition(":")[0]
        imports.append(user_code.Import(file, user_code.file_sha256(find(file)), tuple(own)))
    return [entry.describe() for entry in imports]


def _names(config: "ConfigDict") -> Iterator[tuple[str, str]]:
    """(kind, name) of every section with a constructor's name, and of the extractors of scores."""
    from ml_collections import ConfigDict

    for key, value in config.items():
        if isinstance(value, ConfigDict):
            if key in registry.SECTIONS and "name" in value:
                yield key, value.name
            if isinstance(value.get("features"), str):
                yield "metric", value.features
            yield from _names(value)
