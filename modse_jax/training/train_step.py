"""The training step and the scoring step: pure functions of a state or variables and a batch.

A training step computes the loss and its gradients, clips them, and applies AdamW. With a bias
rule, it also updates the router bias. A step whose loss or gradients are not finite, or whose
gradient norm is a spike, changes nothing but counters.

Legend: B batch, L predicted tokens, D model dimension, K top-k. A record has L + 1 tokens, written
L1 in names, because every token except the first is predicted.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection, transformer
from modse_jax.model.variables import Params, RouterBias, Variables, router_bias_array
from modse_jax.moe.router import RouterStatistics
from modse_jax.runtime import gpu_options, sharding
from modse_jax.training import (
    hyperparameters,
    loss_free_balancing,
    losses,
    optimizer,
    train_step_cpu,
)
from modse_jax.training.hyperparameters import Hyperparameters

Batch = dict[str, jax.Array]  # "tokens" and "segments", int32 [B, L + 1]
ScoreStep = Callable[[Variables, Batch], tuple]

# XLA's message for a TPU slice that has no ragged all-to-all.
NO_RAGGED_ALL_TO_ALL = "Ragged all-to-all is currently not supported"

# Names of the values of `Metrics.fault`.
FAULTS = ("none", "not finite", "spike")
FAULT_NOT_FINITE = FAULTS.index("not finite")
FAULT_SPIKE = FAULTS.index("spike")


class State(NamedTuple):
    """Everything that training changes; a checkpoint holds exactly this.

    Attributes:
      step: int32, number of completed steps, which also determines the position in the data.
      params: parameters of the model.
      opt_state: state of the optimizer.
      skipped: int32, number of steps that made no update.
      nonfinite_in_a_row: int32, number of consecutive steps that were not finite, up to now.
      norms: float32, gradient norms of the last `advanced.spike_window` steps; NaN for steps that
        were not finite or have not happened yet.
      router_bias: the bias of loss-free balancing; {} without `moe.bias_rule`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    nonfinite_in_a_row: jax.Array
    norms: jax.Array
    router_bias: RouterBias

    @property
    def variables(self) -> Variables:
        """The arrays that the model computes with."""
        return Variables(self.params, self.router_bias)


class Metrics(NamedTuple):
    """Results of one training step.

    Attributes:
      loss: cross-entropy without auxiliary losses, nats per predicted token.
      balance_loss: load-balancing loss, without its weight.
      z_loss: router z-loss, without its weight.
      width_penalty: width penalty, without its weight.
      vocab_z_loss: z-loss of the vocabulary, without its weight; None if the weight is 0.
      grad_norm: global norm of the gradients before clipping.
      learning_rate: the learning rate of this step.
      targets: number of predicted tokens in the batch.
      skipped: as in `State`, after this step.
      nonfinite_in_a_row: as in `State`, after this step.
      fault: index into `FAULTS`.
      statistics: routing statistics, with a leading axis of layers.
      bias_range: float32 [layers, 2], the smallest and the largest router bias of a layer after
        this step; None without a bias rule.
    """

    loss: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    width_penalty: jax.Array
    vocab_z_loss: jax.Array | None
    grad_norm: jax.Array
    learning_rate: jax.Array
    targets: jax.Array
    skipped: jax.Array
    nonfinite_in_a_row: jax.Array
    fault: jax.Array
    statistics: RouterStatistics
    bias_range: jax.Array | None


TrainStep = Callable[[State, Batch], tuple[State, Metrics]]

SharedTrainStep = Callable[[State, Batch, Hyperparameters], tuple[State, Metrics]]


class LossTerms(NamedTuple):
    """The parts of a loss before weighting, and the routing statistics."""

    cross_entropy: jax.Array
    vocab_z_loss: jax.Array | None
    balance_loss: jax.Array
    z_loss: jax.Array
    width_penalty: jax.Array
    statistics: RouterStatistics


class BatchTotals(NamedTuple):
    """Numbers of tokens of a batch over all micro-batches, float32, at least 1."""

    targets: jax.Array  # predicted tokens
    routed: jax.Array  # tokens that are not padding


