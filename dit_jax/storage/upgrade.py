"""Upgrades configs of older versions of dit_jax to the current fields."""

import copy
from collections.abc import Mapping
from typing import Any

from dit_jax.storage.bounded import check_form

RENAMED = {"task.label_dropout": "task.cond_dropout"}  # path of a field in older configs: in those of today
# task.name: sections and fields that its older configs lack, with their meaning
INIT = {  # `recipes.init` as JSON has it
    "weights": "",
    "step": None,
    "average": "default",
    "class_names": "",
    "freeze": [],
    "lora": {"rank": 0, "alpha": None, "targets": ["attention/.*/kernel", "mlp/.*/kernel"], "train": []},
}
ADDED: dict[str, dict[str, Any]] = {
    "diffusion": {
        "conditioner": {"name": "labels"},
        "ema_warmup": False,
        "averages": [],
        "init": INIT,
        "validation": {"split": "", "path": ""},
    },
    "autoencoder": {"ema_warmup": False},
}

# (section, its name): fields that older configs lack, with their meaning
ADDED_FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("task", "diffusion"): {"masks": []},
    ("guidance", "classifier_free"): {
        "schedule": "constant",
        "power": 4.0,
        "skip_layers": [],
        "skip_scale": 2.8,
        "skip_low": 0.01,
        "skip_high": 0.2,
        "image_scale": 1.0,
    },
    ("conditioner", "text"): {"sha256": [], "trainable": False},
    ("model", "mmdit"): {"known_frames": False, "base_fps": 24.0, "rope_frequencies": "geometric", "rope_grid": None},
    ("process", "flow"): {"convention": "sit", "sampling_grid": "uniform"},
}

NAMED = ("task", "model", "conditioner", "process", "codec", "data", "transform", "optimizer", "sampler", "guidance")
REQUIRED = ("task", "codec", "transform")
REQUIRED_OF = {"diffusion": ("model", "process")}
IMPORTS = [{"name": str, "sha256": str, "registers": [str]}]


def upgrade_stored(config: Mapping[str, Any], what: str, remedy: str) -> dict[str, Any]:
    """Upgrades a config that was read from a file, and checks that it has its sections.

    Args:
        what: the file, for the error message.
        remedy: the end of the error message.

    Raises:
        UserError: a section is missing, or is not an object with a name.
    """
    check_form(config, {"task": {"name": str}}, what, remedy)
    required = (*REQUIRED, *REQUIRED_OF.get(config["task"]["name"], ()))
    check_form(config, {name: {"name": str} for name in NAMED if name in config or name in required}, what, remedy)
    check_form(config.get("imports", []), IMPORTS, what, remedy, "imports")
    return upgrade(config)


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrades a config, or some of its sections, to the current sections and names of fields.

    If both names of a field are present, the older one takes precedence: an old config file has set it in addition to a recipe's
    field of the current name.
    """
    new = {name: dict(section) if isinstance(section, Mapping) else section for name, section in config.items()}
    for old_path, path in RENAMED.items():
        section, _, old_field = old_path.partition(".")
        if old_field in new.get(section, {}):
            new[section][path.partition(".")[2]] = new[section].pop(old_field)
    for (section, name), fields in ADDED_FIELDS.items():
        if isinstance(new.get(section), dict) and new[section].get("name") == name:
            new[section] = fields | new[section]
    added = ADDED.get(new.get("task", {}).get("name", ""), {})
    return {**{name: copy.deepcopy(section) for name, section in added.items() if name not in new}, **new}


def upgrade_path(path: str) -> str:
    """The current path of a field: task.label_dropout -> task.cond_dropout."""
    return RENAMED.get(path, path)
