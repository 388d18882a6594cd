"""DINOv2's weights: every tensor arrives or is named."""

import metric_networks
import numpy as np
import pytest
from metric_networks import tensors

from dit_jax.convert import formats
from dit_jax.convert.formats import Source
from dit_jax.errors import UserError
from dit_jax.interop import dinov2, pt_writer


def converted(tmp_path, kind="plain"):
    pt_writer.write(tmp_path / "x.pth", tensors(metric_networks.dinov2(kind)))
    written = formats.write(formats.read(Source("dinov2", tmp_path / "x.pth")), "dit_jax", tmp_path / "x.safetensors")
    return dinov2.load(tmp_path / "x.safetensors"), written


def test_every_tensor_arrives(tmp_path):
    """A block out of order, the registers given a position, the mask token kept."""
    arrays = metric_networks.dinov2("registers")
    params, written = converted(tmp_path, "registers")
    assert written["tensors"] == len(arrays) - 1
    np.testing.assert_array_equal(params["tokens"][1:], arrays["register_tokens"][0])
    np.testing.assert_array_equal(params["tokens"][0], arrays["cls_token"][0, 0] + arrays["pos_embed"][0, 0])
    np.testing.assert_array_equal(params["pos_embed"].reshape(-1, 128), arrays["pos_embed"][0, 1:])
    for i in range(2):
        kernel = params["blocks"]["qkv"]["kernel"][i].reshape(128, 384)
        np.testing.assert_array_equal(kernel, arrays[f"blocks.{i}.attn.qkv.weight"].T)
        np.testing.assert_array_equal(params["blocks"]["ls2"][i], arrays[f"blocks.{i}.ls2.gamma"])


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"norm__bias": None, "blocks__1__norm1__bias": np.zeros(3, np.float32), "head": np.zeros(2, np.float32)},
            "3 differences",
        ),
        (
            {"blocks__0__attn__qkv__weight": None, "blocks__1__attn__qkv__weight": None},
            r"missing blocks\.\[0,1\]\.attn\.qkv\.weight",
        ),
        ({"patch_embed__proj__weight": np.zeros((128, 3, 16, 16), np.float32)}, "patch size 16, not 14"),
        ({"patch_embed__proj__weight": np.zeros((100, 3, 14, 14), np.float32)}, "heads of 64 of 100"),
        ({"pos_embed": np.zeros((1, 1371, 128), np.float32)}, "positions 1371"),
        ({"pos_embed": None}, "is not DINOv2"),
        ({"norm__bias": np.full(128, np.inf, np.float32)}, "infinity"),
    ],
)
def test_what_the_network_cannot_have(changes, text):
    """Another vision transformer's weights, damaged ones, or a tensor passed over."""
    with pytest.raises(UserError, match=f"(?s)x.pth.*{text}"):
        dinov2.from_published(tensors(metric_networks.dinov2("plain"), **changes), "x.pth")


def test_wrong_files_are_named(tmp_path):
    """A stack trace from deep inside instead of the path and the remedy."""
    with pytest.raises(UserError, match=r"nowhere.*--download=dinov2-vitl14"):
        dinov2.load(tmp_path / "nowhere")
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=r"--from=dinov2 --weights=.*x\.pth"):
        dinov2.load(tmp_path / "x.pth")
