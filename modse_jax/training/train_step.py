"""One training step and one validation step: pure functions of state and batch.

Legend: B batch, L predicted tokens; a record has L + 1 tokens, since every token but the first is predicted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection, transformer
from modse_jax.moe.router import RouterStatistics
from modse_jax.runtime import gpu_options, sharding
from modse_jax.training import losses, optimizer


class State(NamedTuple):
    """Everything a run is, apart from its config: what a checkpoint holds."""

    step: jax.Array  # int32: steps done, and so the position in the data
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array  # int32: steps whose update was not made, not being finite or being a spike
    nonfinite_in_a_row: jax.Array  # int32
    norms: (
        jax.Array
    )  # float32: finite gradient norms of the last training.spike_window steps, else NaN


class Metrics(NamedTuple):
    """Of one step. `loss` is cross-entropy alone, nats per predicted token."""

    loss: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    targets: jax.Array
    skipped: jax.Array
    nonfinite_in_a_row: jax.Array
    fault: jax.Array  # of this step: an index into FAULTS
    statistics: RouterStatistics


FAULTS = ("none", "not finite", "spike")


def init_state(config: Config, mesh=None) -> State:
    _, params = nnx.split(transformer.build_model(config, mesh))
    params = nnx.to_pure_dict(params)
    step, skipped, in_a_row = (
        jnp.zeros((), jnp.int32) for _ in range(3)
    )  # three buffers: a state is donated
    norms = jnp.full((config.training.spike_window,), jnp.nan, jnp.float32)
    return State(
        step, params, optimizer.build_optimizer(config).init(params), skipped, in_a_row, norms
    )


def state_shapes(config: Config, mesh) -> State:
    """Shapes, types and shardings of the state on a mesh; no memory."""
    state = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        state,
        sharding.parameter_shardings(mesh, state),
    )


def init_sharded_state(config: Config, mesh) -> State:
    """The initial state, made where it belongs."""
    return jax.jit(lambda: init_state(config, mesh), out_shardings=_places(config, mesh))()


def compile_train_step(config: Config, mesh, options: dict | None = None):
    """The compiled training step of a config on a mesh, its state donated: what is run, planned and timed.

    Args: options: of XLA, besides those of gpu_options on GPU.
    Raises: UserError where a TPU slice cannot send rows, which only its compiler knows."""
    options = {**compiler_options(mesh), **(options or {})}
    try:
        return _lowered(config, mesh).compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "Ragged all-to-all is currently not supported" not in str(error):
            raise
        raise UserError(
            "this TPU slice has no ragged all-to-all (its links do not close rings); take another "
            "topology, or moe.exchange=gather"
        ) from None


def compiler_options(mesh) -> dict[str, str | int]:
    """Returns XLA's options for programs on a mesh (None: on the default device)."""
    return gpu_options.compiler_options(
        mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    )


def _lowered(config, mesh):
    shape = (config.training.batch_size, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    step = jax.jit(
        make_train_step(config, mesh),
        donate_argnums=0,
        out_shardings=(_places(config, mesh), sharding.replicated(mesh)),
    )
    return step.lower(state_shapes(config, mesh), {"tokens": tokens, "segments": tokens})


def _places(config, mesh):
    return jax.tree.map(lambda a: a.sharding, state_shapes(config, mesh))


def inputs_and_targets(tokens_BL1, segments_BL1):
    """(inputs, their segments, targets, weights) [B, L]: a target counts where it continues its input's document."""
    weights_BL = (segments_BL1[:, 1:] == segments_BL1[:, :-1]) & (segments_BL1[:, 1:] > 0)
    return (
        tokens_BL1[:, :-1],
        segments_BL1[:, :-1],
        tokens_BL1[:, 1:],
        weights_BL.astype(jnp.float32),
    )


def make_loss(config: Config, mesh=None) -> Callable:
    """loss(params, batch, all_targets) -> (total, (cross-entropy, balance loss, z-loss, statistics)) of a micro-batch;
    all_targets: predicted tokens of the whole batch, over which the cross-entropy is a mean."""
    graph, _ = transformer.build_abstract_model(config, mesh)
    micro_batches = config.training.gradient_accumulation

    def loss_function(params, batch, all_targets):
        inputs, segments, targets, weights = inputs_and_targets(batch["tokens"], batch["segments"])
        model = nnx.merge(graph, params)
        x_BLD, out = model.hidden(inputs, segments)
        loss = losses.cross_entropy(
            x_BLD,
            model.head_weight(),
            targets,
            weights / all_targets,
            config.training.loss_chunk,
            mesh,
        )
        balance, z = out.balance_loss / micro_batches, out.z_loss / micro_batches
        total = loss + config.moe.balance_loss_weight * balance + config.moe.z_loss_weight * z
        return total, (loss, balance, z, out.statistics)

    return loss_function


def make_train_step(config: Config, mesh=None) -> Callable:
    """step(state, batch) -> (state, metrics), to be jitted with the state donated.

    `batch` is {"tokens", "segments"}, int32 [B, L + 1].

    Micro-batches are summed with one global normaliser, so accumulation equals one large batch, but for the balance
    loss, which is the mean over micro-batches of the loss within each.
    """
    loss_function = make_loss(config, mesh)
    update_rule, schedule = optimizer.build_optimizer(config), optimizer.learning_rate(config)
    micro_batches = config.training.gradient_accumulation

    def gradient(params, batch):
        all_targets = jnp.maximum(
            jnp.sum(inputs_and_targets(batch["tokens"], batch["segments"])[3]), 1
        )
        micro = jax.tree.map(
            lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), batch
        )

        def one(grads_and_aux, piece):
            (_, aux), grads = jax.value_and_grad(loss_function, has_aux=True)(
                params, piece, all_targets
            )
            return jax.tree.map(jnp.add, grads_and_aux, (grads, aux)), None

        first = jax.tree.map(lambda a: a[0], micro)
        if micro_batches == 1:
            (_, aux), grads = jax.value_and_grad(loss_function, has_aux=True)(
                params, first, all_targets
            )
            return grads, aux, all_targets
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(
                lambda: jax.value_and_grad(loss_function, has_aux=True)(params, first, all_targets)
            ),
        )
        (grads, aux), _ = jax.lax.scan(one, (zeros[1], zeros[0][1]), micro)
        return grads, aux, all_targets

    def step(state: State, batch) -> tuple[State, Metrics]:
        grads, (loss, balance, z, statistics), targets = gradient(state.params, batch)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike = finite & _is_spike(grad_norm, state.norms, config.training.spike_factor)
        clip = jnp.minimum(1, config.optimizer.grad_clip / grad_norm)
        # One NaN in Adam's moments never leaves them: a bad step changes nothing but its counters.
        params, opt_state = apply_update(
            update_rule, grads, clip, state, finite & ~spike, sharding.chip_name(mesh) == "cpu"
        )
        skipped = state.skipped + (~finite | spike)
        in_a_row = jnp.where(finite, 0, state.nonfinite_in_a_row + 1)
        # A spike is remembered, so that a norm that stays high becomes the usual one; what is not finite never is.
        norms = state.norms.at[state.step % state.norms.size].set(
            jnp.where(finite, grad_norm, jnp.nan)
        )
        new = State(state.step + 1, params, opt_state, skipped, in_a_row, norms)
        rate = schedule(state.step - state.skipped)  # Adam's count stands still in a skipped step
        fault = jnp.where(finite, spike.astype(jnp.int32) * 2, 1)
        return new, Metrics(
            loss, balance, z, grad_norm, rate, targets, skipped, in_a_row, fault, statistics
        )

    return step


