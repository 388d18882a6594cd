"""Values, types and meanings of a config's fields."""

import pytest
from paths import ROOT
from runs import load_config
from user_files import forgetful as forgetful

import dit_jax
from dit_jax import config_reference, registry
from dit_jax.config_file import new_section, read

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def of(config):
    return {field.path: field for field in config_reference.fields(config)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_has_a_meaning(name):
    """A field that is added without a word, and that `--show` and the documentation then leave unexplained."""
    found = of(load_config(name))
    assert len(found) > 50
    assert [path for path, field in found.items() if len(field.meaning) < 8] == []
    assert not any("`" in field.type or not field.type for field in found.values())


def test_every_constructor_is_documented():
    """A constructor that no config file names, whose fields have no meaning where its name is given."""
    config = read(str(ROOT / "configs" / "digits.py")).unlock()
    silent = []
    for kind in registry.SECTIONS:
        for name in registry.names(kind):
            config[kind] = new_section(kind, name)
            silent += [path for path, field in of(config).items() if path.startswith(f"{kind}.") and not field.meaning]
        config = read(str(ROOT / "configs" / "digits.py")).unlock()
    assert silent == []


def test_values_types_and_choices():
    """A type that no value of the field has; the name of a constant instead of its values; another value than the config's."""
    found = of(read(str(ROOT / "configs" / "digits.py"), ["model.depth=3"]))
    assert found["model.depth"].value == 3 and found["model.depth"].type == "int"
    assert found["optimizer.decay_steps"].type == "int | None" and found["transform.size"].type == "tuple[int, ...] | None"
    assert "adaln_zero, adaln, cross_attention, in_context" in found["model.conditioning"].meaning
    assert "dpmpp" in found["sampler.name"].meaning and "order 2" in found["scoring.sampler.name"].meaning


@pytest.mark.usefixtures("forgetful")
def test_user_code_without_docstrings():
    """A registered constructor without a docstring that ends `--show`."""
    dit_jax.register("sampler", "bare", lambda num_steps=3: None)
    found = of(read(str(ROOT / "configs" / "digits.py"), ["sampler.name=bare"]))
    assert found["sampler.num_steps"].value == 3 and found["sampler.num_steps"].meaning == ""
