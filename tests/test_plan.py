"""Plans: what a step sends, counted from its HLO, and the row of a topology."""
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax import chips, gpu_compiler
from modse_jax import config as configs
from modse_jax import mesh as meshes
from modse_jax.config import UserError
from modse_jax.model import transformer
from modse_jax.training import collectives, plan
from tests.conftest import tiny_config
from tests.test_run import command
from tests.test_sharding import MESHES, compiled, config_on

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
  %x = f32[10]{0} all-reduce(%y), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%add
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
  %w = (s32[]) while(%t), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[8,6]{1,0} all-gather-done(%s)
  %rows = bf16[10,8]{1,0} fusion(%p), kind=kLoop, calls=%add
  %r = bf16[40,8]{1,0} ragged-all-to-all(%rows, %room, %i, %j), channel_id=1, replica_groups={{0,1,2,3}}
  %c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_pieces_and_groups_are_counted():
    found = [(c.kind, c.bytes, c.times, c.group) for c in collectives.collectives(HLO)]
    assert sorted(found) == sorted([
        ("reduce-scatter", 2 * 32 * 8 * 3 / 4, 15, 4), ("all-gather", 64 * 3 / 4, 3, 4),
        ("all-reduce", 2 * 40 * 3 / 4, 15, 4), ("all-gather", 192 * 3 / 4, 1, 4), ("collective-permute", 36, 1, 2),
        ("ragged-all-to-all", 10 * 8 * 2 * 3 / 4, 1, 4)])    # ten rows of the sender; the receiver has room for forty
    assert collectives.bytes_by_kind(collectives.collectives(HLO))["all-gather"] == 3 * 48 + 144


def test_what_cannot_be_counted_is_reported():
    loop = HLO.replace("s32[]{:T(128)} constant(5)", "s32[] parameter(1)")
    with pytest.raises(ValueError, match="whose end is data"):
        collectives.collectives(loop)
    devices = HLO.replace("{'a'}, to_apply", "some of 'a', to_apply")
    for text, reason in ((loop, "in a loop whose end is data cannot be counted"), (devices, "in an unknown way"),
                         (HLO.replace("f32[10]{0} all-reduce", "f7[10]{0} all-reduce"), "size of the type f7")):
        found, unknown = collectives.read(text)
        assert any(reason in why for why in unknown), (reason, unknown)
        assert len(found) + len(unknown) == 6    # the others are counted


