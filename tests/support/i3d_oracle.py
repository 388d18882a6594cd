"""I3D in PyTorch, written from the paper's table and the ports' names, with random weights."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


def same(x, window: list[int], stride: list[int]):
    """Zero padding as TensorFlow's SAME."""
    pads: list[int] = []
    for size, k, s in zip([x.size(4), x.size(3), x.size(2)], window[::-1], stride[::-1]):  # noqa: B905 (TorchScript)
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    def __init__(self, inputs, outputs, size=1, stride=1, bn=True):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, size, stride, bias=not bn)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-5) if bn else nn.Identity()
        self.size, self.stride, self.active = size, stride, bn

    def forward(self, x):
        x = self.bn(self.conv3d(same(x, [self.size] * 3, [self.stride] * 3)))
        return F.relu(x) if self.active else x


def pool(x, window: list[int], stride: list[int]):
    return F.max_pool3d(same(x, window, stride), window, stride)


class Mixed(nn.Module):
    def __init__(self, inputs, a, b, c, d, e, f):
        super().__init__()
        self.b0, self.b1a, self.b1b = Unit(inputs, a), Unit(inputs, b), Unit(b, c, 3)
        self.b2a, self.b2b, self.b3b = Unit(inputs, d), Unit(d, e, 3), Unit(inputs, f)

    def forward(self, x):
        pooled = pool(x, [3, 3, 3], [1, 1, 1])
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """[N, 3, F, H, W] in [-1, 1] -> [N, 400]."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7, self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit(3, 64, 7, 2), Unit(64, 64), Unit(64, 192, 3)
        width = 192
        for name, (a, b, c, d, e, f) in WIDTHS.items():
            setattr(self, f"Mixed_{name}", Mixed(width, a, b, c, d, e, f))
            width = a + c + e + f
        self.logits = Unit(1024, 400, bn=False)

    def forward(self, x):
        x = pool(self.Conv3d_1a_7x7(x), [1, 3, 3], [1, 2, 2])
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), [1, 3, 3], [1, 2, 2])
        x = pool(self.Mixed_3c(self.Mixed_3b(x)), [3, 3, 3], [2, 2, 2])
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        x = self.Mixed_5c(self.Mixed_5b(pool(x, [2, 2, 2], [2, 2, 2])))
        x = F.avg_pool3d(x, [2, x.size(3), x.size(4)], 1)
        return self.logits(x)[:, :, :, 0, 0].mean(2)


def random_network(network=None, seed=0):
    """A network whose norms are not the identity."""
    torch.manual_seed(seed)
    network = network or I3D()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.1, 0.4)
    return network.eval()
