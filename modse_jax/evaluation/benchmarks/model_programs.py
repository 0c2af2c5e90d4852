"""The compiled functions of the model that benchmarks run: "score", "prefill" and "decode".

A compiled function is called a program. All processes must run a program together, but only process
0 knows which one comes next. It calls `Programs.call`, which sends the name of the program and its
inputs to the other processes. Those are in `Programs.follow`, a loop that receives and runs
programs, until process 0 calls `Programs.release`.

Legend: B rows (sequences) of a batch, L padded length, D model width, V vocabulary, M candidates
for a row's last token.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from modse_jax.evaluation.model_loading import LoadedModel
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.model.variables import Variables
from modse_jax.runtime import gpu_options, processes, sharding
from modse_jax.training import losses

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each input, by name


class Scores(NamedTuple):
    """Scores of a batch of rows (sequences).

    Attributes:
        log_p_B: Sum of the log-probabilities (nats) of the scored tokens of a row.
        is_greedy_B: True if each of these tokens is the most likely one.
        last_log_p_BM: Log-probability (nats) of each candidate as the token after the row.
        last_is_greedy_BM: True if the candidate is the most likely token after the row.
    """

    log_p_B: jax.Array | np.ndarray
    is_greedy_B: jax.Array | np.ndarray
    last_log_p_BM: jax.Array | np.ndarray
    last_is_greedy_BM: jax.Array | np.ndarray


class Programs:
    """Compiles and runs "score", "prefill" and "decode" for a model, on all processes together.

    Each is compiled once per input shape. See the description of this module.

    Attributes:
        seconds: Time spent computing since the last `reset_times`.
        compile_seconds: Time spent compiling since the last `reset_times`.
    """

    def __init__(self, model: LoadedModel):
        self._model = model
        self._mesh = model.mesh
        self._graph, _ = transformer.build_abstract_model(
            kernel_selection.for_generation(model.config), self._mesh_for_sharding()
        )
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self._state: sampling.DecodingState | None = None
        self.reset_times()

    def reset_times(self) -> None:
        """Sets `seconds` and `compile_seconds` to zero."""
        self.seconds = 0.0
        self.compile_seconds = 0.0

    def discard_state(self) -> None:
        """Frees the state of decoding (the key/value cache), to make room for the next batch."""
        self._state = None

    def call(self, kind: str, static: tuple, arrays: Arrays) -> tuple[np.ndarray, ...]:
        """Runs a program on every process and returns its outputs as numpy arrays.

        To be called on process 0 only. The key/value cache is no output: it stays on the devices.

        Args:
            kind: "score" returns the fields of `Scores`; "prefill" returns nothing and leaves its
                state on the devices; "decode" continues from that state and returns new tokens.
            static: Compile-time arguments. "prefill": (number of new tokens,); "decode": the fields
                of `sampling.Settings`; "score": ().
            arrays: Inputs with one row per sequence, which are sharded over the devices, and
                "keys", which is replicated.
        """
        if processes.is_multi_process():
            shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
            processes.gather(json.dumps({"kind": kind, "static": static, "shapes": shapes}))
            arrays = processes.broadcast(arrays)
        return self.run(kind, static, arrays)

    def follow(self) -> str:
        """Runs the programs that process 0 requests, until process 0 calls `release`.

        To be called on every process but process 0.

        Returns:
            The error with which process 0 ended; "" if it ended without one.
        """
        while True:
            order = json.loads(processes.gather("")[0])
            if order["kind"] == "release":
                return order["trouble"]
            zeros = {
                name: np.zeros(shape, dtype) for name, (shape, dtype) in order["shapes"].items()
            }
            self.run(order["kind"], tuple(order["static"]), processes.broadcast(zeros))

    def release(self, trouble: str = "") -> None:
        """Ends `follow` on the other processes, which then return `trouble`.

        Args:
            trouble: The error with which process 0 ends; "" for none.
        """
        if processes.is_multi_process():
            processes.gather(json.dumps({"kind": "release", "trouble": trouble}))

    def run(self, kind: str, static: tuple, arrays: Arrays) -> tuple[np.ndarray, ...]:
        """Runs this process's share of a program. See `call` for the arguments and the result."""
        shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        program = self.compile(kind, static, shapes)
        start = time.perf_counter()
        inputs = {name: self._put_on_devices(name, array) for name, array in arrays.items()}
        outputs: tuple[jax.Array, ...]
        if kind == "score":
            outputs = program(self._model.variables, inputs)
        elif kind == "prefill":
            self._state = program(self._model.variables, inputs)
            outputs = ()
        else:
            self._state, tokens_BN = program(self._model.variables, inputs, self._state)
            outputs = (tokens_BN,)
        on_host = tuple(np.asarray(array) for array in outputs)
        self.seconds += time.perf_counter() - start
        return on_host

    def compile(self, kind: str, static: tuple, shapes: Shapes) -> jax.stages.Compiled:
        """Returns the program for these input shapes, which is compiled at its first use.

        See `call` for `kind` and `static`.
        """
        cache_shape = None
        if kind == "decode" and self._state is not None:
            cache_shape = self._state.cache[0].shape
        input_shapes = tuple((name, tuple(shape)) for name, (shape, _) in sorted(shapes.items()))
        key = (kind, static, input_shapes, cache_shape)
        if key not in self._compiled:
            start = time.perf_counter()
            options = gpu_options.compiler_options(self._mesh.devices.flat[0]) or None
            lowered = self._lower(kind, static, shapes)
            self._compiled[key] = lowered.compile(compiler_options=options)
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key]

    def _mesh_for_sharding(self) -> Mesh | None:
        """Returns the mesh, or None for a single device, where nothing has to be sharded."""
        return self._mesh if self._mesh.size > 1 else None

    def _put_on_devices(self, name: str, array: np.ndarray) -> jax.Array:
        if name == "keys":
            return jax.device_put(array, sharding.replicated(self._mesh))
        rows = sharding.local_rows(self._mesh, len(array))
        return sharding.shard_batch(self._mesh, {name: array[rows]}, len(array))[name]

    def _lower(self, kind: str, static: tuple, shapes: Shapes) -> jax.stages.Lowered:
        replicated = sharding.replicated(self._mesh)
        by_row = sharding.batch_sharding(self._mesh)
        inputs = {
            name: jax.ShapeDtypeStruct(
                shape, dtype, sharding=replicated if name == "keys" else by_row
            )
            for name, (shape, dtype) in shapes.items()
        }
        variables = self._model.variables
        if kind == "score":
            return jax.jit(self._make_score(), out_shardings=replicated).lower(variables, inputs)
        if kind == "prefill":
            return jax.jit(self._make_prefill(*static)).lower(variables, inputs)
        state_shardings = jax.tree.map(lambda array: array.sharding, self._state)
        decode = self._make_decode(sampling.Settings(*static))
        # The state is donated: the key/value cache is updated in place.
        jitted = jax.jit(decode, donate_argnums=2, out_shardings=(state_shardings, replicated))
        return jitted.lower(variables, inputs, self._state)

    def _make_score(self) -> Callable:
        graph = self._graph
        chunk = self._model.config.advanced.loss_chunk
        mesh = self._mesh_for_sharding()

        def score(variables: Variables, inputs: dict[str, jax.Array]) -> Scores:
            return score_rows(graph, variables, chunk, mesh, **inputs)

        return score

    def _make_prefill(self, max_new_tokens: int) -> Callable:
        graph = self._graph

        def prefill(variables: Variables, inputs: dict[str, jax.Array]) -> sampling.DecodingState:
            tokens_BP = inputs["tokens"]
            return sampling.prefill(graph, variables, tokens_BP, inputs["lengths"], max_new_tokens)

        return prefill

    def _make_decode(self, settings: sampling.Settings) -> Callable:
        graph = self._graph
        tokenizer = self._model.data.tokenizer

        def decode(
            variables: Variables, inputs: dict[str, jax.Array], state: sampling.DecodingState
        ) -> tuple[sampling.DecodingState, jax.Array]:
            state = state._replace(done_B=state.done_B | inputs["ended"])
            keys = jax.random.wrap_key_data(inputs["keys"])
            return sampling.decode(
                graph, variables, state, keys, settings, tokenizer.pad_id, tokenizer.eos_id
            )

        return decode


