"""Writes network.npz: random weights, and what the official DiT and SiT networks compute with them.

    python tests/golden/make_network.py --dit=DIR --sit=DIR

DIR as for make_golden.py; needs torch. weights/... is one state_dict that both networks load, in/... the inputs, dit/... and
sit/... the outputs; images are channels-last.
"""

import numpy as np
import torch
from make_golden import checkouts, load_models, numpy, write
from torch import nn

SIZE, CHANNELS, CLASSES = 6, 4, 10
LABELS = (0, 3, 10, 7, 9, 10)  # 10 is the null label
TIMES = {"dit": (0, 1, 37.5, 500, 999, 500), "sit": (0, 0.001, 0.0375, 0.5, 1, 0.5)}
CFG_SCALE, PAIRS = 4.0, 3  # guided: the first three inputs, the last three times and the labels there are


class PatchEmbed(nn.Module):
    """timm's, without the norm that DiT leaves out: a convolution whose stride is its size, then [B, N, D]."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """timm's, without dropout and norms: qkv holds all heads of q, then of k, then of v."""

    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.num_heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """timm's, without dropout."""

    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        assert drop == 0
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def build(path, name: str):
    """A tiny DiT or SiT of a checkout's models.py, with the classes above for timm's."""
    module = load_models(path / "models.py")
    vars(module).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    return getattr(module, name)(
        input_size=SIZE, patch_size=2, in_channels=CHANNELS, hidden_size=24, depth=2, num_heads=3, num_classes=CLASSES
    ).eval()


def make_weights(network, rng) -> dict[str, np.ndarray]:
    """The official position table, and odd multiples of 1/128 for all else: nowhere zero, and they compress well."""
    return {
        name: tensor.numpy()
        if name == "pos_embed"
        else ((np.floor(0.2 * rng.normal(size=tensor.shape) * 64) + 0.5) / 64).astype(np.float32)
        for name, tensor in network.state_dict().items()
    }


def main():
    arguments, rng = checkouts(__doc__), np.random.default_rng(0)
    networks = {"dit": build(arguments.dit, "DiT"), "sit": build(arguments.sit, "SiT")}
    weights = make_weights(networks["dit"], rng)
    x, labels = rng.normal(size=(len(LABELS), SIZE, SIZE, CHANNELS)).astype(np.float32), np.array(LABELS, np.int32)
    arrays = {f"weights/{name}": a for name, a in weights.items()} | {"in/x": x, "in/label": labels}
    x, labels = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(labels).long()
    for kind, network in networks.items():
        network.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
        t = torch.tensor(TIMES[kind], dtype=torch.float32)
        null = torch.full((PAIRS,), CLASSES)
        with torch.no_grad():
            output = network(x, t, labels)
            guided = network.forward_with_cfg(
                x[:PAIRS].repeat(2, 1, 1, 1), t[-PAIRS:].repeat(2), torch.cat([labels[-PAIRS:], null]), CFG_SCALE
            )[:PAIRS]
        arrays |= {f"{kind}/t": t.numpy(), f"{kind}/output": numpy(output), f"{kind}/guided": numpy(guided)}
    write("network.npz", arrays)


if __name__ == "__main__":
    main()
