"""Bytes that a step sends between devices, counted from the text of its HLO program."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.planning import hlo_collectives
from modse_jax.planning.hlo_collectives import Collective
from tests.helpers.meshes import MESHES, compiled, config_on

# A program with a loop of 3 iterations, in it a loop of 5. A kernel's metadata has a line "}".
HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[32,8]) -> bf16[8,8] {
  %p = bf16[32,8]{1,0} parameter(0)
  %ar = bf16[32,8]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = bf16[8,8]{1,0} slice(%ar)
}

%piece.1 (p: f32[4]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%piece.2 (p: f32[4]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%inner_condition (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %other = s32[] constant(7)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner (t: (s32[])) -> (s32[]) {
  %k = f32[4] custom-call(%y), custom_call_target="kernel", metadata="{
}
"
  %x = f32[10]{0} all-reduce(%y), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) \
{'a'}, to_apply=%add
  %z = bf16[8,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}

%outer_condition (t: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}

%outer (t: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%inner_condition, body=%inner
  %f = f32[16] fusion(%q), kind=kCustom, calls=%piece.1
  %g = f32[16] fusion(%q), kind=kCustom, calls=%piece.2
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%outer_condition, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, \
dimensions={0}
  %d = f32[8,6]{1,0} all-gather-done(%s)
  %rows = bf16[10,8]{1,0} fusion(%p), kind=kLoop, calls=%add
  %r = bf16[40,8]{1,0} ragged-all-to-all(%rows, %room, %i, %j), channel_id=1, \
replica_groups={{0,1,2,3}}
  %c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p), \
source_target_pairs={{0,1},{1,0}}
}
"""


def wrap_in_program(line: str) -> str:
    return f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"


def parse_line(line: str) -> Collective:
    """Returns the only collective of a program of one line."""
    (collective,) = hlo_collectives.list_collectives(wrap_in_program(line))
    return collective


def all_reduce_line(replica_groups: str) -> str:
    return f"%r = f32[8]{{0}} all-reduce(%p), replica_groups={replica_groups}, to_apply=%add"


def test_collectives_in_loops_and_pieces_are_counted():
    collectives = hlo_collectives.list_collectives(HLO)
    found = [(c.kind, c.bytes, c.times, c.group_size) for c in collectives]
    ragged_bytes = 10 * 8 * 2 * 3 / 4  # ten rows of the sender; the receiver has room for forty
    assert sorted(found) == sorted(
        [
            ("reduce-scatter", 2 * 32 * 8 * 3 / 4, 15, 4),
            ("all-gather", 64 * 3 / 4, 3, 4),
            ("all-reduce", 2 * 40 * 3 / 4, 15, 4),
            ("all-gather", 192 * 3 / 4, 1, 4),
            ("collective-permute", 36, 1, 2),
            ("ragged-all-to-all", ragged_bytes, 1, 4),
        ]
    )
    assert hlo_collectives.bytes_by_kind(collectives)["all-gather"] == 3 * 48 + 144


DATA_DEPENDENT_LOOP = HLO.replace("s32[]{:T(128)} constant(5)", "s32[] parameter(1)")


def test_a_collective_in_a_data_dependent_loop_raises():
    with pytest.raises(ValueError, match="data-dependent trip count"):
        hlo_collectives.list_collectives(DATA_DEPENDENT_LOOP)


@pytest.mark.parametrize(
    "text, reason",
    [
        (DATA_DEPENDENT_LOOP, "in a loop with a data-dependent trip count cannot be counted"),
        (HLO.replace("{'a'}, to_apply", "some of 'a', to_apply"), "replica groups"),
        (HLO.replace("f32[10]{0} all-reduce", "f7[10]{0} all-reduce"), "size of the type f7"),
    ],
    ids=["loop", "groups", "type"],
)
def test_collectives_that_cannot_be_counted_are_reported_and_the_others_counted(text, reason):
    found = hlo_collectives.find_collectives(text)
    assert any(reason in sentence for sentence in found.unknown), found.unknown
    assert len(found.collectives) + len(found.unknown) == 6


class LineCase(NamedTuple):
    """A line of a compiled program, shortened, and its collective."""

    line: str
    kind: str
    sent_bytes: float
    shape: str
    first_group: tuple[int, ...]


