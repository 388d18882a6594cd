"""The command line of the verbs: flags in groups, --help, and messages for mistakes in flags."""

import difflib
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from absl import flags

from dit_jax.errors import UserError, nearest
from dit_jax.runtime.field_values import whole_number

flags.disclaim_key_flags()  # --help lists --import as the verb's own

USER_ERROR_STATUS = 2
CONFIG_FIELD = "config.<field>"  # the flag of all fields that are given, see `config_file.define_flags`
FIELD = re.compile(r"--?(?P<no>no)?config\.(?!<)")
HELP = ("--help", "-help", "-h", "-?", "--helpshort")
ABSL_ADDS = re.compile(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$")  # to the texts of enums and lists
NAME_COLUMN = 30
MOST_COLUMNS = 120
MOST_SUGGESTIONS = 3

_groups: list[tuple[str, int]] = []  # (title, number of flags that were defined before it)
_paths_of_config: list[Callable[[], Iterable[str]]] = []
_names_of_config = ["config"]  # of the flags that give a config


def group(title: str) -> None:
    """Begins a group of flags in --help: those that are defined from here to the next group."""
    _groups.append((title, len(list(flags.FLAGS))))


def know_fields(paths: Callable[[], Iterable[str]]) -> None:
    """Lets messages about unknown flags suggest a field of the config.

    paths: of the fields of the given config, such as "optimizer.learning_rate"; it may raise a UserError.
    """
    _paths_of_config.append(paths)


def takes_config_from(flag: str) -> None:
    """Lets fields of the config be given with this flag in place of --config."""
    _names_of_config.append(flag)


def check_uses(uses: Mapping[str, Iterable[str]], mode: str) -> None:
    """Raises a UserError if a flag is given that the chosen mode of a verb does not use.

    Args:
        uses: {mode, as the message names it: the flags that it uses}; a flag in none of them belongs to every mode.
        mode: a key of `uses`.
    """
    for name in sorted({name for names in uses.values() for name in names} - set(uses[mode])):
        if flags.FLAGS[name].present:
            values = flags.FLAGS[name].value
            shown = f"config.{values[0]}" if name == CONFIG_FIELD and values else name
            raise UserError(f"--{shown} has no effect with {mode}; omit it")


def verb_of(program: str) -> str:
    """The verb of a program's path: ".../sample/__main__.py" -> "sample", ".../main.py" -> "main"."""
    path = Path(program)
    return path.parent.name if path.stem == "__main__" else path.stem


def define_common_flags() -> None:
    """Defines the flags of every verb."""
    group("Your own code")
    flags.DEFINE_multi_string(
        "import", [], "Python file or module to import first; it may call dit_jax.register. May be given several times."
    )


def print_page(text: str) -> None:
    """Prints text that may be piped into a program that does not read it all, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the exit would fail again


def parse(argv: list[str], doc: str) -> list[str]:
    """Parses the flags and returns the other arguments; prints --help or what is wrong, and exits.

    doc: docstring of the verb, for --help.

    Exit status: 0 after --help, 2 for a mistake.
    """
    if any(text in HELP for text in argv[1 : argv.index("--") if "--" in argv else None]):
        print_page(help_text(doc, _own_flags()))
        sys.exit(0)
    takes_config = CONFIG_FIELD in flags.FLAGS
    try:
        if takes_config:
            argv = config_fields(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
        for flag in _own_flags():
            if type(flag.parser) is flags.IntegerParser:
                flag.parser = _WholeNumber(flag.parser.lower_bound, flag.parser.upper_bound)
        rest = flags.FLAGS(argv)
        fields = flags.FLAGS[CONFIG_FIELD].value if takes_config else None
        if fields and "config" in flags.FLAGS and not any(flags.FLAGS[name].value is not None for name in _names_of_config):
            raise flags.Error(f"--config.{fields[0]} is given without --config=<name or file>, such as --config=digits")
        return rest
    except SystemExit:  # --helpfull: absl leaves with 1
        sys.exit(0)
    except (flags.Error, ValueError) as error:
        verb = verb_of(argv[0])
        print(f"error: {_explain(error, verb)}\nSee python -m dit_jax.{verb} --help.", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)


def config_fields(argv: list[str]) -> list[str]:
    """The arguments with every --config.<path>=<value> as --config.<field>=<path>=<value>, a flag that absl can parse.

    absl would refuse the flags of fields, as it does not know the config. The other forms of a flag are read too: --config.path
    value, --config.path and --noconfig.path of a field that is true or false.
    """
    found: list[str] = []
    may_take_value = False
    for number, text in enumerate(argv):
        if text == "--":
            return found + argv[number:]
        field = FIELD.match(text)
        if field:
            found.append(f"--{CONFIG_FIELD}={text[field.end() :]}" + ("=false" if field["no"] else ""))
        elif may_take_value and not text.startswith("--"):
            found[-1] += f"={text}"
        else:
            found.append(text)
        may_take_value = field is not None and not field["no"] and "=" not in text
    return found


def explain_argument(text: str) -> str:
    """The message for an argument that is no flag: a list that was written with spaces, or dashes that are missing."""
    end = sys.argv.index(text) if text in sys.argv else 0
    if sys.argv[end - 1].endswith(","):
        start = end - 1 if sys.argv[end - 1].startswith("-") else end - 2  # --labels=3, 5 or --labels 3, 5
        while end < len(sys.argv) and sys.argv[end - 1].endswith(","):
            end += 1
        flag, values = sys.argv[start], "".join(sys.argv[start + 1 : end])
        return f"unexpected argument {text!r}; write {flag}{'' if '=' in flag else '='}{values}"
    hint = ""
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is None and re.fullmatch(r"[\w./:,=-]+", text):
        hint = f"; did you mean --config={text}?"
    return f"unexpected argument {text!r}; options begin with --, and a value with spaces needs quotes{hint}"


class _WholeNumber(flags.IntegerParser):
    """Reads 1e3 and 1_000 too."""

    def convert(self, argument):
        return whole_number(argument) if isinstance(argument, str) else super().convert(argument)


def _own_flags() -> list[flags.Flag]:
    return flags.FLAGS.get_key_flags_for_module(sys.argv[0])


def _explain(error: Exception, verb: str) -> str:
    """The message of a flag's error."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return _explain_unknown(error.flagname, str(error.flagvalue).partition("=")[2], verb)
    illegal = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if isinstance(error, flags.IllegalFlagValueError) and illegal:
        return f"--{illegal[1]}={illegal[2]} must be {_wanted(flags.FLAGS[illegal[1]])}"
    return str(error)


def _wanted(flag: flags.Flag) -> str:
    """What a flag takes: "a whole number of at least 1", "one of a, b"."""
    parser = flag.parser
    if isinstance(parser, flags.EnumParser):
        return f"one of {', '.join(parser.enum_values)}"
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        noun = "a whole number" if isinstance(parser, flags.IntegerParser) else "a number"
        low, high = parser.lower_bound, parser.upper_bound
        return noun + (f" of at least {low:g}" if low is not None else "") + (f" of at most {high:g}" if high is not None else "")
    return "another value"


def _explain_unknown(name: str, value: str, verb: str) -> str:
    """The message for a flag that the verb does not have, with the one that was probably meant."""
    takes_config = CONFIG_FIELD in flags.FLAGS
    own = [flag.name for flag in _own_flags() if flag.name != CONFIG_FIELD]
    said = f"{verb} has no flag --{name}"
    if not takes_config:
        wanted = _flags_of_field(name.removeprefix("config."), own)
        if name.startswith("config.") or name == "config":
            said = f"{verb} takes no config, so --{name} means nothing to it"
        return said + _did_you_mean([f"--{flag}={value}" for flag in wanted])
    first, _, rest = name.partition(".")
    if rest and difflib.get_close_matches(first, ["config"]):
        name = rest
    try:
        paths = [path for known in _paths_of_config for path in known()]
    except ValueError:  # the config itself is wrong, which is reported once the flag is right
        paths = []
    fields = sorted((path for path in paths if f".{path}".endswith(f".{name}")), key=lambda path: path.count("."))
    if not fields and (flag := nearest(name, own)):
        return said + _did_you_mean([f"--{flag}"])
    if not fields and (field := nearest(name, paths)):
        fields = [field]
    if fields or paths:
        return said + _did_you_mean([f"--config.{path}={value}" for path in fields])
    return f"{said}; a field of the config is given as --config.{name}={value or '...'}"


def _flags_of_field(path: str, own: Sequence[str]) -> list[str]:
    """The flag of a verb without a config that sets the field "sampler.num_steps" of one: num_steps; else a similar flag."""
    place, _, field = path.rpartition(".")
    section = place.rpartition(".")[2]
    for flag in (path.replace(".", "_"), section if field == "name" else field):
        if flag in own:
            return [flag]
    if section and f"{section}_fields" in own:
        return [f"{section}_fields={field}"]
    near = nearest(path.replace(".", "_"), own)
    return [near] if near else []


def _did_you_mean(given: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(text.rstrip('=') for text in given[:MOST_SUGGESTIONS])}?" if given else ""


def help_text(doc: str, own: Sequence[flags.Flag]) -> str:
    """The text of --help: the first line of the verb's docstring, its examples, the flags by group, the rest of the docstring."""
    width = min(shutil.get_terminal_size().columns, MOST_COLUMNS) if sys.stdout.isatty() else MOST_COLUMNS
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    head = 1 + (len(paragraphs) > 1 and paragraphs[1].startswith("    "))
    number_of = {name: number for number, name in enumerate(flags.FLAGS)}
    groups = [("Options", 0), *_groups]  # the first: flags that stand before any group
    starts = [*(start for _, start in groups), len(number_of)]
    parts = paragraphs[:head]
    for (title, start), end in zip(groups, starts[1:], strict=True):
        lines = [line for flag in own if start <= number_of[flag.name] < end for line in _lines(flag, width)]
        parts += ["\n".join([f"{title}:", *lines])] * bool(lines)
    return "\n\n".join([*parts, *paragraphs[head:]])


def _lines(flag: flags.Flag, width: int) -> list[str]:
    """The lines of --help about a flag."""
    can_be_turned_off = flag.boolean and flag.default is not False
    name = f"--[no]{flag.name}" if can_be_turned_off else f"--{flag.name}"
    placeholder = _placeholder(flag)
    name += "" if flag.boolean else f"={placeholder}"
    text = ABSL_ADDS.sub("", flag.help or "")
    if isinstance(flag.parser, flags.EnumParser) and "|" not in placeholder:
        text += f" One of {', '.join(flag.parser.enum_values)}."
    if flag.boolean:
        text += " Default: yes." if flag.default else ""
    elif flag.default not in (None, "", []):
        text += f" Default: {','.join(flag.default) if isinstance(flag.default, list) else flag.default}."
    lines = textwrap.wrap(text, max(width - NAME_COLUMN - 2, 40), break_on_hyphens=False)
    beside = lines.pop(0) if len(name) < NAME_COLUMN and lines else ""
    return [f"  {name:{NAME_COLUMN}}{beside}".rstrip(), *(" " * (NAME_COLUMN + 2) + line for line in lines)]


def _placeholder(flag: flags.Flag) -> str:
    if flag.name == CONFIG_FIELD:
        return "VALUE"
    if isinstance(flag.parser, flags.EnumParser):
        choices = "|".join(flag.parser.enum_values)
        return choices if len(f"  --{flag.name}={choices}") <= NAME_COLUMN else "..."
    kinds = {flags.IntegerParser: "N", flags.FloatParser: "X", flags.ListParser: "A,B"}
    return next((text for kind, text in kinds.items() if isinstance(flag.parser, kind)), "...")
