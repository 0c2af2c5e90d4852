"""Whole training steps on random tokens: tokens/s, both MFUs, and where the time goes.

    python -m benchmarks.train_step [--json=FILE] [--shapes=A,A-modse,B] [--config=configs/tiny.py] [--peers]

Shapes A and B: dim 384, 4 layers, 6 heads, vocabulary 512, 8 rows of 512 tokens, fp32, AdamW; A has 8 experts of 960,
top-2; B has 64 of 240, top-8; A-modse has A's experts in pairs 4.5:0.5 to 2.5:2.5. --peers adds a Hugging Face Mixtral
of the same shape, in turn with ours (pip install -r requirements-peers.txt), as installed and with the memory settings
that our scripts give themselves.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags

from benchmarks import peers, timing
from modse_jax.config import device_mesh, loading, options
from modse_jax.model import accounting
from modse_jax.model.attention import attention_layer
from modse_jax.moe import dispatch, expert_widths, router
from modse_jax.moe.experts import block_sizes, expert_weights, select
from modse_jax.runtime import sharding
from modse_jax.training import losses, optimizer, train_step, train_step_cpu

SHAPES = flags.DEFINE_list("shapes", ["A", "A-modse", "B"], "built-in shapes to time")


CONFIG = config_flags.DEFINE_config_file(
    "config", None, "time this config file instead", lock_config=True
)


PEERS = flags.DEFINE_bool(
    "peers", False, "time Hugging Face's Mixtral beside it (equal widths only)"
)


def shape(name: str) -> options.Config:
    values = loading.default_config()
    values.model.update(dim=384, num_layers=4, num_heads=6, vocab_size=512)
    values.data.sequence_length, values.training.batch_size = 512, 8
    values.mesh.data = 1
    values.moe.update(num_experts=64, top_k=8, width=240) if name == "B" else values.moe.update(
        width=960
    )
    if name == "A-modse":
        values.moe.widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 384)
    return loading.from_dict(values.to_dict())


class Ours:
    """A training step with a state of its own, donated from call to call."""

    def __init__(self, config):
        self.config, self.state, self.counts = config, train_step.init_state(config), []
        rng, size = (
            np.random.default_rng(0),
            (config.training.batch_size, config.data.sequence_length + 1),
        )
        self.batch = {
            "tokens": jnp.asarray(rng.integers(4, config.model.vocab_size, size, dtype=np.int32)),
            "segments": jnp.ones(size, jnp.int32),
        }
        self.step = (
            jax.jit(train_step.make_train_step(config), donate_argnums=0)
            .lower(self.state, self.batch)
            .compile()
        )

    def __call__(self):
        self.state, metrics = self.step(self.state, self.batch)
        self.counts.append(metrics.statistics.counts_KE)
        return self.state, metrics

    def close(self):
        self.state = None


def parts(ours: Ours) -> dict:
    """{part: (function, arguments)}: forward and backward of each part of a step, alone, of one layer."""
    config = ours.config
    m, (B, L) = config.model, (config.training.batch_size, config.data.sequence_length)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    dtype = jnp.dtype(m.dtype)

    def random(*dims):
        return jax.random.normal(next(keys), dims, dtype)

    def both(f, numbers):
        return jax.value_and_grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), numbers)

    layer = jax.tree.map(lambda a: a[0], ours.state.params["blocks"])
    graph, weights = nnx.split(attention_layer.Attention(m, None, nnx.Rngs(0)))
    place = attention_layer.packed_inputs(jnp.ones((B, L), jnp.int32), m)
    x, x_TD, dy_TD = random(B, L, m.dim), random(B * L, m.dim), random(B * L, m.dim)
    experts = expert_weights.ExpertWeights(
        *(layer["moe"][n] for n in expert_weights.ExpertWeights._fields)
    )
    gate, valid = router.RouterWeights(layer["moe"]["router_gate"]), jnp.ones((B * L,), bool)
    blocks = block_sizes.Blocks(
        config.moe.block_rows, config.moe.tail_rows, config.moe.saved_activations
    )

    def route(x, gate):
        routing = router.route(x, valid, gate, config.router_options, sharding.chip_name(None))
        return routing, dispatch.plan_dispatch(routing.ids_TK, valid, config.moe.num_experts)

    plan = jax.jit(route)(x_TD, gate)[1]
    x_ND = dispatch.dispatch(x_TD, plan)

    def dispatched(x, gate):
        routing, plan = route(x, gate)
        return dispatch.combine(dispatch.dispatch(x, plan), routing.gates_TK, plan) * dy_TD

    def ffn(x, experts):
        return (
            select.expert_ffn(
                x,
                plan.rows_E,
                experts,
                device_mesh.place_experts_on_mesh(config, None),
                config.moe.backend,
                blocks,
                sharding.chip_name(None),
            )
            * x_ND
        )

    targets, even = ours.batch["tokens"][:, 1:], jnp.full((B, L), 1 / (B * L))
    head = ours.state.params["head"]
    rule = optimizer.build_optimizer(config)
    return {
        "attention": (
            both(lambda w, x: nnx.merge(graph, w)(x, place)[0] * x, (0, 1)),
            (weights, x),
        ),
        "experts": (both(ffn, (0, 1)), (x_ND, experts)),
        "dispatch": (both(dispatched, (0, 1)), (x_TD, gate)),
        "loss": (
            both(
                lambda x, w: losses.cross_entropy(x, w, targets, even, config.training.loss_chunk),
                (0, 1),
            ),
            (x, head),
        ),
        "optimiser": (
            lambda state, good: train_step_cpu.apply_update_in_place(
                rule, state.params, 0.5, state.params, state.opt_state, good
            ),
            (ours.state, jnp.asarray(True)),
        ),
    }


def measure(jobs: dict[str, options.Config], repeats: int, with_peers: bool) -> list[dict]:
    """Rows of the result file of some shapes, timed in turn: ours, and the peers of those with equal widths. A shape
    NAME-VARIANT is compared with NAME, at equal FLOPs, since routing decides how wide the chosen experts are."""
    ours = {name: Ours(config) for name, config in jobs.items()}
    alone = {
        name: timing.interleaved(timing.compile_all(parts(o)), repeats, calls=4)
        for name, o in ours.items()
    }
    runs = {
        (name, "ours"): o for name, o in ours.items()
    }  # after the parts: a whole step donates what they read
    for name, config in jobs.items():
        if with_peers and len(set(config.widths)) == 1:
            runs |= {(name, who): peer for who, peer in peers.mixtral(config).items()}
    seconds = timing.interleaved(
        {k: dict(compiled=f, arguments=()) for k, f in runs.items()}, repeats, warmup=1, calls=4
    )
    peak, flops, rows = (
        accounting.peak_flops(jax.devices()[:1]),
        {name: _flops(o) for name, o in ours.items()},
        [],
    )
    for (name, who), of_run in seconds.items():
        total = float(np.median(of_run))
        row = {
            "shape": name,
            "who": who,
            "tokens_per_second": _tokens(jobs[name]) / total,
            "step_seconds": total,
        }
        if who != "ours":
            row |= {
                "ours_faster_by": timing.ratio(of_run, seconds[name, "ours"]),
                **runs[name, who].versions,
            }
            rows.append(row)
            continue
        nominal, realised = flops[name]
        row |= {
            "mfu_nominal": peak and nominal / total / peak,
            "mfu_realised": peak and realised / total / peak,
            "teraflops_realised": realised / total / 1e12,
            "peak_teraflops": peak and peak / 1e12,
        }
        equal = name.split("-")[0]
        if equal != name and equal in jobs:
            row["over_equal_width"] = (
                timing.ratio(of_run, seconds[equal, "ours"]) * flops[equal][1] / realised
            )
        layers = {
            k: jobs[name].model.num_layers if k in ("attention", "experts", "dispatch") else 1
            for k in alone[name]
        }
        row["share"] = {k: float(np.median(v)) * layers[k] / total for k, v in alone[name].items()}
        rows.append(row)
    for run in runs.values():
        run.close()
    return rows


def _tokens(config):
    return config.training.batch_size * config.data.sequence_length


def _flops(ours):
    """(nominal, realised) FLOPs of a step, the latter of all steps so far: routing moves while the model learns."""
    c = ours.config
    width = accounting.realised_width(c, np.sum(ours.counts, axis=0).sum(axis=1))
    return tuple(
        _tokens(c) * accounting.train_flops_per_token(c, c.data.sequence_length, w)
        for w in (accounting.nominal_width(c), width)
    )


def main(_):
    if PEERS.value:
        peers.check_installed()
    groups = {}
    if CONFIG.value:
        file = flags.FLAGS["config"].config_filename
        groups[file] = {file: loading.from_dict(CONFIG.value.to_dict())}
    else:
        for (
            name
        ) in SHAPES.value:  # not all at once: every peer is a process with a model of its own
            groups.setdefault(name.split("-")[0], {})[name] = shape(name)
    rows = []
    for jobs in groups.values():
        for row in measure(jobs, timing.REPEATS.value, PEERS.value):
            rows.append(row)
            print(json.dumps(row), flush=True)
    timing.write({"machine": timing.machine(), "rows": rows})


if __name__ == "__main__":
    timing.run(main)
