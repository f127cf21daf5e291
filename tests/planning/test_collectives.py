"""Reading collectives from HLO text, as XLA prints it for CPUs and GPUs. Real programs are in test_parallel.py."""

import pytest

from neuroada_jax.planning.collectives import Traffic, collectives

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %got = f32[4]{0} all-gather(%own), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %got)
}

%body.2 (state: (s32[], f32[4], /*index=2*/f32[2])) -> (s32[], f32[4], /*index=2*/f32[2]) {
  %w = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  %half = bf16[2,5]{1,0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %next = (s32[], f32[4]{0}, f32[2]{0}) tuple(%i, %a, %b)
}

%cond (state: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%async (p: s8[6]) -> s8[6] {
  ROOT %all-to-all.1 = s8[6]{0} all-to-all(%p), replica_groups={{0,1}}
}

ENTRY %main.9_spmd (p0: f32[8], p1: (f32[], /*index=1*/f32[])) -> f32[8] {
  %loop = (s32[], f32[4]{0}, f32[2]{0}) while(%i), condition=%cond, body=%body.2, backend_config={TRIPS}
  %sums = (f32[2,8,3]{2,1,0}, f32[], /*index=2*/pred[7]{0}) all-reduce(%a, %b, %c), replica_groups=[1,8]<=[8], to_apply=%add
  %alone = f32[99]{0} all-reduce(%a), channel_id=4, replica_groups=[8,1]<=[8], to_apply=%add
  %start = (f32[1]{0}, f32[8]{0}) all-gather-start(%a), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %s = ((f32[1]{0}, bf16[2]{0}), (f32[8]{0}, bf16[16]{0})) all-gather-start(%a), replica_groups=mesh['x'=1,'y'=8] {'y'}
  %one = (f32[1]{0}, f32[1]{0}) all-gather-start(%a), replica_groups=mesh['x'=1,'y'=8] {'x'}, dimensions={0}
  %r = ((f32[8]{0}, f32[16]{0}), (f32[1]{0}, f32[2]{0})) reduce-scatter-start(%a, %b), replica_groups=mesh['x'=8] {'x'}
  %part = f32[3]{0} reduce-scatter(%a), replica_groups=mesh['x'=8,'y'=2] {'x':(1)4,'y'}, to_apply=%add
  %at = ((s8[6]{0}), s8[6]{0}, u32[]) async-start(%p), calls=%async
  %moved = (f32[8]{0}, f32[8]{0}) collective-permute-start(%a), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8]{0} collective-permute-done(%moved)
}
"""
TEN = '"known_trip_count":{"n":"10"}'


def test_kinds_counts_and_bytes():
    assert collectives(PROGRAM.replace("TRIPS", TEN)) == {
        "all-gather": Traffic(30 + 2, 30 * 16 + 32 + 32 + 32),
        "all-reduce": Traffic(1, 4 * 48 + 4 + 7),
        "all-to-all": Traffic(1, 6),
        "collective-permute": Traffic(1, 32),
        "reduce-scatter": Traffic(10 + 2, 10 * 20 * 4 + 4 * 24 + 8 * 12),
    }


def test_a_loop_of_unknown_length():
    with pytest.raises(ValueError, match=r"no known trip count: .*while"):
        collectives(PROGRAM)


def test_nothing_is_sent_on_one_device():
    assert collectives("HloModule a\n\nENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} copy(%p)\n}\n") == {}