# Lines of compiled programs, shortened: what a device sends, the type and the first group of each.
LINES = {
    # two arrays joined in one start: the results are in the second brackets
    "%s = ((bf16[128,768]{1,0}, s32[1,2]{1,0}), (bf16[256,768]{1,0}, s32[2,2]{1,0})) all-gather-start(%p, %q), "
    "replica_groups={{0,1},{2,3}}, dimensions={0}":
        ("all-gather", (256 * 768 * 2 + 4 * 4) / 2, "bf16[256,768] s32[2,2]", (0, 1)),
    "%s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}":
        ("all-gather", 8 * 6 * 4 * 3 / 4, "f32[8,6]", (0, 1, 2, 3)),
    "%s = ((f32[1,16]{1,0}), f32[4,16]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}":
        ("all-gather", 4 * 16 * 4 * 3 / 4, "f32[4,16]", (0, 1, 2, 3)),
    "%g = (bf16[8,6]{1,0}, s32[4]{0}) all-gather(%p, %q), replica_groups={{0,1}}, dimensions={0}":
        ("all-gather", (8 * 6 * 2 + 16) / 2, "bf16[8,6] s32[4]", (0, 1)),
    # an asynchronous sum, of jax 0.11.2 with its operand, of 0.10.2 without
    "%s = ((f32[100]{0}), f32[100]{0}) all-reduce-start(%p), replica_groups={{0,2},{1,3}}, to_apply=%add":
        ("all-reduce", 400, "f32[100]", (0, 2)),
    "%s = f32[100]{0} all-reduce-start(%p), replica_groups={{0,2},{1,3}}, to_apply=%add":
        ("all-reduce", 400, "f32[100]", (0, 2)),
    "%s = (f32[100]{0}, bf16[10]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}, to_apply=%add":
        ("all-reduce", 420, "f32[100] bf16[10]", (0, 1)),
    "%r = (f32[100]{0}, bf16[10]{0}) all-reduce(%p, %q), replica_groups={{0,1}}, to_apply=%add":
        ("all-reduce", 420, "f32[100] bf16[10]", (0, 1)),
    "%s = ((f32[100]{0}, s32[5]{0}), (f32[100]{0}, s32[5]{0})) all-reduce-start(%p, %q), replica_groups={{0,1}}":
        ("all-reduce", 420, "f32[100] s32[5]", (0, 1)),
    "%s = ((bf16[8,6]{1,0}, bf16[4]{0}), (bf16[4,6]{1,0}, bf16[2]{0})) reduce-scatter-start(%p, %q), "
    "replica_groups={{4,5}}, dimensions={0}":
        ("reduce-scatter", 24 * 2 + 4, "bf16[4,6] bf16[2]", (4, 5)),
    "%s = ((bf16[1,2,4]{2,0,1}), bf16[1,2,4]{2,0,1}) all-to-all-start(%p), dimensions={1}, "
    "replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_1'}":
        ("all-to-all", 8, "bf16[1,2,4]", (0, 1)),
    "%s = ((bf16[20,8]{1,0}, bf16[40,8]{1,0}, s64[4]{0}, s64[4]{0}, s64[4]{0}, /*index=5*/s64[4]{0}), "
    "bf16[40,8]{1,0}) ragged-all-to-all-start(%p, %o, %i, %j, %k, /*index=5*/%l), replica_groups={{0,1}}":
        ("ragged-all-to-all", 20 * 8 * 2 / 2, "bf16[40,8]", (0, 1)),
    "%c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}":
        ("collective-permute", 36, "f32[9]", (0, 1)),
}
GROUPS = {
    "{{0,1},{2,3}}": ((0, 1), (2, 3)),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=4,'b'=2] {'a'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=4,'b'=2] {'a','b'}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}": ((3, 2), (1, 0)),
    # half of an axis: `expert` is 2 x 2, and the devices of a group differ in the second, or the first, of the two
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'expert':(2)2}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'expert':(1)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['data'=1,'fsdp'=2,'expert'=4] {'fsdp','expert':(1)2}": ((0, 2, 4, 6), (1, 3, 5, 7)),
}
UNKNOWN = ("mesh['a'=4] {'b'}", "mesh['a'=4] {'a':(3)2}", "{}", "mesh['a'=4], device_ids=(0,1) {'a'}")


def program(line):
    return f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n"


@pytest.mark.parametrize("line", LINES)
def test_collective_lines(line):
    kind, size, shape, group = LINES[line]
    found, = collectives.collectives(program(line))
    assert found[:5] == (kind, size, 1, len(group), shape) and found.groups[0] == group


@pytest.mark.parametrize("text", GROUPS)
def test_replica_groups(text):
    found, = collectives.collectives(program(f"%r = f32[8]{{0}} all-reduce(%p), replica_groups={text}, to_apply=%add"))
    assert found.groups == GROUPS[text] and found.group == len(GROUPS[text][0])


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_replica_groups_are_reported(text):
    read = collectives.read(program(f"%r = f32[8]{{0}} all-reduce(%p), replica_groups={text}, to_apply=%add"))
    assert not read.collectives and "written in an unknown way: %r = f32[8]" in read.unknown[0]


def test_unknown_results_are_reported():
    """A start with contexts before the results, or fewer results than operands."""
    for made in ("(f32[8], (f32[8]))", "((f32[8], f32[8]), f32[8])", "(f32[8], f32[8]"):
        read = collectives.read(program(f"%r = {made} all-gather-start(%p, %q), replica_groups={{{{0,1}}}}"))
        assert not read.collectives and "written in an unknown way" in read.unknown[0], made