class LossFunction(Protocol):
    """Returns the weighted loss of a micro-batch, and its parts."""

    def __call__(
        self, params: Params, router_bias: RouterBias, batch: Batch, totals: BatchTotals
    ) -> tuple[jax.Array, LossTerms]:
        """`totals` are those of the entire batch. Only `params` is differentiated."""
        ...


class Gradients(NamedTuple):
    """Gradients of a batch, the parts of its loss, and its numbers of tokens."""

    grads: Params
    terms: LossTerms
    totals: BatchTotals


class Targets(NamedTuple):
    """Inputs and targets of next-token prediction, all [B, L]."""

    inputs_BL: jax.Array
    segments_BL: jax.Array
    targets_BL: jax.Array
    weights_BL: jax.Array


class Update(NamedTuple):
    """Parameters and optimizer state after an update."""

    params: Params
    opt_state: optax.OptState


# ---- state -----------------------------------------------------------------------------------


def init_state(config: Config, mesh: Mesh | None = None, seed: jax.Array | None = None) -> State:
    """Returns the state before the first step. It does not depend on the mesh.

    Args:
      config: the config.
      mesh: the mesh.
      seed: the seed, as a scalar; None for config.seed.
    """
    _, model_params = nnx.split(transformer.build_model(config, mesh, seed))
    params = nnx.to_pure_dict(model_params)
    # A state is donated to the step, so no two of its arrays may share a buffer.
    step = jnp.zeros((), jnp.int32)
    skipped = jnp.zeros((), jnp.int32)
    nonfinite_in_a_row = jnp.zeros((), jnp.int32)
    norms = jnp.full((config.advanced.spike_window,), jnp.nan, jnp.float32)
    opt_state = optimizer.build_optimizer(config).init(params)
    router_bias = loss_free_balancing.init_router_bias(config)
    return State(step, params, opt_state, skipped, nonfinite_in_a_row, norms, router_bias)


def state_shapes(config: Config, mesh: Mesh) -> State:
    """Returns the state with shapes, types and shardings in place of arrays; allocates nothing."""
    state = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda array, target: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=target),
        state,
        sharding.parameter_shardings(mesh, state),
    )


def init_sharded_state(config: Config, mesh: Mesh) -> State:
    """Returns the initial state. Each device initializes only its own shards."""
    shardings = state_shardings(config, mesh)
    return jax.jit(lambda: init_state(config, mesh), out_shardings=shardings)()


def jitted_init_state(config: Config, mesh: Mesh) -> Callable[[int], State]:
    """Returns init(seed), which returns the initial state and compiles once for all seeds."""
    shardings = state_shardings(config, mesh)
    return jax.jit(lambda seed: init_state(config, mesh, seed), out_shardings=shardings)


def state_shardings(config: Config, mesh: Mesh) -> State:
    """Returns the state with shardings in place of arrays."""
    return jax.tree.map(lambda array: array.sharding, state_shapes(config, mesh))


# ---- compilation -----------------------------------------------------------------------------


def compile_train_step(
    config: Config, mesh: Mesh, options: dict[str, str | int] | None = None
) -> jax.stages.Compiled:
    """Compiles the training step, which donates its state. Training, planning and timing share it.

    Args:
      config: the config.
      mesh: the mesh.
      options: additional XLA compiler options, which override those of `compiler_options`.

    Raises:
      UserError: the TPU slice does not support ragged all-to-all. Only its compiler can tell.
    """
    return _compile(lower_train_step(config, mesh), mesh, options)


