"""The U-Nets of ADM and LDM: published sizes, what `check` refuses, and what holds for any weights."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import unet_oracle
from flax.traverse_util import flatten_dict
from unet_oracle import ADM, KINDS

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.interop.unet import links
from dit_jax.models.unet import PUBLISHED, UNet
from dit_jax.parallel.rules import rule_of
from dit_jax.tasks.adaptation import adapter_shapes, matches

SIZES = {  # trainable parameters with class tables, and GMACs: counted on the papers' code
    "ADM@64": (295_904_454, 109.68),
    "ADM@128": (421_529_606, 306.93),
    "ADM@256": (553_838_086, 1119.83),
    "ADM@512": (558_997_638, 1982.33),
    "ADM-U@256": (311_795_910, 631.64),
    "ADM-U@512": (308_835_270, 2504.78),
    "LDM-4@256": (400_920_579 + 512_512, 104.22),
    "LDM-8@256": (394_984_196 + 512_512, 57.04),
}


ONE_LEVEL = {"multipliers": (1,), "attention_factors": ()}  # little to compile


def abstract(net, x, t, cond):
    return flatten_dict(jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"], sep="/")


def output_of(net, params, x, t, cond):
    return np.asarray(jax.jit(net.apply)({"params": params}, x, t, cond))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Catches a layer that the paper does not have, at any of its sizes; and a parameter without a sharding rule."""
    published = PUBLISHED[name]
    net = UNet(**published.fields)
    net.check(published.input_shape)
    shapes = {path: link.shape for path, link in links(net, "official", published.input_shape[-1], True).items()}
    parameters, gmacs = SIZES[name]
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert round(net.macs(published.input_shape, {}) / 1e9, 2) == gmacs
    for path, shape in shapes.items():
        assert len(rule_of(path, shape, net.rules)) <= len(shape)
    assert published.fids and all(fid.source for fid in published.fids)


@pytest.mark.slow  # a trace of `init` takes a second
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_of_published_networks_are_those_of_init(name):
    """Catches names and shapes of weights that the network does not have."""
    published = PUBLISHED[name]
    net = UNet(**published.fields)
    cond = {"label": jnp.zeros(1, jnp.int32)}
    if net.low_res_channels:
        cond["low_res"] = jnp.zeros((1, 8, 8, 3))
    found = abstract(net, jnp.zeros((1, *published.input_shape)), jnp.zeros(1), cond)
    shapes = {path: link.shape for path, link in links(net, "official", published.input_shape[-1], True).items()}
    assert {path: leaf.shape for path, leaf in found.items()} == shapes


def test_an_unconditional_network_has_no_label():
    """Catches a label table that nothing trains; and an error that does not say what to change."""
    net = unet_oracle.network("adm", num_classes=0)
    x, t, cond = unet_oracle.inputs(net, 1)
    assert not any("label" in path for path in abstract(net, x, t, cond))
    with pytest.raises(UserError, match="UNet has no cond entry 'label'; it takes none"):
        net.init(jax.random.key(0), x, t, {"label": np.zeros(1, np.int32)})
    with pytest.raises(UserError, match=r"set conditioner\.name to labels, or model\.num_classes to 0"):
        unet_oracle.network("adm").init(jax.random.key(0), x, t, {})


@pytest.mark.slow
def test_a_new_network_predicts_zero():
    """Catches an output, or a residual branch, that is not initialized with zeros."""
    net = unet_oracle.network("ldm", **ONE_LEVEL)
    x, t, cond = unet_oracle.inputs(net, 1)
    leaves = abstract(net, x, t, cond)
    zero = [path for path in leaves if path.endswith(("conv_2/kernel", "proj_out/kernel", "output/conv/kernel"))]
    assert len(zero) == len([path for path in leaves if path.endswith(("conv_1/kernel", "proj_in/kernel"))]) + 1
    params = jax.jit(net.init)(jax.random.key(0), x, t, cond)["params"]
    flat = flatten_dict(params, sep="/")
    assert not any(flat[path].any() for path in zero)
    assert np.abs(np.asarray(output_of(net, params, x, t, cond))).max() == 0


