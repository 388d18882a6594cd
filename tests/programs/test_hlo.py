import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dit_jax.parallel.mesh import make_mesh
from dit_jax.programs import collectives, hlo, jaxpr_flops, traffic
from dit_jax.programs.traffic import hbm_traffic

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def program(body, others=""):
    return hlo.parse(
        textwrap.dedent(others) + "\nENTRY %main (p: f32[8,16]) -> f32[8,16] {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n" + textwrap.dedent(body) + "\n}\n"
    )


def only(body, others=""):
    (found,) = collectives.find(program(body, others), 8)
    return found


GROUPS = [  # as XLA prints them -> groups, axes of MESH
    ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
    ("{{0,2},{1,3},{4,6},{5,7}}", [[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
    ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
    ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
    ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]], "data+tensor"),
    ("[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]], "data+fsdp+tensor"),
    ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]], "data+fsdp+tensor"),
    ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
    ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'c'}", [[0, 4], [2, 6], [1, 5], [3, 7]], "data"),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
    ("{{0,3},{1,2},{4,7},{5,6}}", [[0, 3], [1, 2], [4, 7], [5, 6]], "fsdp+tensor"),
]


@pytest.mark.parametrize("text, groups, axes", GROUPS)
def test_replica_groups(text, groups, axes):
    """A form of replica groups that is read wrongly, or traffic put down to another axis of the mesh."""
    found = collectives.replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add", 8)
    assert found.tolist() == groups
    assert collectives.axes_of(found, MESH) == axes


def test_unknown_replica_groups():
    """A form that XLA begins to print some day and that is taken for something else."""
    with pytest.raises(ValueError, match="unknown form"):
        collectives.replica_groups("replica_groups=spiral(4)", 8)


KINDS = [  # p is 512 bytes; groups of 4
    ("all-gather", "f32[32,16]{1,0} all-gather(%p), dimensions={0}, replica_groups=[2,4]<=[8]", 3 * 512),
    ("reduce-scatter", "f32[2,16]{1,0} reduce-scatter(%p), dimensions={0}, replica_groups=[2,4]<=[8], to_apply=%add", 384),
    ("all-reduce", "f32[8,16]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add", 768),
    ("all-to-all", "f32[8,16]{1,0} all-to-all(%p), dimensions={0}, replica_groups=[2,4]<=[8]", 384),
    ("collective-permute", "f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,2}}", 512),
    ("all-gather", "(f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%p), dimensions={0}, replica_groups=[2,4]<=[8]", 3 * 512),
    ("all-reduce", "f32[8,16]{1,0} all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add", 768),
]


@pytest.mark.parametrize("kind, text, sent", KINDS)
def test_bytes_of_each_kind(kind, text, sent):
    """Traffic off by the size of the group, a kind that is overlooked, a start counted with its done."""
    found = only(f"  %c = {text}\n  ROOT %d = f32[8,16]{{1,0}} negate(%p)")
    assert (found.kind, found.sent_bytes, found.times) == (kind, sent, 1)


def test_what_stays_on_its_device_is_no_traffic():
    """Groups of one and permutes to oneself counted as communication."""
    assert not collectives.find(program("  ROOT %c = f32[8,16]{1,0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add"), 8)
    assert not collectives.find(
        program("  ROOT %c = f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}"), 8
    )


SCATTER = """\
%scatter (q: f32[8,16]) -> f32[2,16] {
  %q = f32[8,16]{1,0} parameter(0)
  %i = s32[] constant(0)
  %r = f32[8,16]{1,0} all-reduce(%q), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[2,16]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,16}
}
"""


def test_reduce_scatter_as_a_tpu_writes_it():
    """The fused all-reduce of which a slice is kept, counted as twice the traffic."""
    found = only("  ROOT %f = f32[2,16]{1,0} fusion(%p), kind=kCustom, calls=%scatter", SCATTER)
    assert (found.kind, found.sent_bytes) == ("reduce-scatter", 384)


LOOP = """\
%body (t: (u32[], f32[8,16])) -> (u32[], f32[8,16]) {
  %t = (u32[], f32[8,16]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %step = u32[] constant(2)
  %next = u32[]{:T(128)} add(%i, %step)
  %r = f32[8,16]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %u = (u32[], f32[8,16]{1,0}) tuple(%next, %r)
}
%test (t: (u32[], f32[8,16])) -> pred[] {
  %t = (u32[], f32[8,16]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %limit = u32[] constant(9)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
"""
CALL = """\
  %zero = u32[] constant(0)
  %init = (u32[], f32[8,16]{1,0}) tuple(%zero, %p)
  %w = (u32[], f32[8,16]{1,0}) while(%init), condition=%test, body=%body"""