def compile_shared_train_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the training step of runs that differ in their hyperparameters, which are inputs."""
    values = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    inputs = Hyperparameters(*[values for _ in Hyperparameters._fields])
    step = make_shared_train_step(config, mesh)
    return _compile(_lower(step, config, mesh, inputs), mesh)


def _compile(
    lowered: jax.stages.Lowered, mesh: Mesh, options: dict[str, str | int] | None = None
) -> jax.stages.Compiled:
    all_options = {**compiler_options(mesh), **(options or {})}
    try:
        return lowered.compile(compiler_options=all_options or None)
    except jax.errors.JaxRuntimeError as error:
        if NO_RAGGED_ALL_TO_ALL not in str(error):
            raise
        raise UserError(
            "this TPU slice has no ragged all-to-all (its links do not close rings); choose "
            "another topology, or moe.exchange=gather"
        ) from None


def compiler_options(mesh: Mesh | None) -> dict[str, str | int]:
    """Returns XLA's compiler options for programs on a mesh, or on the default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return gpu_options.compiler_options(device)


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Traces the training step for a mesh."""
    return _lower(make_train_step(config, mesh), config, mesh)


def _lower(
    step: Callable[..., tuple[State, Metrics]], config: Config, mesh: Mesh, *inputs: Hyperparameters
) -> jax.stages.Lowered:
    """Traces a training step, which takes a state, a batch, and the given inputs."""
    shape = (config.training.batch_size, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings(config, mesh), sharding.replicated(mesh)),
    )
    batch = {"tokens": tokens, "segments": tokens}
    return jitted.lower(state_shapes(config, mesh), batch, *inputs)


# ---- loss and gradients ----------------------------------------------------------------------


def inputs_and_targets(tokens_BL1: jax.Array, segments_BL1: jax.Array) -> Targets:
    """Splits packed records into inputs and targets.

    Args:
      tokens_BL1: token ids.
      segments_BL1: the document of each token within its record, counted from 1; 0 is padding.

    Returns:
      The inputs and targets. A target has weight 1 if it belongs to the same document as its
      input, else 0.
    """
    same_document_BL = segments_BL1[:, 1:] == segments_BL1[:, :-1]
    weights_BL = same_document_BL & (segments_BL1[:, 1:] > 0)
    return Targets(
        tokens_BL1[:, :-1],
        segments_BL1[:, :-1],
        tokens_BL1[:, 1:],
        weights_BL.astype(jnp.float32),
    )


def make_loss(
    config: Config, mesh: Mesh | None = None, values: Hyperparameters | None = None
) -> LossFunction:
    """Returns the loss function of a micro-batch.

    The losses of all micro-batches add up to the loss of the batch: the cross-entropy is divided by
    the number of targets of the batch, and the auxiliary losses, which are means over the tokens of
    a micro-batch, are multiplied by its share of the tokens of the batch.

    Args:
      config: the config.
      mesh: the mesh.
      values: hyperparameters; None for those of the config.
    """
    weights = values or hyperparameters.from_config(config)
    graph, _ = transformer.build_abstract_model(config, mesh)
    is_mean = config.moe.auxiliary_over_layers == "mean"
    layer_divisor = config.model.num_layers if is_mean else 1
    micro_batches = config.training.gradient_accumulation

    def loss_function(
        params: Params, router_bias: RouterBias, batch: Batch, totals: BatchTotals
    ) -> tuple[jax.Array, LossTerms]:
        split = inputs_and_targets(batch["tokens"], batch["segments"])
        model = nnx.merge(graph, params)
        x_BLD, out = model.hidden(
            split.inputs_BL, split.segments_BL, router_bias_LE=router_bias_array(router_bias)
        )
        vocabulary = _vocabulary_losses(
            config, mesh, x_BLD, model.head_weight(), split, totals.targets
        )
        share = _count_tokens(split) / totals.routed if micro_batches > 1 else 1.0
        balance_loss = out.balance_loss * share / layer_divisor
        z_loss = out.z_loss * share / layer_divisor
        width_penalty = out.width_penalty * share / layer_divisor
        total = (
            vocabulary.total
            + weights.balance_loss_weight * balance_loss
            + weights.z_loss_weight * z_loss
        )
        if config.moe.width_penalty_weight:
            total += weights.width_penalty_weight * width_penalty
        terms = LossTerms(
            cross_entropy=vocabulary.cross_entropy,
            vocab_z_loss=vocabulary.z_loss,
            balance_loss=balance_loss,
            z_loss=z_loss,
            width_penalty=width_penalty,
            statistics=out.statistics,
        )
        return total, terms

    return loss_function


def _vocabulary_losses(
    config: Config,
    mesh: Mesh | None,
    x_BLD: jax.Array,
    head_DV: jax.Array,
    split: Targets,
    num_targets: jax.Array,
) -> losses.VocabularyLosses:
    """Returns the cross-entropy and, if it has a weight, the z-loss of the vocabulary."""
    inputs = (x_BLD, head_DV, split.targets_BL, split.weights_BL / num_targets)
    chunk = config.advanced.loss_chunk
    z_loss_weight = config.training.vocab_z_loss_weight
    if z_loss_weight:
        return losses.vocabulary_losses(*inputs, chunk, mesh, z_loss_weight)
    cross_entropy = losses.cross_entropy(*inputs, chunk, mesh)
    return losses.VocabularyLosses(cross_entropy, cross_entropy, None)


def _count_tokens(split: Targets) -> jax.Array:
    """Returns the number of input tokens that are not padding, float32."""
    return jnp.sum(split.segments_BL > 0, dtype=jnp.int32).astype(jnp.float32)


def compute_gradients(
    loss_function: LossFunction,
    params: Params,
    router_bias: RouterBias,
    batch: Batch,
    micro_batches: int,
) -> Gradients:
    """Computes gradients, summed over micro-batches.

    The result equals that of one large batch, except for the load-balancing loss and the width
    penalty, which are not linear in the batch: they are means over micro-batches, weighted by their
    numbers of tokens.
    """
    value_and_grad = jax.value_and_grad(loss_function, has_aux=True)
    split = inputs_and_targets(batch["tokens"], batch["segments"])
    totals = BatchTotals(
        targets=jnp.maximum(jnp.sum(split.weights_BL), 1),
        routed=jnp.maximum(_count_tokens(split), 1),
    )
    # Consecutive rows belong to different micro-batches, so that every device has rows of each
    # micro-batch.
    pieces = jax.tree.map(
        lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), batch
    )
    first_piece = jax.tree.map(lambda a: a[0], pieces)
    if micro_batches == 1:
        (_, terms), grads = value_and_grad(params, router_bias, first_piece, totals)
        return Gradients(grads, terms, totals)

    def accumulate(sums: tuple[Params, LossTerms], piece: Batch) -> tuple[tuple, None]:
        (_, terms), grads = value_and_grad(params, router_bias, piece, totals)
        return jax.tree.map(jnp.add, sums, (grads, terms)), None

    shapes = jax.eval_shape(lambda: value_and_grad(params, router_bias, first_piece, totals))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (_, zero_terms), zero_grads = zeros
    (grads, terms), _ = jax.lax.scan(accumulate, (zero_grads, zero_terms), pieces)
    return Gradients(grads, terms, totals)


# ---- training step ---------------------------------------------------------------------------


def make_train_step(config: Config, mesh: Mesh | None = None) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated."""
    shared_step = make_shared_train_step(config, mesh)
    constants = hyperparameters.from_config(config)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        return shared_step(state, batch, constants)

    return step


