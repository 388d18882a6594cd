import textwrap

import pytest

from dit_jax.programs import collectives, hlo, overlap, traffic

GROUPS = "replica_groups=[1,8]<=[8]"
STEP = f'channel_id=7, dimensions={{0}}, {GROUPS}, backend_config={{"async_collective_fusion_config":1}}'
OTHERS = f"""\
%linear (q: f32[8,16]) -> f32[8,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %w = f32[16,16]{{1,0}} constant({{...}})
  ROOT %m = f32[8,16]{{1,0}} dot(%q, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
%scaled (q: f32[8,16]) -> f32[8,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  ROOT %m = f32[8,16]{{1,0}} multiply(%q, %q)
}}
%wrapped (q: f32[8,16]) -> f32[1,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  ROOT %scattered = f32[1,16]{{1,0}} reduce-scatter(%q), dimensions={{0}}, {GROUPS}, to_apply=%add
}}
%begin (q: f32[8,16]) -> f32[64,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %first = f32[64,16]{{1,0}} all-gather(%q), {STEP}
  ROOT %c = f32[64,16]{{1,0}} custom-call(%first), custom_call_target="AsyncCollectiveStart"
}}
%beside (q: f32[8,16]) -> f32[8,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %again = f32[64,16]{{1,0}} all-gather(%q), {STEP}
  ROOT %m = f32[8,16]{{1,0}} WORK(%q, %q)
}}
%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %t = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{{1,0}} get-tuple-element(%t), index=1
  %f = f32[8,16]{{1,0}} fusion(%x), kind=kOutput, calls=%beside
  ROOT %u = (s32[], f32[8,16]{{1,0}}) tuple(%i, %f)
}}
%test (t: (s32[], f32[8,16])) -> pred[] {{
  %t = (s32[], f32[8,16]{{1,0}}) parameter(0)
  ROOT %yes = pred[] constant(true)
}}
"""
PAIR = """\
%s = f32[8,16]{{1,0}} all-reduce-start(%p), {groups}, to_apply=%add
%z = s32[] constant(0)
%between = {between}
%e = f32[8,16]{{1,0}} all-reduce-done(%s)
%after = f32[8,16]{{1,0}} fusion(%p), kind=kLoop, calls=%linear
ROOT %r = f32[8,16]{{1,0}} negate(%e)"""
STEPS = """\
%s = f32[64,16]{1,0} fusion(%p), kind=kCustom, calls=%begin
%i = s32[] constant(0)
%t = (s32[], f32[8,16]{1,0}) tuple(%i, %p)
%w = (s32[], f32[8,16]{1,0}) while(%t), condition=%test, body=%body
%e = f32[64,16]{1,0} fusion(%p), kind=kCustom, calls=%begin
ROOT %r = f32[8,16]{1,0} negate(%p)"""


def share(body, others=OTHERS):
    text = (
        f"{others}\nENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n"
        f"{textwrap.indent(body, chr(32) * 2)}\n}}\n"
    )
    program = hlo.parse(text)
    return overlap.hidden_share(program, collectives.find(program, 8))


@pytest.mark.parametrize(
    "between, hidden",
    [
        ("f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%linear", 1),
        ("f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}", 1),
        ('(f32[8,8]{1,0}, s8[64]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul"', 1),
        ("f32[8,16]{1,0} call(%p), to_apply=%linear", 1),
        ("f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%scaled", 0),
        ("f32[8,16]{1,0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add", 0),
        ("(f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]) copy-start(%p)", 0),
    ],
)
def test_what_hides_a_pair(between, hidden):
    """Updates, copies and other collectives taken for products; products after the end that count; a call's unseen."""
    assert share(PAIR.format(groups=GROUPS, between=between), OTHERS.replace("WORK", "multiply")) == hidden


@pytest.mark.parametrize(
    "start, end",
    [
        ("async-start(%p), calls=%wrapped", "async-done"),
        ('call-start(%p), async_execution_thread="sparsecore", to_apply=%wrapped', "call-done"),
    ],
)
def test_share_is_of_bytes(start, end):
    """A share of the number of collectives, one that does not wait for its end, a wrapped one that is not seen."""
    body = f"""\
%s = ((f32[8,16]{{1,0}}), f32[1,16]{{1,0}}) {start}
%n = f32[8,16]{{1,0}} fusion(%p), kind=kOutput, calls=%linear
%e = f32[1,16]{{1,0}} {end}(%s)
ROOT %g = f32[8,16]{{1,0}} all-reduce(%p), {GROUPS}, to_apply=%add"""
    assert share(body) == pytest.approx(1 / 3)  # 7/8 of the array once for the scatter, twice for the all-reduce
    assert share("ROOT %n = f32[8,16]{1,0} negate(%p)") is None


def test_the_start_of_a_collective_moves_no_bytes_of_its_own():
    """What a TPU's fusions that begin and end a collective read and write, counted as arithmetic in HBM too."""
    text = OTHERS.replace("WORK", "multiply")
    program = hlo.parse(
        f"{text}\nENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n"
        "  %s = f32[64,16]{1,0} fusion(%p), kind=kCustom, calls=%begin\n"
        "  ROOT %f = f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%scaled\n}\n"
    )
    assert tuple(traffic.hbm_traffic(program)) == (0, 2 * 512)


@pytest.mark.parametrize("work, hidden", [("dot", 1), ("multiply", 0)])
def test_a_collective_in_steps(work, hidden):
    """A TPU's all-gather that runs beside the fusions of a loop taken for one that is waited for, or the reverse."""
    assert share(STEPS, OTHERS.replace("WORK", work)) == hidden