LINES = [
    # Two arrays combined in one start: the results are in the second tuple.
    LineCase(
        "%s = ((bf16[128,768]{1,0}, s32[1,2]{1,0}), (bf16[256,768]{1,0}, s32[2,2]{1,0})) "
        "all-gather-start(%p, %q), replica_groups={{0,1},{2,3}}, dimensions={0}",
        "all-gather",
        (256 * 768 * 2 + 4 * 4) / 2,
        "bf16[256,768] s32[2,2]",
        (0, 1),
    ),
    LineCase(
        "%s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, "
        "dimensions={0}",
        "all-gather",
        8 * 6 * 4 * 3 / 4,
        "f32[8,6]",
        (0, 1, 2, 3),
    ),
    LineCase(
        "%s = ((f32[1,16]{1,0}), f32[4,16]{1,0}) all-gather-start(%p), "
        "replica_groups=[2,4]<=[8], dimensions={0}",
        "all-gather",
        4 * 16 * 4 * 3 / 4,
        "f32[4,16]",
        (0, 1, 2, 3),
    ),
    LineCase(
        "%g = (bf16[8,6]{1,0}, s32[4]{0}) all-gather(%p, %q), replica_groups={{0,1}}, "
        "dimensions={0}",
        "all-gather",
        (8 * 6 * 2 + 16) / 2,
        "bf16[8,6] s32[4]",
        (0, 1),
    ),
    # An asynchronous sum: jax 0.11.2 writes its operand, 0.10.2 does not.
    LineCase(
        "%s = ((f32[100]{0}), f32[100]{0}) all-reduce-start(%p), "
        "replica_groups={{0,2},{1,3}}, to_apply=%add",
        "all-reduce",
        400,
        "f32[100]",
        (0, 2),
    ),
    LineCase(
        "%s = f32[100]{0} all-reduce-start(%p), replica_groups={{0,2},{1,3}}, to_apply=%add",
        "all-reduce",
        400,
        "f32[100]",
        (0, 2),
    ),
    LineCase(
        "%s = (f32[100]{0}, bf16[10]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}, "
        "to_apply=%add",
        "all-reduce",
        420,
        "f32[100] bf16[10]",
        (0, 1),
    ),
    LineCase(
        "%r = (f32[100]{0}, bf16[10]{0}) all-reduce(%p, %q), replica_groups={{0,1}}, to_apply=%add",
        "all-reduce",
        420,
        "f32[100] bf16[10]",
        (0, 1),
    ),
    LineCase(
        "%s = ((f32[100]{0}, s32[5]{0}), (f32[100]{0}, s32[5]{0})) all-reduce-start(%p, %q), "
        "replica_groups={{0,1}}",
        "all-reduce",
        420,
        "f32[100] s32[5]",
        (0, 1),
    ),
    LineCase(
        "%s = ((bf16[8,6]{1,0}, bf16[4]{0}), (bf16[4,6]{1,0}, bf16[2]{0})) "
        "reduce-scatter-start(%p, %q), replica_groups={{4,5}}, dimensions={0}",
        "reduce-scatter",
        24 * 2 + 4,
        "bf16[4,6] bf16[2]",
        (4, 5),
    ),
    LineCase(
        "%s = ((bf16[1,2,4]{2,0,1}), bf16[1,2,4]{2,0,1}) all-to-all-start(%p), dimensions={1}, "
        "replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_1'}",
        "all-to-all",
        8,
        "bf16[1,2,4]",
        (0, 1),
    ),
    LineCase(
        "%s = ((bf16[20,8]{1,0}, bf16[40,8]{1,0}, s64[4]{0}, s64[4]{0}, s64[4]{0}, "
        "/*index=5*/s64[4]{0}), bf16[40,8]{1,0}) "
        "ragged-all-to-all-start(%p, %o, %i, %j, %k, /*index=5*/%l), replica_groups={{0,1}}",
        "ragged-all-to-all",
        20 * 8 * 2 / 2,
        "bf16[40,8]",
        (0, 1),
    ),
    LineCase(
        "%c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0}}",
        "collective-permute",
        36,
        "f32[9]",
        (0, 1),
    ),
]


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.line[:40])
def test_lines_of_collectives_are_parsed(case):
    collective = parse_line(case.line)
    assert collective.kind == case.kind
    assert collective.bytes == case.sent_bytes
    assert collective.times == 1
    assert collective.shape == case.shape
    assert collective.group_size == len(case.first_group)
    assert collective.groups[0] == case.first_group


GROUPS = {
    "{{0,1},{2,3}}": ((0, 1), (2, 3)),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=4,'b'=2] {'a'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=4,'b'=2] {'a','b'}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}": ((3, 2), (1, 0)),
    # Half of an axis: `expert` is 2 x 2, and the devices of a group differ in one of the two.
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'expert':(2)2}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'expert':(1)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'fsdp','expert':(1)2}": ((0, 2, 4, 6), (1, 3, 5, 7)),
}