def test_bytes_between_hosts():
    """Of 8 devices on 2 hosts: a gather's copy of one half crosses, in 4 parts; 4 of 7 parts of an all-to-all do."""
    def between(kind, groups, per_host=4):
        found = collectives.collectives(program(f"%r = f32[56]{{0}} {kind}(%p), replica_groups={groups}"))
        return collectives.bytes_between_hosts(found, per_host)

    whole = 56 * 4
    assert between("all-gather", "[1,8]<=[8]") == pytest.approx(whole / 2 / 4)
    assert between("all-reduce", "[1,8]<=[8]") == pytest.approx(2 * whole / 2 / 4)
    assert between("all-to-all", "[1,8]<=[8]") == pytest.approx(whole * 4 / 8)
    assert between("all-gather", "[2,4]<=[8]") == 0
    assert between("all-gather", "[4,2]<=[2,4]T(1,0)") == pytest.approx(whole / 2)    # one device of each host
    permute = program("%c = f32[9] collective-permute(%p), source_target_pairs={{0,1},{1,4}}")
    assert collectives.bytes_between_hosts(collectives.collectives(permute), 4) == 36


# What XLA lists of a program (shortened): a loop of 3 iterations, inside of it a loop whose end is data, of which one
# more is inside a CUDA graph; a conditional; a collective.
THUNKS = """000: kCommandBuffer  [source        | next=025 (1) ]
    001: kPartitionId  [source        | next=002 (1)] kPartitionId
    002: kCustomKernel [prev=001 (1)  | sink        ] loop_fusion grid: [1, 1, 1] threads: [1, 1, 1]
    003: kCopy         [source        | sink        ] kCopy
025: kAsyncStart     [prev=000 (1)  | next=055 (10)] stream=communication_stream[0], async_id=25
    024: kAllGather [source | sink] kAllGather
054: kAsyncDone      [source        | sink         ] async_id=25
066: kWhile          [prev=000 (1)  | next=000 (1) ]
condition:
    067: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer      [source       | next=089 (1) ]
        068: kCublasLtMatmul [source       | sink        ] kCublasLtMatmul
        070: kWhile         [prev=000 (1) | next=192 (1)]
condition:
            071: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
          body:
            072: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
    172: kWhile              [prev=170 (2) | next=203 (1) ]
condition:
        173: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        000: kCommandBuffer [source       | next=181 (1)]
            174: kGemm         [source       | next=175 (1)] kGemm
            175: kDynamicSliceFusion [prev=174 (1) | sink ] params=1, results=1
                176: kCopy [source | sink] kCopy
    203: kConditional        [prev=172 (1) | sink ]
977: kCustomKernel   [prev=957 (20) | sink        ] last grid: [768, 1, 1] threads: [128, 1, 1]
"""
THUNK_METADATA = """thunk_metadata {
  thunk_info {
    profile_annotation: "while.658.clone"
    thunk_id: 66
  }
  thunk_kind: "kWhile"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "while.654"
    thunk_id: 172
  }
  thunk_kind: "kWhile"
}
"""
THUNK_HLO = """  %while.658.clone = (s32[], f32[4]{0}) while(%t), condition=%c, body=%b, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.654 = (s32[], f32[4]{0}) while(%u), condition=%d, body=%e
"""


