"""Makes the pages of the site that are not in docs/: README, CONTRIBUTING, CHANGELOG, and the reference of config fields."""

import functools
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]*)(#[^)]*)?\)")

DIFFUSION, AUTOENCODER = "digits.py", "vae_digits.py"
VARIANTS = ((DIFFUSION,), (DIFFUSION, "data.name=latents"), (AUTOENCODER,))  # sections without a constructor differ between these

INTRODUCTION = """# Config fields

A config has one section per object. Most sections are the `name` and the keyword arguments of one constructor, so a section
has the fields of the constructor that its name selects. On the command line a field is `--config.<section>.<field>=<value>`; see
[Training](training.md#change-any-field) for the rules. Values are those of `configs/digits.py`, or the constructor's defaults.
This page is made from the constructors when the site is built. `python -m dit_jax.main --config=digits --show` prints one config.
"""


def on_files(files, config):
    for source, target in PAGES.items():
        text = with_links_of_the_site((ROOT / source).read_text())
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "fields.md", content=fields_page()))
    return files


def with_links_of_the_site(text: str) -> str:
    """Points the links of a page in the repository's root at pages of the site; a link to another file becomes its text."""

    def link(match):
        image, shown, target, anchor = match.groups(default="")
        target = posixpath.normpath(target)
        if target in PAGES or target.startswith("docs/"):
            return f"{image}[{shown}]({PAGES.get(target, target.removeprefix('docs/'))}{anchor})"
        return shown

    return LINK.sub(link, text)


@functools.cache
def fields_page() -> str:
    """The fields of the training loop, and of every constructor of every section."""
    from dit_jax import registry

    lines = [INTRODUCTION, "## The training loop", "", *table(field for field in fields(DIFFUSION) if "." not in field.path)]
    for section in dict.fromkeys(field.path.partition(".")[0] for field in fields(DIFFUSION) if "." in field.path):
        lines += ["", f"## `{section}`", ""]
        if section in registry.SECTIONS:
            for name in registry.names(section):
                lines += [f"### `{section}.name={name}`", "", *of_constructor(section, name), ""]
        else:
            found = {field.path: field for variant in reversed(VARIANTS) for field in within(section, fields(*variant))}
            lines += table(found.values())
    return "\n".join(lines) + "\n"


def of_constructor(section: str, name: str) -> list[str]:
    """The table of a constructor's fields."""
    from dit_jax import config_file, registry

    if (section, name) == ("task", "autoencoder"):  # its config has other sections, and so a file of its own
        return table(within(section, fields(AUTOENCODER)))
    known = config_file.new_section(section, name)
    required = [
        f"{section}.{key}" for key, p in registry.parameters(section, name).items() if p.default is p.empty and key not in known
    ]
    found = within(section, fields(DIFFUSION, f"{section}.name={name}", *(f"{path}=1" for path in required)))
    return table(found, required)


def within(section: str, found) -> list:
    return [field for field in found if field.path.startswith(f"{section}.")]


def table(found, required=()) -> list[str]:
    rows = [
        f"| `{f.path}` | `{cell(f.type)}` | {'required' if f.path in required else value(f.value)} | {cell(f.meaning)} |"
        for f in found
        if f.path.count(".") != 1 or not f.path.endswith(".name")
    ]
    return ["| field | type | value | meaning |", "|---|---|---|---|", *rows] if rows else ["No fields."]


def value(x) -> str:
    return f"`{cell(repr(x))}`" if x is not None else "unset"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@functools.cache
def fields(file: str, *given: str):
    from dit_jax import config_file, config_reference

    config = config_file.read(str(ROOT / "configs" / file), given)
    return config_reference.fields(config)