def score_rows(
    graph: nnx.GraphDef,
    variables: Variables,
    chunk: int,
    mesh: Mesh | None,
    tokens: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    last: jax.Array,
) -> Scores:
    """Computes log-probabilities of parts of token sequences, and of candidates for the next token.

    Tokens start to length - 1 of each row are scored, and each candidate for the token at `length`.

    Args:
        graph: The structure of the model.
        variables: Its arrays.
        chunk: Tokens of a row whose logits are computed at a time, which bounds memory.
        mesh: The devices; None for one device.
        tokens: [B, L] token ids, padded on the right.
        lengths: [B] number of tokens of a row.
        starts: [B] position of the first scored token of each row.
        last: [B, M] candidates for the token after each row.
    """
    model = nnx.merge(graph, variables.params)
    position_1L = jnp.arange(tokens.shape[1])[None, :]
    segments_BL = (position_1L < lengths[:, None]).astype(jnp.int32)
    x_BLD, _ = model.hidden(tokens, segments_BL, router_bias_LE=variables.router_bias_LE)
    next_tokens_BL = jnp.roll(tokens, -1, axis=1)
    nll_BL, is_greedy_BL = losses.nll(
        x_BLD, model.head_weight(), next_tokens_BL, chunk, mesh, greedy=True
    )
    # Position i predicts token i + 1.
    is_scored_BL = (position_1L + 1 >= starts[:, None]) & (position_1L + 1 < lengths[:, None])
    last_B1D = jnp.take_along_axis(x_BLD, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits_BV = model.logits(last_B1D)[:, 0]
    last_log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return Scores(
        -jnp.sum(jnp.where(is_scored_BL, nll_BL, 0.0), axis=1),
        jnp.all(is_greedy_BL | ~is_scored_BL, axis=1),
        jnp.take_along_axis(last_log_p_BV, last, axis=1),
        jnp.argmax(logits_BV, axis=-1)[:, None] == last,
    )