@pytest.mark.parametrize("noted, times", [(', backend_config={"known_trip_count":{"n":"28"}}', 28), ("", 5)])
def test_loops(noted, times):
    """A body counted once; a loop of step 2 counted as if its step were 1."""
    p = program(CALL + noted, LOOP)
    (found,) = collectives.find(p, 8)
    assert found.times == times and not p.unknown_loops()
    table = collectives.by_kind_and_axis([found], MESH)
    assert table == {"all-reduce": {"tensor": times * 512}}


def test_unknown_loop_is_reported():
    """A loop whose length cannot be known, silently counted once."""
    p = program(CALL, LOOP.replace("add(%i, %step)", "multiply(%i, %step)"))
    assert p.unknown_loops() == ["w"] and collectives.find(p, 8)[0].times == 1


def test_a_collective_beside_other_work_counts_once():
    """One all-gather that a TPU carries out in steps, in a fusion and within a loop, counted at each of them."""
    config = 'channel_id=7, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
    loop = LOOP.replace("to_apply=%add", f"to_apply=%add, {config}")
    text = f"  %c = f32[8,16]{{1,0}} all-reduce(%p), replica_groups=[4,2]<=[8], {config}\n"
    (found,) = collectives.find(program(text + CALL, loop), 8)
    assert found.times == 1


def test_real_program():
    """What XLA prints today and the parser was not written for: a psum and an all_gather with known bytes, in a scan of 5."""
    mesh = make_mesh(2, 2, 2)

    def f(x):
        def body(carry, _):
            whole = jax.lax.all_gather(carry, "data", tiled=True)  # [4, 16] -> [8, 16]
            return carry + jax.lax.psum(jnp.tanh(whole[:4]), "fsdp"), None

        return jax.lax.scan(body, x, None, length=5)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile()
    table = collectives.by_kind_and_axis(collectives.find(hlo.parse(compiled.as_text()), 8), dict(mesh.shape))
    assert table == {"all-gather": {"data": 5 * 256}, "all-reduce": {"fsdp": 5 * 256}}


FUSIONS = """\
%slice_of_stack (q: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %q = f32[12,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,8,16]{2,1,0} dynamic-slice(%q, %i, %z, %z), dynamic_slice_sizes={1,8,16}
  ROOT %b = f32[8,16]{1,0} bitcast(%s)
}
%into_stack (q: f32[12,8,16], x: f32[8,16], i: s32[]) -> f32[12,8,16] {
  %q = f32[12,8,16]{2,1,0} parameter(0)
  %x = f32[8,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %b = f32[1,8,16]{2,1,0} bitcast(%x)
  ROOT %u = f32[12,8,16]{2,1,0} dynamic-update-slice(%q, %b, %i, %z, %z)
}
%inner (q: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %q = f32[12,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[8,16]{1,0} fusion(%q, %i), kind=kLoop, calls=%slice_of_stack
}
%nested (x: f32[8,16]) -> ((f32[8,16], f32[8,16]), f32[8,16]) {
  %x = f32[8,16]{1,0} parameter(0)
  %pair = (f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%x, %x)
  ROOT %t = ((f32[8,16]{1,0}, f32[8,16]{1,0}), f32[8,16]{1,0}) tuple(%pair, %x)
}
"""


@pytest.mark.parametrize(
    "body, matmul, other",
    [
        ("  ROOT %n = f32[8,16]{1,0} negate(%p)", 0, 1024),
        ("  ROOT %n = f32[8,16]{1,0:T(8,128)S(1)} negate(%p)", 0, 512),
        ("  ROOT %n = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}", 1280, 0),
        ("  ROOT %n = f32[8,16]{1,0} bitcast(%p)", 0, 0),
        (
            "  %s = f32[12,8,16]{2,1,0} parameter(1)\n  %i = s32[] constant(3)\n"
            "  ROOT %f = f32[8,16]{1,0} fusion(%s, %i), kind=kLoop, calls=%slice_of_stack",
            0,
            1028,
        ),
        (
            "  %s = f32[12,8,16]{2,1,0} parameter(1)\n  %i = s32[] constant(3)\n"
            "  ROOT %f = f32[8,16]{1,0} fusion(%s, %i), kind=kLoop, calls=%inner",
            0,
            1028,
        ),
        (
            "  %s = f32[12,8,16]{2,1,0} parameter(1)\n  %i = s32[] constant(3)\n"
            "  ROOT %f = f32[12,8,16]{2,1,0} fusion(%s, %p, %i), kind=kLoop, calls=%into_stack",
            0,
            1028,
        ),
        ("  ROOT %c = (f32[8,16]{1,0:S(1)}, f32[8,16]{1,0}, u32[]) copy-start(%p)", 0, 512),
        (
            "  ROOT %f = ((f32[8,16]{1,0}, f32[8,16]{1,0}), f32[8,16]{1,0}) fusion(%p), kind=kLoop, calls=%nested",
            0,
            2048,
        ),
    ],
)
def test_hbm_traffic(body, matmul, other):
    """A stack of parameters read whole for each block's slice; what lies in a TPU's VMEM counted as HBM; tuples in a tuple."""
    assert tuple(hbm_traffic(program(body, FUSIONS))) == (matmul, other)