def test_launches_are_read_from_the_list_of_thunks(tmp_path):
    for name, text in (("thunk_sequence_after_thunk_passes", THUNKS), ("thunk_metadata", THUNK_METADATA),
                       ("sm_9.0a_gpu_after_optimizations", THUNK_HLO)):
        (tmp_path / f"module_0001.jit_step.{name}.txt").write_text(text)
    once = gpu_compiler.read_launches(tmp_path)
    # 2 + 1 outside the loop, its condition 4 times, and per iteration: a matmul, the inner loop in the graph (2
    # conditions, a kernel) and the loop whose end is data (2 conditions, a matmul, a copy).
    assert once.kernels == 3 + 4 + 3 * (1 + 3 + 4)
    assert once.graphs == 1 + 3 + 3 and once.collectives == 1
    assert once.host_waits == 3 * 2 + 3 and once.open_loops == 1    # two conditions, and the conditional
    never = gpu_compiler.read_launches(tmp_path, iterations=0)
    assert never.kernels == 3 + 4 + 3 * (1 + 1 + 1) and never.graphs == 4 and never.host_waits == 3 + 3
    (tmp_path / "module_0001.jit_step.thunk_metadata.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no .*thunk_metadata"):
        gpu_compiler.read_launches(tmp_path)


def test_topologies_are_parsed():
    assert plan.parse("gpu:h100") == plan.Topology("gpu:h100", "gpu", "h100", 1, 1)
    assert plan.parse("gpu:a100x8") == plan.Topology("gpu:a100x8", "gpu", "a100", 1, 8)
    assert plan.parse("gpu:b200:2x8") == plan.Topology("gpu:b200:2x8", "gpu", "b200", 2, 8)
    assert plan.parse("cpu:8")[1:] == ("cpu", "cpu", 1, 8) and plan.parse("v5e:4x4")[1:] == ("tpu", "v5e", 1, 0)
    for name in ("gpu:l40sx8", "gpu:h100x0", "gpu:h100:8", "gpu:", "gpu:h100x8:2x8", "cpu:0", "h100"):
        with pytest.raises(UserError, match="known: .*gpu:a100, gpu:b200, gpu:h100, gpu:h200, .*HOSTSxN"):
            plan.parse(name)
    with pytest.raises(UserError, match="16 GPUs on a host, which can have at most 8; write gpu:h100:HOSTSxN"):
        plan.parse("gpu:h100x16")


def install(folder, version, names=gpu_compiler.PACKAGES):
    for name in names:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_missing_or_other_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_compiler.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(gpu_compiler.sys, "path", [])
    monkeypatch.setattr(gpu_compiler.platform, "system", lambda: "Linux")
    monkeypatch.setattr(gpu_compiler.platform, "machine", lambda: "x86_64")
    line = (rf"; install it with: pip install --no-deps --target={tmp_path}/gpu-compiler "
            rf"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
            r"'nvidia-cuda-nvcc==13.0.\*' 'nvidia-nvvm==13.0.\*'$")
    with pytest.raises(UserError, match="jax-cuda13-plugin is neither in the environment nor in .*" + line):
        plan.check(["v5e:1x1", "gpu:h100"], "")
    plan.check(["v5e:1x1", "cpu:2"], "")
    folder = gpu_compiler.compiler_folder()
    install(folder, jax.__version__, gpu_compiler.PACKAGES[:1])
    with pytest.raises(UserError, match="jax-cuda13-pjrt is neither"):
        gpu_compiler.find_compiler()
    install(folder, jax.__version__, gpu_compiler.PACKAGES[1:])
    monkeypatch.setattr(gpu_compiler, "TOOLS", ("bin/no-such-tool",))
    tools_line = line.replace("install it", "install them")
    with pytest.raises(UserError, match="there is no bin/no-such-tool in .*gpu-compiler/nvidia/cu13, .*" + tools_line):
        gpu_compiler.find_compiler()
    tool = folder / "nvidia" / "cu13" / "bin" / "no-such-tool"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert gpu_compiler.find_compiler() == folder
    other = tmp_path / "environment"
    install(other, "0.3.1")
    gpu_compiler.sys.path.append(str(other))    # the environment is what jax itself would take
    with pytest.raises(UserError, match=f"has version 0.3.1 and jax has {jax.__version__}, and they must be the same; "
                       "install it with: pip install jax-cuda13-plugin=="):
        gpu_compiler.find_compiler()
    monkeypatch.setattr(gpu_compiler.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match="exists for Linux .* and this is Darwin"):
        gpu_compiler.find_compiler()