def apply_update(
    rule: optax.GradientTransformation, grads, clip, state: State, good, in_place: bool = False
):
    """(params, opt_state) after a step by the gradients times `clip`, or as they were where the step is not `good`.

    in_place: by loops of at most one turn, for CPU, where XLA has no fusion of several outputs: new parameters and new
    moments are each computed from the old moments, and unless one waits for the other both moments are copied first.
    Gradients and moments depend on the turn, or XLA would take what is the same in every turn out of the loop.
    """

    def rule_of(params, opt_state, scale):
        return rule.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)

    if not in_place:
        updates, opt_state = rule_of(state.params, state.opt_state, clip)
        new, old = (
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

    def params_turn(carry):
        turn, params = carry
        one = 1 / (turn + 1)
        moments = jax.tree.map(lambda a: a * one.astype(a.dtype), state.opt_state)
        return turn + 1, optax.apply_updates(params, rule_of(params, moments, clip * one)[0])

    turns, params = jax.lax.while_loop(
        lambda carry: carry[0] < good, params_turn, (jnp.int32(0), state.params)
    )
    return params, jax.lax.fori_loop(
        0,
        turns,
        lambda turn, opt_state: rule_of(params, opt_state, clip / (turn + 1))[1],
        state.opt_state,
    )


def _is_spike(norm, norms, factor):
    """Whether a gradient norm is `factor` times the median of those before it, once a quarter of the window is known.
    Differs from OLMo-core and MaxText (mean and deviation): a median is not moved by the spikes it is to find."""
    if not factor:
        return jnp.zeros((), bool)
    known = jnp.sum(~jnp.isnan(norms)) >= max(1, norms.size // 4)
    return known & (norm > factor * jnp.nanmedian(norms))


def run_twice(train_step: Callable, state: State, batch) -> tuple[State, Metrics, bool]:
    """(state, metrics, whether a second run of the same step gave the same bits). Needs room for a second state."""
    twin = jax.tree.map(jnp.copy, state)
    state, metrics = train_step(state, batch)
    again = train_step(twin, batch)[0]
    return state, metrics, bool(_same_bits(state, again))


@jax.jit
def _same_bits(a, b):
    def same(x, y):
        x, y = (jax.lax.bitcast_convert_type(v, jnp.uint32) for v in (x, y))
        return jnp.all(x == y)

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(same, a, b))))


def jitted_score_step(config: Config, mesh, trace: bool = False) -> Callable:
    """Returns `make_score_step` under jax.jit, its results on every device."""
    return jax.jit(
        make_score_step(config, mesh, trace),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler_options(mesh) or None,
    )


def make_score_step(config: Config, mesh=None, trace: bool = False) -> Callable:
    """score(params, batch) -> (nll_BL nats, weights_BL, router statistics), dropless whatever the config says; with
    trace also (inputs_BL, targets_BL, gates and expert ids [layers, B, L, K])."""
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config), mesh)

    def score(params, batch):
        inputs, segments, targets, weights = inputs_and_targets(batch["tokens"], batch["segments"])
        model = nnx.merge(graph, params)
        x_BLD, out = model.hidden(inputs, segments, trace)
        nll_BL = losses.nll(x_BLD, model.head_weight(), targets, config.training.loss_chunk, mesh)
        return (nll_BL, weights, out.statistics) + (
            (inputs, targets, *out.choices) if trace else ()
        )

    return score
