"""U-Nets in the layouts of guided-diffusion, latent-diffusion and diffusers."""

import jax
import numpy as np
import pytest
import unet_oracle
from unet_oracle import ADM, KINDS, held

from dit_jax.errors import UserError
from dit_jax.interop import unet as interop
from dit_jax.models.unet import PUBLISHED, UNet

OFFICIAL = {  # sizes that the papers' code can have: 32 groups
    "adm": KINDS["adm"] | {"channels": 32, "norm_groups": 32},
    "adm_upsampler": KINDS["adm_upsampler"] | {"channels": 32, "norm_groups": 32, "out_channels": 6},
    "ldm": KINDS["ldm"] | {"channels": 32, "norm_groups": 32},
}


def ours(net, layout="official", seed=0):
    """Random parameters of a network, by path."""
    rng = np.random.default_rng(seed)
    shapes = {path: link.shape for path, link in interop.links(net, layout, 3, True).items()}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def model_of(fields):
    return {name: value for name, value in fields.items() if name != "out_channels"}


def what_the_tensors_do_not_say(net):
    heads = {"num_heads": net.heads} if net.heads else {"num_head_channels": net.head_width}
    return heads | ({"num_classes": net.num_classes} if net.num_classes else {})


def test_our_paths_and_shapes_are_those_of_the_network():
    """Catches a parameter without a tensor, or with axes in another order than the network's."""
    for kind in KINDS:
        net = unet_oracle.network(kind)
        x, t, cond = unet_oracle.inputs(net, 1)
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"])
        found = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
        assert {path: link.shape for path, link in interop.links(net, "official", 3, True).items()} == found


@pytest.mark.parametrize("layout", interop.LAYOUTS)
@pytest.mark.parametrize("kind", OFFICIAL)
def test_weights_survive_a_round_trip(kind, layout):
    """Catches a field that is inferred wrongly, and an order of rows that is not the same both ways."""
    net = UNet(**OFFICIAL[kind])
    params = ours(net)
    theirs, config = interop.write(held(params), layout, model_of(OFFICIAL[kind]), (8, 8, 3))
    assert interop.recognises(theirs, layout)
    assert not any(interop.recognises(theirs, other) for other in interop.LAYOUTS if other != layout)
    back, sections = interop.read(theirs, layout, "a file", config)
    given = {name: getattr(net, name) for name in net.__dataclass_fields__}
    for name, value in sections["model"].items():
        if name not in ("name", "dtype", "param_dtype", "head_width", "null_label") or (name == "null_label" and net.num_classes):
            assert value == given[name], name
    assert sections["process"]["variance"] == ("learned_range" if net.out_channels == 6 else "fixed_small")
    assert sections.get("task") == ({"name": "diffusion", "cond_dropout": 0.0} if kind == "adm" else None)
    assert back.keys() == params.keys()
    for path, tensor in back.items():
        np.testing.assert_array_equal(tensor.load(), params[path], err_msg=path)


def heads_of_adm(x, qkv_weight, qkv_bias, heads, legacy):
    """Queries, keys and values [3, heads, E, N] as ADM's QKVAttentionLegacy and QKVAttention split them; x [C, N]."""
    qkv = qkv_weight[:, :, 0] @ x + qkv_bias[:, None]  # [3 C, N]
    if legacy:
        return qkv.reshape(heads, 3, -1, x.shape[-1]).swapaxes(0, 1)
    return qkv.reshape(3, heads, -1, x.shape[-1])