def test_target_configs_avoid_what_xla_cannot_do_without_a_gpu():
    assert set(gpu_compiler.GPU_TARGETS) == set(chips.GPUS)
    for gpu, target in gpu_compiler.GPU_TARGETS.items():
        text = gpu_compiler.target_config(gpu)
        assert "cub_version" not in text and "driver_version" in text and "runtime_version" in text
        assert ("ACCELERATED_FEATURES" in text) == (target.compute_capability >= (9, 0))
        assert any(kind in target.device_kind for kind in chips.CHIPS[gpu].kinds)
        assert target.memory_bytes / 2**30 == pytest.approx(chips.CHIPS[gpu].gigabytes, rel=0.02)
        assert target.memory_bandwidth / 1e12 == pytest.approx(chips.CHIPS[gpu].terabytes, rel=0.05)
    with pytest.raises(UserError, match="gpu='v100' is not known; choose one of a100, b200, h100, h200"):
        gpu_compiler.describe_topology("v100")


def test_what_is_not_understood_is_in_the_plan(monkeypatch):
    """A collective of an unknown form, and loops whose end is data: named in the row and below the table."""
    class Memory:
        argument_size_in_bytes = temp_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 2**20

    text = program("%r = f32[8]{0} all-reduce(%p), replica_groups={}\n"
                   "  %q = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}")
    monkeypatch.setattr(plan, "_compile", lambda *_: plan._Built(Memory, text))
    row = plan.plan(config_on(*MESHES["2 data x 4 expert"]), "cpu:8")
    assert len(row["unknown_collectives"]) == 1 and row["collective_bytes_by_kind"] == {"all-reduce": 32}
    launches = gpu_compiler.Launches(700, 20, 30, 45, 3, 1.0)
    plan._add_launches(row, launches)
    assert (row["kernels"], row["graph_launches"], row["host_waits"], row["open_loops"]) == (700, 30, 45, 3)
    text = plan.table([{**row, "topology": "gpu:h100:2x4", "hosts": 2}])
    assert "one was not understood: the devices of a collective are written in an unknown way" in text
    assert re.search(r"collectives not counted +1\n", text) and re.search(r"host waits +45\n", text)
    assert "the ends of 3 loops outside CUDA graphs are data" in text and "for 1 iteration(s) of each" in text


def test_a_compiled_program_sends_what_it_says():
    """Seven sums of a [16, 32] array over 8 devices, in a loop, and one gather of a column of it over 4."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def spread(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    @functools.partial(jax.jit, in_shardings=(spread(("a", "b")), spread("b")), out_shardings=(spread(), spread()))
    def f(x, y):
        def turn(carry, _):
            total = jax.lax.with_sharding_constraint(jnp.sum(jnp.sin(x * carry), axis=0), spread())
            return carry + jnp.sum(total), None
        return jax.lax.scan(turn, jnp.float32(1), None, length=7)[0], y

    text = f.lower(jnp.zeros((8, 16)), jnp.zeros((12, 32))).compile().as_text()
    sent = collectives.bytes_by_kind(collectives.collectives(text))
    assert sent["all-gather"] == 12 * 32 * 4 * 3 / 4
    assert sent["all-reduce"] in (7 * 2 * 4 * 7 / 8, 7 * 2 * 16 * 4 * 7 / 8)    # XLA may add up columns first


def test_the_output_embedding_is_sent_once_whatever_the_chunks():
    """Not in every turn of the loss's loop, and no device gathers all activations for the input embedding."""
    config = config_on(*MESHES["2 data x 4 expert"])
    found = collectives.collectives(compiled(config)[1].as_text())
    head = [c for c in found if re.search(r"\b300\b", c.shape)]
    assert head and all(c.times == 1 for c in head)
    assert sum(c.kind == "all-to-all" for c in found) == 2    # tokens looked up, and their gradient