def make_shared_train_step(config: Config, mesh: Mesh | None = None) -> SharedTrainStep:
    """Returns step(state, batch, values) -> (state, metrics); `values` replace those of config."""
    update = select_update(mesh)
    micro_batches = config.training.gradient_accumulation

    def step(state: State, batch: Batch, values: Hyperparameters) -> tuple[State, Metrics]:
        loss_function = make_loss(config, mesh, values)
        rule = optimizer.build_optimizer(config, values)
        schedule = optimizer.learning_rate(config, values)
        update_router_bias = loss_free_balancing.make_update(config, values.bias_rate)
        grads, terms, totals = compute_gradients(
            loss_function, state.params, state.router_bias, batch, micro_batches
        )
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(terms.cross_entropy) & jnp.isfinite(grad_norm)
        spike = finite & is_spike(grad_norm, state.norms, config.training.spike_factor)
        clip_factor = jnp.minimum(1, config.optimizer.grad_clip / grad_norm)
        is_good = finite & ~spike
        params, opt_state = update(rule, grads, clip_factor, state.params, state.opt_state, is_good)
        # The schedules count updates, so they do not advance in a skipped step.
        updates = state.step - state.skipped
        router_bias = update_router_bias(
            state.router_bias, terms.statistics.counts_KE, updates, is_good
        )
        skipped = state.skipped + (~finite | spike)
        nonfinite_in_a_row = jnp.where(finite, 0, state.nonfinite_in_a_row + 1)
        # The norm of a spike is recorded, so that a norm that stays high becomes the usual one.
        slot = state.step % state.norms.size
        norms = state.norms.at[slot].set(jnp.where(finite, grad_norm, jnp.nan))
        new_state = State(
            state.step + 1, params, opt_state, skipped, nonfinite_in_a_row, norms, router_bias
        )
        metrics = Metrics(
            loss=terms.cross_entropy,
            balance_loss=terms.balance_loss,
            z_loss=terms.z_loss,
            width_penalty=terms.width_penalty,
            vocab_z_loss=terms.vocab_z_loss,
            grad_norm=grad_norm,
            learning_rate=schedule(updates),
            targets=totals.targets,
            skipped=skipped,
            nonfinite_in_a_row=nonfinite_in_a_row,
            fault=jnp.where(finite, spike.astype(jnp.int32) * FAULT_SPIKE, FAULT_NOT_FINITE),
            statistics=terms.statistics,
            bias_range=loss_free_balancing.range_by_layer(router_bias),
        )
        return new_state, metrics

    return step


