"""What a file of samples says of them."""

from dit_jax import recipes
from dit_jax.sample.samples_file import describe


def test_newer_fields_are_named_where_they_say_something():
    """Catches samples of an unchanged flow that are described otherwise than by older versions, whose folder is then refused;
    and another sign or grid that is not recorded."""
    config = recipes.sit("S/2")
    process = describe(config, "sha256", None, 0)["process"]
    assert not {"convention", "sampling_grid"} & process.keys() and process["shift"] == 1.0
    config.process.update({"convention": "sd3", "sampling_grid": "sd3"})
    assert describe(config, "sha256", None, 0)["process"] == process | {"convention": "sd3", "sampling_grid": "sd3"}