@pytest.mark.slow
def test_labels_mix():
    """Catches a share of the wrong label, for embeddings of the time and for contexts."""
    for kind in ("adm", "ldm"):
        net = unet_oracle.network(kind, **ONE_LEVEL)
        x, t, _ = unet_oracle.inputs(net, 3)
        x, t = x[:1].repeat(3, 0), t[:1].repeat(3, 0)
        first, second = np.array([1, 4, 4], np.int32), np.array([4, 1, 1], np.int32)
        params = tiny.random_params(jax.eval_shape(net.init, jax.random.key(0), x, t, {"label": first})["params"])
        mixed = {"label": first, "second_label": second, "second_share": np.array([1.0, 0.0, 0.5], np.float32)}
        output = output_of(net, params, x, t, mixed)
        plain = output_of(net, params, x, t, {"label": np.array([4, 4, 1], np.int32)})
        np.testing.assert_allclose(output[:2], plain[:2], rtol=1e-4, atol=1e-4)
        assert np.abs(output[2] - plain[0]).max() > 1e-3 < np.abs(output[2] - plain[2]).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adm", "ldm"])
def test_rematerialisation_changes_nothing(kind):
    """Catches a policy that drops a gradient; and one that stores as much as another."""
    net = unet_oracle.network(kind, **ONE_LEVEL)
    x, t, cond = unet_oracle.inputs(net, 1, (4, 4))
    params = tiny.random_params(jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"])
    gradients, stored = [], []
    for policy in UNet.remat_policies:
        remat = net.clone(remat=policy)
        loss = lambda params, remat=remat: jnp.square(remat.apply({"params": params}, x, t, cond)).sum()  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss))(params))
        stored.append(remat.activation_bytes((64, 64, 3), 1, {"tensor": 1}))
    for other in gradients[1:]:
        assert tiny.distance(other, gradients[0]) < 1e-5
    assert stored == sorted(stored, reverse=True) and len(set(stored)) == len(stored)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"attention_factors": (4,)}, "attention_factors has 4, and the 2 levels have the factors 1, 2"),
        ({"heads": 2}, "model.heads is 2 and model.head_width is 8; set one of them, and the other to 0"),
        ({"head_width": 0}, "set one of them"),
        ({"head_width": 12}, "model.head_width = 12 does not divide 32"),
        ({"norm_groups": 5}, "model.multipliers 1 x model.channels 16 = 16, not a multiple of model.norm_groups 5"),
        ({"multipliers": (1, 1.3)}, "= 20.8, not a multiple"),
        ({"multipliers": ()}, "give a positive number for each level"),
        ({"context_width": 8, "num_classes": 0}, "there is no label to attend to"),
        ({"remat": "dots"}, "one of auto, none, elementwise, full"),
        ({"attention": "flash"}, "one of auto, xla, cudnn"),
        ({"num_res_blocks": 0}, "model.num_res_blocks is 0; it must be at least 1"),
        ({"channels": 15, "norm_groups": 5}, "must be even"),
        ({"low_res_channels": -1}, "must be at least 0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, text):
    """Catches a field that does nothing, or an error of a reshape in place of the name of a field."""
    with pytest.raises(UserError) as error:
        UNet(**{**ADM, **fields}).check((8, 8, 3))
    assert text in str(error.value)


def test_inputs_that_do_not_fit_are_refused():
    """Catches a size that is cut off on the way down, a label beyond the table, an image to upsample of other channels."""
    net = UNet(**ADM | {"multipliers": (1, 1, 1)})
    with pytest.raises(UserError, match=r"8 x 10 x 3, and 3 levels halve its size to 1/4.*multiples of 4"):
        net.check((8, 10, 3))
    with pytest.raises(UserError, match="UNet takes images"):
        net.check((4, 8, 8, 3))
    x, t, _ = unet_oracle.inputs(net, 1)
    with pytest.raises(UserError, match=r"label 5 is out of range: 0 to 4; the network has no null label"):
        net.init(jax.random.key(0), x, t, {"label": np.array([5], np.int32)})
    upsampler = unet_oracle.network("adm_upsampler")
    for cond in ({}, {"low_res": np.zeros((1, 4, 4, 1), np.float32)}):
        with pytest.raises(UserError, match=r"the image to upsample is needed, \[1, h, w, 3\]"):
            upsampler.init(jax.random.key(0), x, t, cond)
    with pytest.raises(UserError, match="UNet has no control entry 'keep'"):
        net.init(jax.random.key(0), x, t, {"label": np.array([1], np.int32)}, {"keep": 1})


def unet_config(**overrides):
    c = tiny.config().copy_and_resolve_references()
    c.unlock()
    fields = {key: value for key, value in ADM.items() if key != "out_channels"}
    c.model = {"name": "unet", **fields, "num_classes": 10, "null_label": True, "dtype": "float32", "param_dtype": "float32"}
    return tiny.override(c, overrides).lock()


def test_a_network_without_a_null_label_is_not_trained_or_guided_with_it():
    """Catches a label of 1,000 in a table of 1,000 rows, whose embedding is NaN."""
    with pytest.raises(UserError, match=r"set --config\.task\.cond_dropout=0, or --config\.model\.null_label=True"):
        Run(unet_config(model__null_label=False)).task
    run = Run(unet_config(model__null_label=False, task__cond_dropout=0.0))
    assert not run.task.has_null_condition
    with pytest.raises(UserError, match="ask for labels from 0 to 9"):
        run.task.requests({"label": np.array([10])})
    with pytest.raises(UserError, match=r"guidance\.scale is 2\.0"):
        Run(unet_config(model__null_label=False, task__cond_dropout=0.0, guidance__scale=2.0)).guidance
    assert run.network.label_table == ""
    assert Run(unet_config(guidance__scale=2.0)).guidance.active


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_are_kernels(kind):
    """Catches a pattern of `matrices` with the axes of another kernel, and attention that LoRA does not reach."""
    net = unet_oracle.network(kind)
    shapes = {path: link.shape for path, link in links(net, "official", 3, True).items()}
    for path, shape in shapes.items():
        kinds = [kinds for pattern, kinds in net.matrices.items() if matches((pattern,), path)]
        wanted = "/attention/" in f"/{path}" and path.endswith("kernel")
        assert len(kinds) == wanted, path
        if kinds:
            assert len(kinds[0]) == len(shape)
            (*_, rows, _), (*_, columns) = adapter_shapes(shape, kinds[0], 1)
            link = links(net, "official", 3, True)[path]
            assert (rows, columns) == (link.theirs[1], link.theirs[0] * len(link.names))  # [out, in] in PyTorch


def test_every_stage_takes_the_skip_that_it_should():
    """Catches a list of stages in which the two sides do not match, for any number of levels and blocks."""
    for levels, blocks in itertools.product((1, 2, 4), (1, 3)):
        stages = UNet(**ADM | {"multipliers": (1,) * levels, "num_res_blocks": blocks, "attention_factors": ()}).stages()
        sides = [stage.side for stage in stages]
        assert sides.count("up") == sides.count("down") + 1  # the input is kept too
        assert len({stage.name for stage in stages}) == len(stages)
        assert stages[-1].pieces[-1].features == 16 and stages[-1].pieces[-1].factor == 1


def test_the_recipes_are_those_of_the_papers():
    """Catches a recipe whose process, codec or labels are those of another paper."""
    adm, ldm = recipes.adm().lock(), recipes.ldm4().lock()
    assert Run(adm).latent_shape == (256, 256, 3) and Run(ldm).latent_shape == (64, 64, 3)
    assert Run(adm).network.out_channels == 6 and Run(ldm).network.out_channels == 3
    assert Run(adm).codec.mean == 0 and Run(adm).codec.std == 1  # pixels in -1 to 1, as ADM's
    ends = Run(ldm).process.alpha_bar
    assert math.isclose(1 - ends[1], 0.0015, rel_tol=1e-9) and math.isclose(1 - ends[-1] / ends[-2], 0.0195, rel_tol=1e-9)
    assert Run(recipes.adm(64).lock()).process.schedule == "cosine"
    with pytest.raises(UserError, match="ADM has no network for 96 px; choose 64, 128, 256, 512"):
        recipes.adm(96)
