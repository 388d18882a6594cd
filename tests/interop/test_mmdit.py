"""MM-DiT against diffusers' `SD3Transformer2DModel`, and both layouts of its weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import unflatten_dict

from dit_jax.interop import mmdit
from dit_jax.models.mmdit import MMDiT

FIELDS = {
    "patch_size": 2, "depth": 4, "width": 128, "heads": 2, "context_width": 24, "pooled_width": 20, "table_side": 12,
}  # fmt: skip
KINDS = {"sd3": {}, "sd3.5-large": {"qk_norm": True}, "sd3.5-medium": {"qk_norm": True, "dual_blocks": 2}}
SHAPE = (12, 18, 4)


def ours(kind):
    """(fields, {path: random array})."""
    fields = FIELDS | {"position": "table", "table_base": 64, "mlp_ratio": 4.0, "qk_norm": False, "dual_blocks": 0} | KINDS[kind]
    rng = np.random.default_rng(1)
    shapes = mmdit.shapes_of(MMDiT(**fields, out_channels=4), 4)
    return fields, {path: held(0.1 * rng.standard_normal(shape).astype(np.float32)) for path, shape in shapes.items()}


@pytest.mark.parametrize("layout", mmdit.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, layout):
    """Catches a tensor that is lost, transposed or swapped one way only, and fields that are inferred wrongly."""
    fields, tensors = ours(kind)
    theirs, _ = mmdit.write(tensors, layout, {"name": "mmdit", **fields}, SHAPE)
    assert mmdit.recognises(theirs, layout)
    assert not mmdit.recognises(theirs, "diffusers" if layout == "official" else "official")
    if layout == "official":
        bare = {name.removeprefix(mmdit.PREFIX): x for name, x in theirs.items()}
        assert len(theirs.keys() & bare.keys()) == 0 and mmdit.recognises(bare, layout)
        assert mmdit.read(bare, layout, "a file")[0].keys() == tensors.keys()
        theirs |= {"first_stage_model.x": held(np.zeros(3))}
    back, sections = mmdit.read(theirs, layout, "a file")
    assert {name: sections["model"][name] for name in fields if name != "mlp_ratio"} == {
        name: value for name, value in fields.items() if name != "mlp_ratio"
    }
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(back[path].load(), tensor.load())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind):
    """Catches the order of streams, vectors and halves, another norm, the crop of the table, and a context that the last block
    changes."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    fields, tensors = ours(kind)
    theirs, config = mmdit.write(tensors, "diffusers", {"name": "mmdit", **fields}, SHAPE)
    module = diffusers.SD3Transformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    module.load_state_dict({name: torch.tensor(x.load()) for name, x in theirs.items()})
    rng = np.random.default_rng(0)
    x, context, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, *SHAPE), (2, 5, 24), (2, 20)))
    t = np.array([3.0, 721.5], np.float32)
    with torch.no_grad():
        expected = module(
            torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(context), torch.tensor(pooled), torch.tensor(t), return_dict=False
        )[0]
    params = unflatten_dict({path: jnp.asarray(tensor.load()) for path, tensor in tensors.items()}, sep="/")
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        net = MMDiT(**fields, out_channels=4, dtype=dtype)
        output = net.apply({"params": params}, x, t, {"context": context, "pooled": pooled})
        assert output.dtype == jnp.float32
        assert tiny.distance(output, expected.permute(0, 2, 3, 1).numpy()) < tolerance


CLIP = (3, 8, 12, 4)


@pytest.mark.parametrize("shape, widths", [((8, 12, 4), (16, 24, 24)), (CLIP, (8, 28, 28)), (CLIP, (24, 16, 24))])
def test_rotary_positions_equal_flux(shape, widths):
    """Catches pairs (x_i, x_{i + E/2}) in place of neighbours, axes in another order, frequencies of the whole head or of another
    axis, text that is rotated, and queries that are rotated before their norm: for images, and for
    clips, whose frame is the first id. Flux's double blocks are joint blocks with rotary positions."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    fields, tensors = ours("sd3.5-large")
    depth, inputs = fields["depth"], fields["patch_size"] ** 2 * shape[-1]
    named = {name: x.load() for name, x in mmdit.write(tensors, "diffusers", {"name": "mmdit", **fields}, SHAPE)[0].items()}
    named |= {f"x_embedder.{kind}": named.pop(f"pos_embed.proj.{kind}") for kind in ("weight", "bias")}
    named["x_embedder.weight"] = named["x_embedder.weight"].reshape(fields["width"], inputs)
    del named["pos_embed.pos_embed"]
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=inputs, num_layers=depth, num_single_layers=0, attention_head_dim=64,
        num_attention_heads=fields["heads"], joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=widths,
    ).eval()  # fmt: skip
    whole = {name: 0.1 * np.random.default_rng(4).standard_normal(x.shape) for name, x in flux.state_dict().items()}
    for kind in ("weight", "bias"):  # their last block's text goes on: our two of its six vectors are (shift, scale)
        last = f"transformer_blocks.{depth - 1}.norm1_context.linear.{kind}"
        halves = named.pop(last)
        whole[last][: len(halves)] = np.roll(halves, len(halves) // 2, axis=0)
    assert named.keys() <= whole.keys()
    flux.load_state_dict({name: torch.tensor(x, dtype=torch.float32) for name, x in (whole | named).items()})

    rng = np.random.default_rng(0)
    x, context, pooled = (rng.standard_normal(size).astype(np.float32) for size in ((2, *shape), (2, 5, 24), (2, 20)))
    t = np.array([3.0, 721.5], np.float32)
    frames, rows, columns = (shape[0] if len(shape) == 4 else 1, shape[-3] // 2, shape[-2] // 2)
    patches = x.reshape(2, frames, rows, 2, columns, 2, 4)
    tokens = patches.transpose(0, 1, 2, 4, 6, 3, 5).reshape(2, -1, inputs)  # in the order channel, row, column
    ids = np.stack(np.meshgrid(*map(np.arange, (frames, rows, columns)), indexing="ij"), axis=-1).reshape(-1, 3)
    with torch.no_grad():
        wanted = flux(
            *(torch.tensor(value) for value in (tokens, context, pooled, t / 1000)),
            img_ids=torch.tensor(ids), txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0].numpy()  # fmt: skip
    wanted = wanted.reshape(2, frames, rows, columns, 2, 2, 4).transpose(0, 1, 2, 4, 3, 5, 6).reshape(x.shape)
    params = unflatten_dict({path: jnp.asarray(tensor.load()) for path, tensor in tensors.items()}, sep="/")
    net = MMDiT(
        **fields | {"position": "rope", "rope_widths": widths, "rope_frequencies": "geometric", "table_side": None},
        out_channels=4,
    )
    assert tiny.distance(net.apply({"params": params}, x, t, {"context": context, "pooled": pooled}), wanted) < 1e-5
