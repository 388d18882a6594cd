import ast

import jax
import pytest
from paths import ROOT
from runs import load_config

from dit_jax import build, recipes
from dit_jax.errors import UserError
from dit_jax.models.dit import RULES
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.rules import shardings, spec_of
from dit_jax.tasks.state import abstract_state, count_parameters

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def state_of(config, mesh):
    config.lock()
    return abstract_state(build.Run(config).task, mesh)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    """A config that names what does not exist, or a parameter that no sharding rule (or more than one) covers."""
    config = load_config(name)
    state = state_of(config, make_mesh(2, 2, 2))
    if config.task.name == "diffusion":
        build.Run(config).sampler
        build.Run(config).guidance
    averaged = state.params if config.task.name == "diffusion" else {"codec": state.params["codec"]}
    assert count_parameters(averaged) == count_parameters(state.ema_params) > 0


@pytest.mark.parametrize("size", recipes.MODELS)
@pytest.mark.parametrize("resolution", [256, 512])
def test_all_sizes(size, resolution):
    """One of the twelve sizes at 256 or 512 that does not build."""
    config = load_config("imagenet", f"{size},{resolution}")
    assert build.Run(config).latent_shape == (resolution // 8, resolution // 8, 4)
    assert build.Run(config).network.patch_size == int(size[-1])


def test_imagenet_parts_in_any_order():
    """A part that is dropped: the pixels of ImageNet instead of the cache, DiT instead of SiT."""
    config = load_config("imagenet", "512,sit,latents,B/4")
    assert (config.data.name, config.process.name, config.codec.path) == ("latents", "flow", "sd-vae-ft-mse")
    assert (config.model.patch_size, config.model.width, config.transform.resolution) == (4, 768, 512)
    assert load_config("imagenet", "B/4,512").data.name == "tfds"
    assert load_config("imagenet", "XL/2,256,sit") == load_config("sit_xl2_imagenet256")


@pytest.mark.parametrize(
    "arg, text",
    [
        ("XL/3,256", "choose one of"),
        ("XL/2,250", "256 or 512"),
        ("XL/2", "256 or 512"),
        ("XL/2,256,latent", "256 or 512"),
        ("XL/2,256,512", "one resolution"),
        ("latents,XL/2,256,latents", "one size"),
    ],
)
def test_bad_imagenet_argument(arg, text):
    """A mistyped size that silently becomes another."""
    with pytest.raises(UserError, match=text):
        load_config("imagenet", arg)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"transform.resolution": 250}, "height 250 is not a positive multiple of the codec's downsample 8"),
        ({"model.heads": 7}, "does not divide model.width"),
        ({"model.dtype": "float64"}, "must be one of float32"),
        ({"model.name": "vnet"}, "'vnet' is not registered; choose one of .*dit"),
        ({"process.schedule": "exponential"}, "must be one of linear"),
        ({"task.cond_dropout": 1.5}, r"must lie in \[0, 1\)"),
        ({"optimizer.learning_rate": -1.0}, "must be positive"),
        ({"num_steps": 0}, "at least 1"),
        ({"model.num_classes": -1}, "at least 0"),
        ({"transform.channels": 1}, "must be equal"),
    ],
)
def test_bad_values(changes, text):
    """A mistake that is only found when the first batch reaches the network, or never."""
    config = load_config("s2_imagenet256")
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        (config[section] if section else config)[field] = value
    with pytest.raises(UserError, match=text):
        build.Run(config).task


def test_unknown_field_is_named():
    """A field that the constructor does not have, silently dropped."""
    config = load_config("digits")
    config.process.temperature = 1.0
    with pytest.raises(UserError, match="'gaussian' has no field temperature"):
        build.Run(config).task


def test_unmatched_rule():
    """A new layer that ends up replicated unnoticed."""
    with pytest.raises(ValueError, match="0 sharding rules match params/blocks/mamba/kernel"):
        spec_of("params/blocks/mamba/kernel", (4, 4), {"data": 1, "fsdp": 1, "tensor": 1}, RULES)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_rules_cover_every_block(conditioning):
    """A parameter of one block kind that no rule, or more than one, covers; heads that do not divide must stay whole."""
    config = load_config("imagenet", "B/2,256")
    config.model.conditioning = conditioning
    state = state_of(config, make_mesh(1, 1, 8))  # 12 heads over 8 devices
    specs = jax.tree.map(lambda s: s.spec, shardings(state, make_mesh(1, 1, 8), RULES))
    assert "tensor" not in specs.params["blocks"]["attention"]["qkv"]["kernel"]
    assert "tensor" in specs.params["blocks"]["mlp"]["in"]["kernel"]
    assert specs.opt_state[0].mu == specs.params


@pytest.mark.parametrize("shape, text", [((16, 1, 1), "there are 8"), ((-1, 3, 1), "there are 8"), ((8, 0, 1), "at least 1")])
def test_bad_mesh(shape, text):
    """A mesh that leaves devices idle, or asks for more than there are."""
    with pytest.raises(UserError, match=text):
        make_mesh(*shape)


@pytest.mark.parametrize("module", ["torch", "tensorflow", "diffusers", "wandb", "matplotlib"])
def test_heavy_libraries_are_imported_late(module):
    """An optional library that becomes a requirement because a module imports it at the top."""
    for file in (ROOT / "dit_jax").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert all(name.split(".")[0] != module for name in names), file
