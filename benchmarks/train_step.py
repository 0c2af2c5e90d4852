"""Times whole training steps on random tokens: tokens/s, both MFUs, and the share of each part.

    python -m benchmarks.train_step [--json=FILE] [--shapes=A,A-modse,B] \
        [--config=configs/tiny.py] [--peers]

Shapes A and B have model width 384, 4 layers, 6 heads, vocabulary 512, 8 sequences of 512 tokens,
float32 and AdamW. A has 8 experts of width 960, top-2; B has 64 of width 240, top-8. A-modse has
A's experts in pairs of ratios 4.5:0.5 to 2.5:2.5.

--peers also times a Hugging Face Mixtral of the same shape, interleaved with this project
(pip install -r requirements-peers.txt): as installed, and with the memory settings of train.py.

Legend: B sequences in a batch, L sequence length, D model width, T tokens, N routed tokens,
K layers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags

from benchmarks import peers, timing
from modse_jax.config import device_mesh, loading
from modse_jax.config.options import Config
from modse_jax.model import accounting
from modse_jax.model.attention import attention_layer
from modse_jax.moe import dispatch, expert_widths, router
from modse_jax.moe.experts import expert_weights, select
from modse_jax.runtime import peak_rate, sharding
from modse_jax.training import losses, optimizer, train_step

SHAPES = flags.DEFINE_list("shapes", ["A", "A-modse", "B"], "Built-in shapes to time.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file to time instead of shapes.", lock_config=True
)
PEERS = flags.DEFINE_bool(
    "peers", False, "Also time Hugging Face's Mixtral, for shapes with equal widths."
)

OURS = "ours"  # the name of this project in results


class Step(Protocol):
    """A training step that can be timed."""

    def __call__(self) -> Any: ...

    def close(self) -> None: ...


class OwnStep:
    """A training step of this project. Its state is donated from call to call."""

    def __init__(self, config: Config):
        self.config = config
        self.state = train_step.init_state(config)
        self.counts: list[jax.Array] = []  # tokens per expert, [layers, K, E], of every call
        rng = np.random.default_rng(0)
        shape = (config.training.batch_size, config.data.sequence_length + 1)
        tokens = rng.integers(4, config.model.vocab_size, shape, dtype=np.int32)
        self.batch = {"tokens": jnp.asarray(tokens), "segments": jnp.ones(shape, jnp.int32)}
        step = jax.jit(train_step.make_train_step(config), donate_argnums=0)
        self.compiled = step.lower(self.state, self.batch).compile()

    def __call__(self) -> tuple[train_step.State, train_step.Metrics]:
        """Runs one step."""
        self.state, metrics = self.compiled(self.state, self.batch)
        self.counts.append(metrics.statistics.counts_KE)
        return self.state, metrics

    def close(self) -> None:
        """Frees the state."""
        self.state = None


class StepFlops(NamedTuple):
    """FLOPs of a step."""

    nominal: float  # if every expert receives equally many tokens
    realised: float  # for the mean width of the chosen experts in all steps so far


def shape_config(name: str) -> Config:
    """Returns the config of a built-in shape; see the docstring of this module."""
    values = loading.default_config()
    values.model.update(dim=384, num_layers=4, num_heads=6, vocab_size=512)
    values.data.sequence_length = 512
    values.training.batch_size = 8
    values.mesh.data = 1
    if name == "B":
        values.moe.update(num_experts=64, top_k=8, width=240)
    else:
        values.moe.update(width=960)
    if name == "A-modse":
        values.moe.widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 384)
    return loading.from_dict(values.to_dict())


def list_parts(step: OwnStep) -> dict[str, tuple[Callable, tuple]]:
    """Returns {part: (function, arguments)} for the parts of a step.

    The functions run forward and backward pass of one layer's attention, expert FFN, and dispatch
    (router and combination of expert outputs included), and those of the loss; and one update of
    the optimizer.
    """
    config = step.config
    batch_size = config.training.batch_size
    length = config.data.sequence_length
    layer = jax.tree.map(lambda array: array[0], step.state.params["blocks"])
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.dtype(config.model.dtype))

    x_BLD = random(batch_size, length, config.model.dim)
    x_TD = random(batch_size * length, config.model.dim)
    dy_TD = random(batch_size * length, config.model.dim)
    routing = _RoutingPart(config, layer, x_TD)
    targets_BL = step.batch["tokens"][:, 1:]
    weights_BL = jnp.full((batch_size, length), 1 / (batch_size * length))
    rule = optimizer.build_optimizer(config)

    def loss(x_BLD: jax.Array, head: jax.Array) -> jax.Array:
        chunk = config.advanced.loss_chunk
        return losses.cross_entropy(x_BLD, head, targets_BL, weights_BL, chunk)

    apply_update = train_step.select_update(None)

    def update(state: train_step.State, good: jax.Array) -> Any:
        return apply_update(rule, state.params, 0.5, state.params, state.opt_state, good)

    return {
        "attention": _attention_part(config, x_BLD),
        "experts": routing.experts_part(),
        "dispatch": routing.dispatch_part(dy_TD),
        "loss": (_with_gradients(loss), (x_BLD, step.state.params["head"])),
        # The key is spelled as in recorded results.
        "optimiser": (update, (step.state, jnp.asarray(True))),
    }


def _with_gradients(function: Callable[[Any, Any], jax.Array]) -> Callable:
    """Returns the value and both gradients of the sum of a function of two arguments."""

    def total(a: Any, b: Any) -> jax.Array:
        return jnp.sum(function(a, b).astype(jnp.float32))

    return jax.value_and_grad(total, (0, 1))


def _attention_part(config: Config, x_BLD: jax.Array) -> tuple[Callable, tuple]:
    graph, weights = nnx.split(attention_layer.Attention(config.model, None, nnx.Rngs(0)))
    segments_BL = jnp.ones(x_BLD.shape[:2], jnp.int32)
    inputs = attention_layer.packed_inputs(segments_BL, config.model)

    def attend(weights: nnx.State, x_BLD: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x_BLD, inputs)[0] * x_BLD

    return _with_gradients(attend), (weights, x_BLD)


class _RoutingPart:
    """The parts of a step that depend on how the router distributes some tokens."""

    def __init__(self, config: Config, layer: Mapping[str, Any], x_TD: jax.Array):
        self.config = config
        self.x_TD = x_TD
        weights = layer["moe"]
        self.gate = router.RouterWeights(weights["router_gate"])
        self.experts = expert_weights.ExpertWeights(
            *(weights[name] for name in expert_weights.ExpertWeights._fields)
        )
        self.valid_T = jnp.ones((len(x_TD),), bool)
        self.plan = jax.jit(self.route)(x_TD, self.gate)[1]
        self.x_ND = dispatch.dispatch(x_TD, self.plan)

    def route(
        self, x_TD: jax.Array, gate: router.RouterWeights
    ) -> tuple[router.Routing, dispatch.DispatchPlan]:
        chip = sharding.chip_name(None)
        options = self.config.router_options
        routing = router.route(x_TD, self.valid_T, gate, options, self.config.widths, chip)
        num_experts = self.config.num_experts
        return routing, dispatch.plan_dispatch(routing.ids_TK, self.valid_T, num_experts, chip)

    def dispatch_part(self, dy_TD: jax.Array) -> tuple[Callable, tuple]:
        def dispatch_and_combine(x_TD: jax.Array, gate: router.RouterWeights) -> jax.Array:
            routing, plan = self.route(x_TD, gate)
            x_ND = dispatch.dispatch(x_TD, plan)
            return dispatch.combine(x_ND, routing.gates_TK, plan) * dy_TD

        return _with_gradients(dispatch_and_combine), (self.x_TD, self.gate)

    def experts_part(self) -> tuple[Callable, tuple]:
        backend, blocks = self.config.moe.backend, self.config.expert_options.blocks
        placement = device_mesh.place_experts_on_mesh(self.config, None)
        chip = sharding.chip_name(None)

        def run_experts(x_ND: jax.Array, experts: expert_weights.ExpertWeights) -> jax.Array:
            rows_E = self.plan.rows_E
            y_ND = select.expert_ffn(x_ND, rows_E, experts, placement, backend, blocks, chip)
            return y_ND * self.x_ND

        return _with_gradients(run_experts), (self.x_ND, self.experts)


def measure(jobs: Mapping[str, Config], repeats: int, with_peers: bool) -> list[dict]:
    """Times the steps of some shapes, interleaved, with the peers of those with equal widths.

    A shape NAME-VARIANT is compared with NAME at equal FLOPs, because the mean width of the chosen
    experts depends on the routing.

    Returns:
        The rows of the result file.
    """
    own_steps = {name: OwnStep(config) for name, config in jobs.items()}
    part_seconds = {
        name: timing.time_interleaved(timing.compile_all(list_parts(step)), repeats, calls=4)
        for name, step in own_steps.items()
    }
    # After the parts: an entire step donates the arrays that they read.
    steps: dict[tuple[str, str], Step] = {(name, OURS): step for name, step in own_steps.items()}
    for name, config in jobs.items():
        if with_peers and len(set(config.widths)) == 1:
            steps |= {(name, who): peer for who, peer in peers.start_mixtrals(config).items()}
    cases = {key: timing.Case(step, ()) for key, step in steps.items()}
    seconds = timing.time_interleaved(cases, repeats, warmup=1, calls=4)
    peak = peak_rate.peak_flops(jax.devices()[:1])
    flops = {name: _count_flops(step) for name, step in own_steps.items()}
    rows = []
    for (name, who), step_seconds in seconds.items():
        total = float(np.median(step_seconds))
        row = {
            "shape": name,
            "who": who,
            "tokens_per_second": _tokens_per_step(jobs[name]) / total,
            "step_seconds": total,
        }
        own_seconds = seconds[name, OURS]
        if who == OURS:
            row |= _describe_rates(flops[name], total, peak)
            row |= _compare_with_equal_widths(name, seconds, flops)
            row["share"] = _share_of_parts(jobs[name], part_seconds[name], total)
        else:
            row["ours_faster_by"] = timing.median_ratio(step_seconds, own_seconds)
            row |= steps[name, who].versions
        rows.append(row)
    for step in steps.values():
        step.close()
    return rows


def _describe_rates(flops: StepFlops, seconds: float, peak: float | None) -> dict:
    """Returns FLOP/s, and model FLOPs utilization (MFU) if the peak rate is known."""
    return {
        "mfu_nominal": peak and flops.nominal / seconds / peak,
        "mfu_realised": peak and flops.realised / seconds / peak,
        "teraflops_realised": flops.realised / seconds / 1e12,
        "peak_teraflops": peak and peak / 1e12,
    }


def _compare_with_equal_widths(
    name: str,
    seconds: Mapping[tuple[str, str], Sequence[float]],
    flops: Mapping[str, StepFlops],
) -> dict:
    equal = name.split("-")[0]
    if equal == name or equal not in flops:
        return {}
    time_ratio = timing.median_ratio(seconds[name, OURS], seconds[equal, OURS])
    return {"over_equal_width": time_ratio * flops[equal].realised / flops[name].realised}


def _share_of_parts(
    config: Config, seconds: Mapping[str, Sequence[float]], total: float
) -> dict[str, float]:
    """Returns the time of each part, over all layers, as a share of the step."""
    shares = {}
    for part, part_seconds in seconds.items():
        in_every_layer = part in ("attention", "experts", "dispatch")
        times = config.model.num_layers if in_every_layer else 1
        shares[part] = float(np.median(part_seconds)) * times / total
    return shares


def _tokens_per_step(config: Config) -> int:
    return config.training.batch_size * config.data.sequence_length


def _count_flops(step: OwnStep) -> StepFlops:
    config = step.config
    tokens = _tokens_per_step(config)
    length = config.data.sequence_length
    rows_LKE = np.sum(step.counts, axis=0)
    steps = len(step.counts)
    realised = accounting.realized_flops_per_token(config, length, rows_LKE, steps * tokens)
    return StepFlops(tokens * accounting.nominal_flops_per_token(config, length), tokens * realised)


def _list_groups() -> list[dict[str, Config]]:
    """Returns the configs to time, in groups that are interleaved.

    A shape and its variants are one group. Not all shapes are: every peer is a process with a
    model in memory.
    """
    if CONFIG.value:
        file = flags.FLAGS["config"].config_filename
        return [{file: loading.from_dict(CONFIG.value.to_dict())}]
    groups: dict[str, dict[str, Config]] = {}
    for name in SHAPES.value:
        groups.setdefault(name.split("-")[0], {})[name] = shape_config(name)
    return list(groups.values())


def main(_: Sequence[str]) -> None:
    """Prints a JSON object for each shape and implementation, and writes --json."""
    if PEERS.value:
        peers.check_installed()
    rows = []
    for jobs in _list_groups():
        for row in measure(jobs, timing.REPEATS.value, PEERS.value):
            rows.append(row)
            print(json.dumps(row), flush=True)
    timing.write({"machine": timing.describe_machine(), "rows": rows})


if __name__ == "__main__":
    timing.run(main)