@pytest.mark.parametrize("text", GROUPS)
def test_replica_groups_are_parsed(text):
    collective = parse_line(all_reduce_line(text))
    assert collective.groups == GROUPS[text]
    assert collective.group_size == len(GROUPS[text][0])


@pytest.mark.parametrize(
    "text",
    [
        "mesh['a'=4] {'b'}",
        "mesh['a'=4] {'a':(3)2}",
        "{}",
        "mesh['a'=4], device_ids=(0,1) {'a'}",
    ],
)
def test_unknown_replica_groups_are_reported_with_their_line(text):
    found = hlo_collectives.find_collectives(wrap_in_program(all_reduce_line(text)))
    assert not found.collectives
    assert "replica groups" in found.unknown[0]
    assert "have an unknown format: %r = f32[8]" in found.unknown[0]


@pytest.mark.parametrize(
    "result_type, reason",
    [
        ("(f32[8], (f32[8]))", "does not match its 2 operand"),  # contexts before results
        ("((f32[8], f32[8]), f32[8])", "does not match its 2 operand"),  # too few results
        ("(f32[8], f32[8]", "unknown format"),
    ],
)
def test_unknown_result_types_are_reported(result_type, reason):
    line = f"%r = {result_type} all-gather-start(%p, %q), replica_groups={{{{0,1}}}}"
    found = hlo_collectives.find_collectives(wrap_in_program(line))
    assert not found.collectives
    assert reason in found.unknown[0]


ARRAY_BYTES = 56 * 4


@pytest.mark.parametrize(
    "kind, groups, expected",
    [
        # 8 devices on 2 hosts: a copy of one half crosses, in 4 parts.
        ("all-gather", "[1,8]<=[8]", ARRAY_BYTES / 2 / 4),
        ("all-reduce", "[1,8]<=[8]", 2 * ARRAY_BYTES / 2 / 4),
        # A device sends 4 of its 7 parts to the other host.
        ("all-to-all", "[1,8]<=[8]", ARRAY_BYTES * 4 / 8),
        ("all-gather", "[2,4]<=[8]", 0),
        # Groups of one device of each host.
        ("all-gather", "[4,2]<=[2,4]T(1,0)", ARRAY_BYTES / 2),
    ],
)
def test_bytes_between_hosts(kind, groups, expected):
    collective = parse_line(f"%r = f32[56]{{0}} {kind}(%p), replica_groups={groups}")
    sent = hlo_collectives.bytes_between_hosts([collective], devices_per_host=4)
    assert sent == pytest.approx(expected)


def test_a_permutation_sends_everything_to_another_host():
    permute = parse_line("%c = f32[9] collective-permute(%p), source_target_pairs={{0,1},{1,4}}")
    assert hlo_collectives.bytes_between_hosts([permute], devices_per_host=4) == 36


def test_collectives_of_a_compiled_program():
    """Seven sums of a [8, 16] array over 8 devices, in a loop, and one all-gather over 4."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def shard_over(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    @functools.partial(
        jax.jit,
        in_shardings=(shard_over(("a", "b")), shard_over("b")),
        out_shardings=(shard_over(), shard_over()),
    )
    def run(x, y):
        def add_sum(carry, _):
            total = jnp.sum(jnp.sin(x * carry), axis=0)
            total = jax.lax.with_sharding_constraint(total, shard_over())
            return carry + jnp.sum(total), None

        return jax.lax.scan(add_sum, jnp.float32(1), None, length=7)[0], y

    text = run.lower(jnp.zeros((8, 16)), jnp.zeros((12, 32))).compile().as_text()
    sent = hlo_collectives.bytes_by_kind(hlo_collectives.list_collectives(text))
    assert sent["all-gather"] == 12 * 32 * 4 * 3 / 4
    bytes_of_sums = 7 * 2 * 4 * 7 / 8
    assert sent["all-reduce"] in (bytes_of_sums, 16 * bytes_of_sums)  # XLA may sum columns first


def test_the_output_embedding_is_sent_once_regardless_of_the_number_of_chunks():
    """The loop of the loss sends nothing, and the input embedding sends activations only twice."""
    config = config_on(*MESHES["2 data x 4 expert"])
    _, step, _ = compiled(config)
    collectives = hlo_collectives.list_collectives(step.as_text())
    head = [c for c in collectives if re.search(r"\b300\b", c.shape)]  # the vocabulary
    assert head and all(c.times == 1 for c in head)
    # The tokens that are looked up, and their gradient.
    assert sum(c.kind == "all-to-all" for c in collectives) == 2