def test_a_plan_of_cpu_devices(tmp_path):
    config = config_on(*MESHES["2 data x 4 expert"])
    row = plan.plan(config, "cpu:8")
    assert tuple(row) == plan.FIELDS
    assert row["devices"] == 8 and row["mesh"] == {"data": 2, "fsdp": 1, "expert": 4} and row["fits"] is True
    assert row["flops_max_over_mean"] == 1
    assert row["optimizer_bytes_per_device"] > 1.9 * row["parameter_bytes_per_device"]
    assert row["peak_bytes_per_device"] > row["parameter_bytes_per_device"] + row["activation_bytes_per_device"]
    assert set(row["collective_bytes_by_kind"]) <= set(collectives.KINDS) and row["collective_bytes_by_kind"]
    assert row["roofline_step_seconds"] is None and row["compile_seconds"] > 0
    assert row["moe_backend"] == "blocked" and row["attention"] == "blocks" and row["kernels"] is None
    text = plan.table([row, {**row, "topology": "cpu:9", "fits": False}])
    assert "data=2 fsdp=1 expert=4" in text and "cpu:9: most of it is" in text and "kernels" not in text
    plan.write_json([row], str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps([row]))


def test_advice_names_what_is_largest():
    sizes = {"parameter_bytes_per_device": 3, "optimizer_bytes_per_device": 6}
    assert "mesh.fsdp" in plan.advice({**sizes, "peak_bytes_per_device": 12})
    assert "gradient_accumulation" in plan.advice({**sizes, "peak_bytes_per_device": 40})
    assert "mesh.fsdp" in plan.advice({**sizes, "peak_bytes_per_device": None})


def test_bad_plans_end_in_one_line():
    _, err, code = command("train.py", "--config=configs/tiny.py", "--plan=v5e:4by4")
    assert code == 2 and err.startswith("error: --plan='v5e:4by4' is not a topology; known: v4:2x2x1"), err
    with pytest.raises(UserError, match="--plan_json=/nowhere/plan.json cannot be written"):
        plan.check(["cpu:2"], "/nowhere/plan.json")
    with pytest.raises(UserError, match="does not divide over mesh.data=3"):
        plan.plan(config_on((-1, 1, 1)), "cpu:3")
    with pytest.raises(UserError, match="moe.backend=pallas_gpu needs one of h100, h200, this is cpu"):
        plan.plan(config_on(backend="pallas_gpu"), "cpu:1")


def test_what_multiplies_is_known_before_anything_is_compiled(monkeypatch):
    """Rows past a kernel's list of tasks, type and widths that it does not take: what would do, in one line."""
    def kernels(chip, width=128, **moe):
        monkeypatch.setattr(meshes, "chip", lambda _: chip)
        config = tiny_config(model=dict(dim=128, num_heads=2), training=dict(batch_size=moe.pop("batch", 8)),
                             moe=dict(width=width, widths=(), pairs=False, **moe), mesh=configs.Mesh(1, 1, 1))
        return transformer.kernels(config, meshes.build(config, jax.devices()[:1]))

    assert kernels("v5e", backend="auto") == ("pallas_tpu", "blocks", "")
    backend, _, why = kernels("v5e", backend="auto", batch=2**20)
    assert backend == "blocked" and "67108864 rows over widths" in why
    with pytest.raises(UserError, match="lower training.batch_size, or use a backend without a list: blocked, ref"):
        kernels("v5e", backend="pallas_tpu", batch=2**20)
    padded = kernels("v5e", backend="pallas_tpu", width=96)
    assert padded.line() == ("experts: pallas_tpu (hidden units padded to multiples of 128: 33.3% more FLOPs); "
                             "attention: blocks")
    with pytest.raises(UserError, match="not float32; set model.dtype=bfloat16, or use a backend that takes any"):
        kernels("h100", backend="pallas_gpu")
    assert kernels("cpu", backend="auto") == ("blocked", "blocks", "")
