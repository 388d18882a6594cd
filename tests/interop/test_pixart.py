"""PixArt against diffusers' `PixArtTransformer2DModel`, and its weights."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import unflatten_dict

from dit_jax.errors import UserError
from dit_jax.interop import pixart
from dit_jax.models.pixart import PixArt

FIELDS = {"patch_size": 2, "depth": 3, "width": 32, "heads": 4, "context_width": 24, "mlp_ratio": 4.0}
SHAPE = (12, 12, 4)


def ours(grid):
    fields = FIELDS | {"position_grid": grid}
    rng = np.random.default_rng(1)
    shapes = pixart.shapes_of(PixArt(**fields, out_channels=8), 4)
    return fields, {path: held(0.15 * rng.standard_normal(shape).astype(np.float32)) for path, shape in shapes.items()}


@pytest.mark.parametrize("layout", pixart.LAYOUTS)
@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_round_trip(grid, layout):
    """Catches a tensor that is lost or transposed, and a scale of positions that the config or table does not carry."""
    fields, tensors = ours(grid)
    theirs, config = pixart.write(tensors, layout, {"name": "pixart", **fields}, SHAPE)
    assert pixart.recognises(theirs, layout)
    assert not pixart.recognises(theirs, "official" if layout == "diffusers" else "diffusers")
    back, sections = pixart.read(theirs, layout, "a file", config or {"num_attention_heads": 4})
    assert all(sections["model"][name] == fields[name] for name in fields if name != "mlp_ratio")
    assert sections["input_side"] == SHAPE[0]
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(back[path].load(), tensor.load())


def as_authors(theirs, width, side):
    """The authors' tensors of diffusers', by the renaming of their conversion script; with its table and random null text."""
    renamed = {}
    for name, tensor in theirs.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", module)
        if block and block[2] in FUSED:
            new, part = FUSED[block[2]]
            renamed.setdefault(f"blocks.{block[1]}.{new}.{kind}", []).append((part, tensor.load()))
        elif block:
            renamed[f"blocks.{block[1]}.{PLAIN[block[2]]}.{kind}"] = [(0, tensor.load())]
        elif module in OUTER:
            renamed[f"{OUTER[module]}.{kind}"] = [(0, tensor.load())]
        else:
            renamed[{"scale_shift_table": "final_layer.scale_shift_table"}.get(name, re.sub("^transformer_", "", name))] = [
                (0, tensor.load())
            ]
    found = {name: np.concatenate([x for _, x in sorted(parts, key=lambda part: part[0])]) for name, parts in renamed.items()}
    grid = np.arange(side // 2, dtype=np.float32) / 2  # lewei_scale 2
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))
    columns, rows = (axis.reshape(-1)[:, None] * omega for axis in np.meshgrid(grid, grid))
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return found | {"pos_embed": table[None].astype(np.float32), "y_embedder.y_embedding": np.ones((7, 24), np.float32)}


PLAIN = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
FUSED = {f"attn1.to_{part}": ("attn.qkv", i) for i, part in enumerate("qkv")}
FUSED |= {f"attn2.to_{part}": ("cross_attn.kv_linear", i) for i, part in enumerate("kv")}
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
}


def test_the_layout_of_the_authors():
    """Catches a name of the authors that differs from their conversion script, and a table of positions that is not read."""
    fields, tensors = ours((3, 3))
    theirs, _ = pixart.write(tensors, "diffusers", {"name": "pixart", **fields}, SHAPE)
    authors = as_authors(theirs, 32, SHAPE[0])
    written, _ = pixart.write(tensors, "official", {"name": "pixart", **fields}, SHAPE)
    assert authors.keys() - written.keys() == {"y_embedder.y_embedding"} and not written.keys() - authors.keys()
    for name, tensor in written.items():
        np.testing.assert_allclose(tensor.load(), authors[name], atol=1e-6 if name == "pos_embed" else 0)
    opened = {name: held(x) for name, x in authors.items()}
    back, sections = pixart.read(opened, "official", "a file", {"num_attention_heads": 4})
    assert sections["model"]["position_grid"] == (3, 3) and back.keys() == tensors.keys()
    with pytest.raises(UserError, match=r"its width 32 is no multiple of 72; give --heads"):
        pixart.read(opened, "official", "a file")
    with pytest.raises(UserError, match=r"its table of positions \[1, 36, 32\] is not the sine-cosine one"):
        pixart.read(opened | {"pos_embed": held(authors["pos_embed"] + 0.1)}, "official", "a file")
    with pytest.raises(UserError, match=r"use_additional_conditions \(csize_embedder\)"):
        pixart.read(opened | {"csize_embedder.mlp.0.weight": held(np.ones(3))}, "official", "a file")


@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_equals_diffusers(grid):
    """Catches a norm before the cross-attention, padding that is attended to, and vectors that are added to the wrong places."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    fields, tensors = ours(grid)
    theirs, config = pixart.write(tensors, "diffusers", {"name": "pixart", **fields}, SHAPE)
    module = diffusers.PixArtTransformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    module.load_state_dict({name: torch.tensor(x.load()) for name, x in theirs.items()}, strict=True)
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, *SHAPE)).astype(np.float32), rng.standard_normal((2, 7, 24)).astype(np.float32)
    t, mask = np.array([3.0, 721.5], np.float32), np.arange(7) < np.array([[7], [3]])
    with torch.no_grad():
        expected = module(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(context),
            torch.tensor(t),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=torch.tensor(mask),
            return_dict=False,
        )[0]
    params = unflatten_dict({path: jnp.asarray(tensor.load()) for path, tensor in tensors.items()}, sep="/")
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        net = PixArt(**fields, out_channels=8, dtype=dtype)
        output = net.apply({"params": params}, x, t, {"context": context, "context_mask": mask})
        assert output.dtype == jnp.float32
        assert tiny.distance(output, expected.permute(0, 2, 3, 1).numpy()) < tolerance