def is_spike(norm: jax.Array, previous_norms: jax.Array, factor: float) -> jax.Array:
    """Returns whether a gradient norm is more than `factor` times the median of previous norms.

    False until a quarter of the window of previous norms is known, and always if `factor` is 0.
    OLMo-core and MaxText compare with the mean and the standard deviation instead. The median is
    used here because spikes themselves do not move it.
    """
    if not factor:
        return jnp.zeros((), bool)
    num_known = jnp.sum(~jnp.isnan(previous_norms))
    enough_known = num_known >= max(1, previous_norms.size // 4)
    return enough_known & (norm > factor * jnp.nanmedian(previous_norms))


def select_update(mesh: Mesh | None) -> Callable[..., tuple[Params, optax.OptState]]:
    """Returns the implementation of `apply_update` for the devices of a mesh."""
    if sharding.chip_name(mesh) == "cpu":
        return train_step_cpu.apply_update_in_place
    return apply_update


def apply_update(
    rule: optax.GradientTransformation,
    grads: Params,
    clip_factor: jax.Array | float,
    params: Params,
    opt_state: optax.OptState,
    is_good: jax.Array,
) -> Update:
    """Applies an optimizer update, unless the step is bad.

    A single NaN in Adam's moments would stay in them forever, so a bad step must change neither
    the parameters nor the moments.

    Args:
      rule: the optimizer.
      grads: gradients before clipping.
      clip_factor: factor by which the gradients are multiplied.
      params: parameters before the update.
      opt_state: optimizer state before the update.
      is_good: bool; if False, `params` and `opt_state` are returned unchanged.
    """
    clipped = jax.tree.map(lambda g: g * clip_factor, grads)
    updates, new_opt_state = rule.update(clipped, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(is_good, new, old),
        Update(new_params, new_opt_state),
        Update(params, opt_state),
    )


# ---- scoring step ----------------------------------------------------------------------------


def jitted_score_step(config: Config, mesh: Mesh, trace: bool = False) -> ScoreStep:
    """Returns `make_score_step` under jax.jit. Its results are replicated over all devices."""
    return jax.jit(
        make_score_step(config, mesh, trace),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler_options(mesh) or None,
    )


def make_score_step(config: Config, mesh: Mesh | None = None, trace: bool = False) -> ScoreStep:
    """Returns score(variables, batch), which evaluates the model.

    Args:
      config: the config. Tokens are dropped according to `evaluation.capacity_factor`, whatever
        `moe.capacity_factor` is.
      mesh: the mesh.
      trace: also return each token's routing.

    Returns:
      A function that returns (nll_BL in nats, weights_BL, routing statistics); with `trace` also
      (inputs_BL, targets_BL, gates, expert ids), the last two [layers, B, L, K].
    """
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config), mesh)

    def score(variables: Variables, batch: Batch) -> tuple:
        split = inputs_and_targets(batch["tokens"], batch["segments"])
        model = nnx.merge(graph, variables.params)
        x_BLD, out = model.hidden(
            split.inputs_BL, split.segments_BL, trace, variables.router_bias_LE
        )
        nll_BL = losses.nll(
            x_BLD, model.head_weight(), split.targets_BL, config.advanced.loss_chunk, mesh
        )
        scores = (nll_BL, split.weights_BL, out.statistics)
        if not trace:
            return scores
        return (*scores, split.inputs_BL, split.targets_BL, *out.choices)

    return score