@pytest.mark.parametrize(
    "body, kind, place, size",
    [
        (
            '  ROOT %c = (f32[8,16]{1,0}, s8[4096]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul", '
            'metadata={op_name="jit(step)/jvp(DiT)/while/body/closed_call/blocks/mlp/in/dot_general"}',
            "products",
            "forward blocks/mlp/in",
            1024,
        ),
        (
            '  ROOT %c = (f32[8,16]{1,0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax", '
            'metadata={op_name="jit(step)/transpose(jvp(DiT))/while/body/closed_call/checkpoint/rematted_computation/blocks/attention/x"}',
            "attention",
            "again blocks/attention",
            1024,
        ),
        (
            "  %s = f32[12,8,16]{2,1,0} parameter(1)\n  %i = s32[] constant(3)\n"
            "  ROOT %f = f32[12,8,16]{2,1,0} fusion(%s, %p, %i), kind=kLoop, calls=%into_stack, "
            'metadata={op_name="jit(step)/transpose(jvp(DiT))/while/body/jit(update)/dynamic_update_slice"}',
            "copies",
            "backward loop",
            1028,
        ),
        ('  ROOT %n = f32[8,16]{1,0} negate(%p), metadata={op_name="jit(step)/neg"}', "arithmetic", "step other", 1024),
    ],
)
def test_kinds_and_places(body, kind, place, size):
    """A kernel put down to another part of the network, a stack that counts as arithmetic, cuBLAS's workspace as traffic."""
    assert list(traffic.works(program(body, FUSIONS))) == [(kind, place, size, 1)]


def test_flops_of_a_trace():
    """A scan counted once, a product without its batch, the zeros of a transposed stride counted as work."""

    def f(w, x):
        y, _ = jax.lax.scan(lambda c, wi: (c @ wi, None), x, w)
        return y

    w, x = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)
    forward = 5 * 2 * 3 * 8 * 16 * 16
    assert jaxpr_flops.count(jax.make_jaxpr(f)(w, x)) == forward
    both = jax.make_jaxpr(jax.grad(lambda w, x: f(w, x).sum(), argnums=(0, 1)))(w, x)
    assert jaxpr_flops.count(both) == 3 * forward

    def convolve(kernel, images):
        return jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    kernel, images = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32), jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    forward = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert jaxpr_flops.count(jax.make_jaxpr(convolve)(kernel, images)) == forward
    both = jax.make_jaxpr(jax.grad(lambda k, x: convolve(k, x).sum(), argnums=(0, 1)))(kernel, images)
    assert jaxpr_flops.count(both) == pytest.approx(3 * forward, rel=0.3)  # the gradients' padding is not quite the forward's


def test_flops_of_cudnn_attention(monkeypatch):
    """A fused kernel counted as no work, or without the scores that its gradient computes again; a primitive that JAX renames."""
    # Tracing asks for cuDNN's version, and there need be none here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 92000)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    q, k = jax.ShapeDtypeStruct((2, 16, 4, 72), jnp.bfloat16), jax.ShapeDtypeStruct((2, 24, 4, 72), jnp.bfloat16)
    product = 2 * 2 * 4 * 16 * 24 * 72
    assert jaxpr_flops.count(jax.make_jaxpr(attend)(q, k, k)) == 2 * product
    assert jaxpr_flops.count(jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(q, k, k)) == 7 * product


@pytest.mark.parametrize(
    "shape, size",
    [("f32[2,3]{1,0}", 24), ("(bf16[4], pred[3])", 11), ("s4[5]", 3), ("f8e4m3fn[7]", 7), ("f32[<=4,2]", 32), ("s32[]", 4)],
)
def test_sizes(shape, size):
    """An element type of another size, a tuple of which only the first array counts."""
    assert sum(array.bytes for array in hlo.arrays(shape)) == size


def test_text_without_a_program():
    """Something else than HLO that counts as nothing at all."""
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


def test_spans():
    """A ring taken for a line: how far a group reaches along each side of a torus."""
    coordinates = np.stack(np.unravel_index(np.arange(16), (4, 4)), axis=1)
    assert list(collectives.spans(np.arange(16).reshape(4, 4), coordinates)) == [(1, 4)]
    assert list(collectives.spans(np.arange(16).reshape(1, 16), coordinates)) == [(0, 4), (1, 4)]
