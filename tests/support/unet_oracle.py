"""Tiny U-Nets, and diffusers' modules of the same sizes with random weights."""

import numpy as np
import pytest

from dit_jax.interop import unet as interop
from dit_jax.interop.tensors import Tensor
from dit_jax.models.unet import UNet

ADM = {
    "channels": 16,
    "multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_factors": (2,),
    "head_width": 8,
    "norm_groups": 4,
    "num_classes": 5,
    "null_label": False,
    "out_channels": 6,
}
LDM = ADM | {
    "multipliers": (1, 3),
    "heads": 2,
    "head_width": 0,
    "scale_shift_norm": False,
    "resblock_updown": False,
    "context_width": 24,
    "null_label": True,
    "out_channels": 3,
}
KINDS = {  # other shapes than the paper's; together they have all that differs between the papers' networks
    "adm": ADM | {"multipliers": (1, 3), "attention_factors": (1,)},
    "adm_upsampler": ADM | {"resblock_updown": False, "scale_shift_norm": False, "num_classes": 0, "low_res_channels": 3},
    "ldm": LDM,
}
SIZE = (8, 12)  # height and width differ


def network(kind, **fields):
    return UNet(**{**KINDS[kind], **fields})


def held(arrays):
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def inputs(net, batch=2, size=SIZE, seed=0):
    """(x, t, cond): NumPy arrays for a network, channels last."""
    rng = np.random.default_rng(seed)
    cond = {}
    if net.num_classes:
        cond["label"] = np.arange(batch, dtype=np.int32) * 3 % net.num_classes
    if net.low_res_channels:
        cond["low_res"] = rng.normal(size=(batch, size[0] // 4, size[1] // 4, net.low_res_channels)).astype(np.float32)
    x = rng.normal(size=(batch, *size, 3)).astype(np.float32)
    return x, np.linspace(3.0, 871.0, batch, dtype=np.float32), cond


def module(net, seed=0):
    """diffusers' module of a network, whose tensors are all random and not zero; and LDM's class table, or None."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = interop._config(net, (*SIZE, 3))
    torch.manual_seed(seed)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)
    table = torch.randn(net.num_classes + 1, net.context_width, requires_grad=True) if net.context_width else None
    return theirs, table, config


def tensors_of(theirs, table):
    """Their tensors by name, with the class table."""
    arrays = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    if table is not None:
        arrays[interop.LDM_TABLE] = table.detach().numpy()
    return held(arrays)


def their_output(theirs, table, net, x, t, cond):
    """[B, H, W, out] as a tensor that has a gradient."""
    import torch
    from torch.nn import functional

    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    if net.low_res_channels:
        low = torch.from_numpy(cond["low_res"]).permute(0, 3, 1, 2)
        x = torch.cat([x, functional.interpolate(low, x.shape[2:], mode="bilinear")], dim=1)
    label = torch.from_numpy(cond["label"]).long() if net.num_classes else None
    if table is not None:
        output = theirs(x, torch.from_numpy(t), encoder_hidden_states=table[label][:, None]).sample
    else:
        output = theirs(x, torch.from_numpy(t), class_labels=label).sample
    return output.permute(0, 2, 3, 1)
