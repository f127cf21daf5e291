"""benchmarks/hlo.py on short programs written by hand, and what benchmarks/check_gpu.py makes of facts; no GPU compiler."""

import json
from types import SimpleNamespace

import contract
import jax
import jax.numpy as jnp
import pytest

from benchmarks import check_gpu, hlo
from benchmarks.check_gpu import Fact, Program, Setting
from neuroada_jax.core import entries
from neuroada_jax.planning.collectives import Traffic

# A scan's copy of a layer's kernel, a slice that a product reads in place and one that it does not, a joined kernel,
# a write in place, arithmetic, and a small array.
PROGRAM = """
HloModule jit_step

%copy_computation (param_0: bf16[4,64,64], param_1: s32[]) -> bf16[64,64] {
  %param_0 = bf16[4,64,64]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %constant.1 = s32[] constant(0)
  %add.1 = s32[] add(%param_1, %constant.1)
  %dynamic-slice.1 = bf16[1,64,64]{2,1,0} dynamic-slice(%param_0, %add.1, %constant.1, %constant.1), metadata={op_name="a"}
  ROOT %bitcast.1 = bf16[64,64]{1,0} bitcast(%dynamic-slice.1)
}

%gemm_computation (param_0: bf16[8,64], param_1: bf16[4,64,64]) -> bf16[8,64] {
  %param_0.1 = bf16[8,64]{1,0} parameter(0)
  %param_1.1 = bf16[4,64,64]{2,1,0} parameter(1)
  %slice.1 = bf16[1,64,64]{2,1,0} slice(%param_1.1), slice={[0:1], [0:64], [0:64]}
  %bitcast.2 = bf16[64,64]{1,0} bitcast(%slice.1)
  ROOT %dot.1 = bf16[8,64]{1,0} dot(%param_0.1, %bitcast.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%scaled (param_0: bf16[64,64]) -> bf16[64,64] {
  %param_0.2 = bf16[64,64]{1,0} parameter(0)
  %copy.9 = bf16[64,64]{0,1} copy(%param_0.2)
  ROOT %multiply.1 = bf16[64,64]{1,0} multiply(%copy.9, %copy.9)
}

%written (param_0: bf16[4,64,64], param_1: bf16[1,1,64], param_2: s32[]) -> bf16[4,64,64] {
  %param_0.3 = bf16[4,64,64]{2,1,0} parameter(0)
  %param_1.3 = bf16[1,1,64]{2,1,0} parameter(1)
  %param_2.3 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = bf16[4,64,64]{2,1,0} dynamic-update-slice(%param_0.3, %param_1.3, %param_2.3, %param_2.3)
}

ENTRY %main (p0: bf16[8,64], p1: bf16[4,64,64], p2: s32[], p3: bf16[1,1,64], p4: f32[64,64]) -> bf16[8,64] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[4,64,64]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %p3 = bf16[1,1,64]{2,1,0} parameter(3)
  %p4 = f32[64,64]{1,0} parameter(4)
  %copy_fusion = bf16[64,64]{1,0} fusion(%p1, %p2), kind=kLoop, calls=%copy_computation
  %gemm_fusion = bf16[8,64]{1,0} fusion(%p0, %p1), kind=kCustom, calls=%gemm_computation
  %slice.2 = bf16[1,64,64]{2,1,0} slice(%p1), slice={[1:2], [0:64], [0:64]}
  %joined = bf16[128,64]{1,0} concatenate(%copy_fusion, %copy_fusion), dimensions={0}
  %scaled_fusion = bf16[64,64]{1,0} fusion(%copy_fusion), kind=kLoop, calls=%scaled
  %written_fusion = bf16[4,64,64]{2,1,0} fusion(%p1, %p3, %p2), kind=kLoop, calls=%written
  %small = bf16[64,8]{1,0} transpose(%p0), dimensions={1,0}
  %cublas = (f32[8,64]{1,0}, s8[1024]{0}) custom-call(%p0, %p4), custom_call_target="__cublas$lt$matmul"
  %kernel = (f32[64,2]{1,0}) custom-call(%p0, %gemm_fusion), custom_call_target="triton_kernel_call_ffi"
  ROOT %sum = bf16[8,64]{1,0} add(%p0, %gemm_fusion)
}
"""