@pytest.mark.parametrize("legacy", [True, False])
def test_the_order_of_queries_keys_and_values(legacy):
    """Catches the trap of ADM: the rows of its qkv are (head, {q, k, v}, E) in all released models but one."""
    net = UNet(**OFFICIAL["adm"])
    config = what_the_tensors_do_not_say(net) | ({} if legacy else {"use_new_attention_order": True})
    theirs, _ = interop.write(held(ours(net)), "official", model_of(OFFICIAL["adm"]), (8, 8, 3))
    weight, bias = (theirs[f"middle_block.1.qkv.{kind}"].load() for kind in ("weight", "bias"))
    x = np.random.default_rng(1).normal(size=(weight.shape[1], 7)).astype(np.float32)
    wanted = heads_of_adm(x, weight, bias, weight.shape[1] // 8, legacy)
    back, _ = interop.read(theirs, "official", "a file", config)
    kernel, own_bias = (back[f"middle/attention/qkv/{kind}"].load() for kind in ("kernel", "bias"))
    found = np.einsum("cn,cshe->shen", x, kernel) + own_bias[..., None]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found - heads_of_adm(x, weight, bias, weight.shape[1] // 8, not legacy)).max() > 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_are_inferred_from_their_tensors(name):
    """Catches a release that is read with other heads, another order of qkv or another schedule than it was trained with."""
    published = PUBLISHED[name]
    net, channels = UNet(**published.fields), published.input_shape[-1]
    tensors = {}
    nothing = np.zeros(0, np.float32)
    for link in interop.links(net, "official", channels, True).values():
        for each in link.names:
            prefixed = each if each == interop.LDM_TABLE or not net.context_width else interop.LDM_PREFIX + each
            tensors[prefixed] = interop.Tensor(link.theirs, nothing.dtype, lambda: nothing)
    _, sections = interop.read(tensors, "official", name)
    found = UNet(**{k: v for k, v in sections["model"].items() if k not in ("name", "dtype", "param_dtype")}, out_channels=1)
    for field in net.__dataclass_fields__:
        if field not in ("out_channels", "param_dtype", "dtype", "parent", "name"):
            assert getattr(found, field) == getattr(net, field), field
    assert interop._is_legacy(published.fields, {}) == (name != "ADM@64")
    schedules = {"ADM@64": "cosine", "LDM-4@256": "scaled_linear", "LDM-8@256": "scaled_linear"}
    assert sections["process"]["schedule"] == schedules.get(name, "linear")


def test_a_whole_checkpoint_of_ldm_gives_its_moving_average():
    """Catches weights of the last step in place of the average, and tensors of the first stage taken for the network's."""
    fields = OFFICIAL["ldm"]
    net = UNet(**fields)
    average, last = ours(net, seed=1), ours(net, seed=2)
    theirs = interop.write(held(average), "official", model_of(fields), (8, 8, 3))[0]
    whole = dict(interop.write(held(last), "official", model_of(fields), (8, 8, 3))[0])
    for name, tensor in theirs.items():
        if name.startswith(interop.LDM_PREFIX):
            whole["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor
    whole |= held({"first_stage_model.quantize.embedding.weight": np.zeros((4, 3), np.float32), "betas": np.zeros(9, np.float32)})
    back, _ = interop.read(whole, "official", "a checkpoint", what_the_tensors_do_not_say(net))
    for path, tensor in back.items():
        wanted = last if path == "label_embedding/embedding" else average  # LDM does not average its class table
        np.testing.assert_array_equal(tensor.load(), wanted[path], err_msg=path)
    del whole["model_ema.diffusion_modelout0bias"]
    with pytest.raises(UserError, match=r"moving average without model_ema\.diffusion_modelout0bias"):
        interop.read(whole, "official", "a checkpoint", what_the_tensors_do_not_say(net))


def test_what_the_tensors_do_not_say_is_asked_for():
    """Catches a guess: the number of heads, or whether a table of 1,001 rows has a null label."""
    fields = OFFICIAL["adm"] | {"num_classes": 10, "null_label": True}
    net = UNet(**fields)
    theirs = interop.write(held(ours(net)), "official", model_of(fields), (8, 8, 3))[0]
    with pytest.raises(UserError, match="11 rows, which may be 11 classes, or 10 and the null label"):
        interop.read(theirs, "official", "a file", {"num_head_channels": 8})
    with pytest.raises(UserError, match="num_heads or num_head_channels"):
        interop.read(theirs, "official", "a file", {"num_classes": 10})
    with pytest.raises(UserError, match="11 rows, and num_classes is 3; give 11 or 10"):
        interop.read(theirs, "official", "a file", {"num_classes": 3, "num_heads": 4})
    assert interop.read(theirs, "official", "a file", {"num_classes": 10, "num_heads": 4})[1]["model"]["null_label"]


def test_what_a_layout_cannot_hold_is_refused():
    """Catches weights that are written and that the other code would compute something else with."""
    first = ADM | {"multipliers": (0.5, 1)}
    with pytest.raises(UserError, match="as many channels as the time's table; write --to=official"):
        interop.write(held(ours(UNet(**first))), "diffusers", model_of(first), (8, 8, 3))
    with pytest.raises(UserError, match="norm_groups is 4, and the papers' code has 32; write --to=diffusers"):
        interop.write(held(ours(UNet(**ADM))), "official", model_of(ADM), (8, 8, 3))
    heads = ADM | {"heads": 2, "head_width": 0, "attention_factors": (1, 2)}
    with pytest.raises(UserError, match="heads of one width; these have"):
        interop.write(held(ours(UNet(**heads))), "diffusers", model_of(heads), (8, 8, 3))


def test_a_config_of_diffusers_that_computes_something_else_is_refused():
    """Catches a field of config.json that is ignored."""
    theirs, config = interop.write(held(ours(UNet(**ADM))), "diffusers", model_of(ADM), (8, 8, 3))
    with pytest.raises(UserError, match="freq_shift is 1, and dit_jax computes 0"):
        interop.read(theirs, "diffusers", "a folder", config | {"freq_shift": 1})
    with pytest.raises(UserError, match="down_block_types is"):
        interop.read(theirs, "diffusers", "a folder", config | {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]})
    with pytest.raises(UserError, match="'VQModel', not a UNet2DModel or UNet2DConditionModel"):
        interop.read(theirs, "diffusers", "a folder", {"_class_name": "VQModel"})
    with pytest.raises(UserError, match=r"missing conv_in\.bias"):
        interop.read({k: v for k, v in theirs.items() if k != "conv_in.bias"}, "diffusers", "a folder", config)


def test_diffusers_converts_ldm_to_the_same_tensors():
    """Catches a name or a shape of the CompVis layout: diffusers' own conversion is the oracle."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    fields = OFFICIAL["ldm"] | {"multipliers": (1, 2, 3), "num_res_blocks": 2}
    net = UNet(**fields)
    params = held(ours(net))
    official = interop.write(params, "official", model_of(fields), (8, 8, 3))[0]
    wanted, config = interop.write(params, "diffusers", model_of(fields), (8, 8, 3))
    checkpoint = {name: torch.from_numpy(np.ascontiguousarray(tensor.load())) for name, tensor in official.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, config | {"class_embed_type": None, "addition_embed_type": None})
    assert converted.keys() == wanted.keys() - {interop.LDM_TABLE}
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[name].load(), err_msg=name)


def test_diffusers_reads_the_folder(tmp_path):
    """Catches a config.json or names that `from_pretrained` does not take."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    import json

    from dit_jax.interop.tensors import write_safetensors

    for kind, name in (("adm", "UNet2DModel"), ("ldm", "UNet2DConditionModel")):
        net = unet_oracle.network(kind)
        params = ours(net)
        theirs, config = interop.write(held(params), "diffusers", model_of(KINDS[kind]), (8, 8, 3))
        folder = tmp_path / kind
        folder.mkdir()
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", theirs, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        module = getattr(diffusers, name).from_pretrained(folder)
        loaded = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        assert loaded.keys() == theirs.keys() - {interop.LDM_TABLE}
        for each, array in loaded.items():
            np.testing.assert_array_equal(array, theirs[each].load())
