"""HDiT in PyTorch: PyPI's `hdit`, an extraction of k-diffusion's image_transformer_v2, with the weights of ours."""

import os
import sys
import types

import numpy as np
import pytest

STUBS = ("natten", "torchdiffeq", "torchsde", "dctorch", "dctorch.functional", "torchvision", "torchvision.transforms")
RENAMED = (  # k-diffusion's name, that of the package
    ("time_emb.", "time_embedding."),
    ("time_in_proj.", "time_projection."),
    ("aug_emb.", "guidance_modules.0."),
    ("aug_in_proj.", "guidance_modules_projections.0."),
    ("class_emb.", "guidance_modules.1."),
    ("mid_level.", "middle_level."),
    ("norm.linear.", "norm.scale."),
)


def package():
    """The package. It imports modules that it does not need here, and that are not installed: empty ones stand in for them."""
    torch = pytest.importorskip("torch")
    missing = [name for name in STUBS if name not in sys.modules]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchdiffeq"].odeint = None
    for name in ("dctorch.functional", "torchvision.transforms"):
        setattr(sys.modules[name.split(".")[0]], name.split(".")[1], sys.modules[name])
    sys.modules["torchvision.transforms"].functional = None
    os.environ["K_DIFFUSION_USE_COMPILE"] = "0"
    try:
        return torch, pytest.importorskip("hdit")
    finally:
        for name in missing:  # others ask whether torchvision can be imported
            del sys.modules[name]


def network(fields, channels, weights):
    """The network in float64: arrays (x [B, H, W, C], t, augmentation, label) -> tensor [B, H, W, C]; and its parameters.

    Args:
        fields: of our network; two levels at least, and no neighbourhoods, which need natten.
        weights: {k-diffusion's name: array}; the parameters have these names too.
    """
    torch, hdit = package()
    from hdit.modules.attention.self_attention import GlobalTransformerLayer
    from hdit.modules.attention.shifted_self_attention import ShiftedWindowTransformerLayer
    from hdit.modules.models.hourglass_diffusion_transformer.layers import FourierFeatures

    widths, depths, kinds, m, e = (fields[name] for name in ("widths", "depths", "attentions", "mapping_width", "head_width"))
    levels = len(widths) - 1

    def builder(kind):
        def build(context):
            d, i = context.width, context.block_index
            if kind == "global":
                return GlobalTransformerLayer(d, 3 * d, e, m)
            w = fields["window_size"]
            return ShiftedWindowTransformerLayer(d, 3 * d, e, m, w, w // 2 if i % 2 else 0)

        return build

    builders = {number: builder(kinds[min(number, 2 * levels - number)]) for number in range(2 * levels + 1)}
    net = hdit.HDiT(
        channels, fields["out_channels"], None, [fields["patch_size"]] * 2, list(widths[:-1]), widths[-1], list(depths[:-1]),
        depths[-1], builders, m, fields["mapping_depth"],
        guidance_modules=[FourierFeatures(9, m), torch.nn.Embedding(fields["num_classes"] + 1, m)],
        guidance_dims=[m, m],
    )  # fmt: skip

    def rename(name):
        for ours, theirs in RENAMED:
            name = name.replace(ours, theirs) if ours.startswith("norm") or name.startswith(ours) else name
        return name

    given = {rename(name): torch.from_numpy(np.array(array)) for name, array in weights.items()}
    net.load_state_dict({"guidance_modules_projections.1.weight": torch.eye(m)} | given)
    parameters = dict(net.double().named_parameters())

    def forward(x, t, augmentation, label):
        x, t, augmentation = (torch.from_numpy(np.float64(array)) for array in (x, t, augmentation))
        return net(x.permute(0, 3, 1, 2), t, augmentation, torch.from_numpy(label).long()).permute(0, 2, 3, 1)

    return forward, {name: found for name in weights if (found := parameters.get(rename(name))) is not None}