def test_copies_are_counted_where_they_make_an_array():
    assert hlo.copies(PROGRAM, 64 * 64) == {
        "dynamic-slice bf16[64,64]": 1,
        "slice bf16[1,64,64]": 1,
        "concatenate bf16[128,64]": 1,
    }
    assert hlo.copies(PROGRAM, 8 * 64)["transpose bf16[64,8]"] == 1
    assert not hlo.copies(PROGRAM, 4 * 64 * 64 + 1)


def test_products_and_calls():
    assert sorted(hlo.dots(PROGRAM)) == [(("bf16", "bf16"), 4096), (("bf16", "f32"), 4096)]
    assert hlo.wide_dots(PROGRAM, 4096) == {"bf16 x f32": 1} and not hlo.wide_dots(PROGRAM, 4097)
    assert hlo.custom_calls(PROGRAM) == {"__cublas$lt$matmul": 1, "triton_kernel_call_ffi": 1}


def lowered(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).as_text()


def pair(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x - pair(x), 1),  # a rounding remainder
        (lambda x: jax.lax.map(lambda row: row - pair(row), x), 1),
        (lambda x: (y := x + 1, pair(y)), 1),
        (lambda x: pair(x + 1) * 2, 0),  # nothing reads the unrounded number
        (lambda x: x - jax.lax.reduce_precision(x, 8, 7), 0),
        (lambda x: x.astype(jnp.bfloat16), 0),
    ],
)
def test_pairs_of_conversions_that_stand_for_rounding(function, count):
    assert hlo.lost_rounding(lowered(function, (4, 8))) == count


def test_roundings_that_are_stated_are_found_before_and_after_the_compiler():
    function = jax.jit(lambda numbers: entries.round_to(numbers, jnp.bfloat16))
    made = function.lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    assert hlo.reduced_precision(made.as_text()) and hlo.reduced_precision(made.compile().as_text())
    assert not hlo.reduced_precision(PROGRAM)


def facts_of(text, k=1, written=""):
    return {
        fact.check.partition(":")[0]: fact.ok for fact in check_gpu.train_facts(Setting(k), Program(text, written, 0, 0))
    }


def test_each_fact_of_a_step_can_fail(monkeypatch):
    monkeypatch.setattr(check_gpu, "WEIGHT", 64 * 64)
    calls = "".join(
        f'  %a = (f32[8]{{0}}) custom-call(), custom_call_target="{name}"\n' for name in check_gpu.ATTENTION_CALLS
    )
    good = f"ENTRY %main () -> f32[8] {{\n{calls}}}\n"
    assert all(facts_of(good).values())
    worse = facts_of(PROGRAM, written=lowered(lambda x: jax.lax.reduce_precision(x - pair(x), 8, 7), (4, 8)))
    assert not any(worse.values()) and len(worse) == 6
    assert facts_of(PROGRAM, k=20)["gradient"]


def test_what_devices_send():
    text = """
ENTRY %main (p0: f32[64]) -> f32[64] {
  %p0 = f32[64]{0} parameter(0)
  ROOT %all-reduce = f32[64]{0} all-reduce(%p0), replica_groups={{0,1}}, to_apply=%add
}
"""
    facts = lambda bounds: [fact.ok for fact in check_gpu.sent_facts(Setting(), text, bounds)]  # noqa: E731
    assert all(facts({"all-reduce": Traffic(1, 256)}))
    assert facts({"all-reduce": Traffic(0, 255)}) == [True, False, False]
    assert facts({}) == [False, False, False]


@pytest.mark.parametrize(("found", "code"), [(1, 0), (2, 1)])
def test_a_fact_beyond_its_bound_fails_the_check(tmp_path, capsys, monkeypatch, found, code):
    compiler = SimpleNamespace(name="h100 (sm_90a)")
    monkeypatch.setattr(check_gpu, "installed_compiler", lambda machine: compiler)
    monkeypatch.setattr(
        check_gpu, "_facts", lambda machine, compiler: [Fact("copies", found, 1), Fact("kind", "a", "a", True)]
    )
    assert check_gpu.main(["--machines", "h100", "--out", str(tmp_path)]) == code
    printed = capsys.readouterr()
    assert all(title in printed.out for title in ("check", "target", "found", "bound"))
    assert ("copies: expected 1, found 2" in printed.err) == code
    rows = json.loads((tmp_path / "check_gpu.json").read_text())["rows"]
    assert contract.printed_rows(printed.out) == len(rows) == 2
    assert rows[0] == {"check": "copies", "machine": compiler.name, "found": found, "bound": 1, "ok": not code}
