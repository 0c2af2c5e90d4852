"""cuDNN's flash attention for NVIDIA GPUs, and its self-test.

Legend: B batch, L query length, S key length, A query heads, G key/value heads, C head size.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.errors import UserError, describe_exception
from modse_jax.model.attention.masks import packed_mask
from modse_jax.model.attention.reference import attend

MAX_TEST_LENGTH = 512
MAX_TEST_ERROR = 0.02  # norm of the error over that of the reference; bfloat16 explains less


def cudnn_version() -> int:
    """Returns the version of the installed cuDNN as jax reports it, such as 92801, or 0 if none.

    jax has no public function for it. Nothing is raised: a jax without the private function has no
    cuDNN that this project can use.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return int(check_cudnn_version())
    except Exception:  # RuntimeError of a missing library, ImportError, AttributeError
        return 0


def attend_cudnn(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    implementation: str = "cudnn",
) -> jax.Array:
    """Returns causal attention within every document of packed rows, by cuDNN's flash attention.

    See `blocked.attend_packed` for the other arguments and the result. A mask keeps documents of a
    row apart. jax passes it to cuDNN as a bias, which takes 2 L bytes per token.

    Args:
        implementation: see jax.nn.dot_product_attention; tests use "xla".
    """
    is_same_document_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
    with _without_mask_gradient():
        return jax.nn.dot_product_attention(
            query_BLAC,
            key_BLGC,
            value_BLGC,
            mask=is_same_document_BLS[:, None],
            is_causal=True,
            implementation=implementation,
        )


@contextlib.contextmanager
def _without_mask_gradient() -> Iterator[None]:
    """Keeps cuDNN from computing a gradient of the mask, [B, 1, L, S], which nothing reads.

    jax 0.10 requests the gradient of every bias, and a mask is passed as a bias; there is no public
    switch, so a private function of jax is replaced inside this context. jax 0.11 no longer
    requests it, and no longer has that function. Delete this when jax 0.10 is no longer supported.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    original = getattr(fused_attention_stablehlo, "should_export_dbias", None)
    if original is None:
        yield
        return
    fused_attention_stablehlo.should_export_dbias = lambda *_: False
    try:
        yield
    finally:
        fused_attention_stablehlo.should_export_dbias = original


def check_cudnn(
    shape: tuple[int, int, int], length: int, attend_by: Callable = attend_cudnn
) -> None:
    """Runs cuDNN's attention on this device and compares it with the reference.

    Outputs and gradients of a small batch of packed rows are compared.

    Args:
        shape: number of query heads, number of key/value heads, head size.
        length: length of the training sequences; at most MAX_TEST_LENGTH tokens are used.
        attend_by: the function to check.

    Raises:
        UserError: the function cannot run, or differs from the reference by more than
            MAX_TEST_ERROR.
    """
    segments_BL = _test_segments(min(length, MAX_TEST_LENGTH))
    arrays = _test_arrays(shape, segments_BL.shape)
    try:
        results = _output_and_gradients(lambda q, k, v: attend_by(q, k, v, segments_BL), arrays)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ValueError) as error:
        reason = describe_exception(error).splitlines()[0][:200]
        raise UserError(
            f"cuDNN's attention does not run on this device ({reason}); "
            "set --config.model.attention=blocks"
        ) from None
    references = _output_and_gradients(
        lambda q, k, v: attend(q, k, v, packed_mask(segments_BL)),
        [array.astype(jnp.float32) for array in arrays],
    )
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, result, expected in zip(names, results, references):
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        if not error < MAX_TEST_ERROR:  # true for NaN
            raise UserError(
                f"cuDNN's attention is wrong on this device: its {name} differs from the reference "
                f"by {error:.3g} of its norm; set --config.model.attention=blocks, and report it"
            )


def _test_segments(length: int) -> jax.Array:
    """Returns the document numbers of two test rows, [2, L].

    The first row has two documents and padding (0), the second a single document.
    """
    position_L = jnp.arange(length)
    second_or_padding_L = jnp.where(position_L < length - length // 5, 2, 0)
    packed_L = jnp.where(position_L < length // 3, 1, second_or_padding_L)
    return jnp.stack([packed_L, jnp.ones(length, jnp.int32)])


def _test_arrays(shape: tuple[int, int, int], batch_shape: tuple[int, int]) -> list[jax.Array]:
    """Returns random queries, keys, values and output gradients in bfloat16."""
    A, G, C = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (*batch_shape, heads, C), jnp.bfloat16)
        for key, heads in zip(keys, (A, G, G, A))
    ]


def _output_and_gradients(function: Callable, arrays: list[jax.Array]) -> list[np.ndarray]:
    """Returns the output of function(query, key, value) and its three gradients, in float32."""

    @jax.jit
    def run(
        query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, dout_BLAC: jax.Array
    ) -> tuple[jax.Array, ...]:
        out_BLAC, pull_back = jax.vjp(function, query_BLAC, key_BLGC, value_BLGC)
        return out_BLAC, *pull_back(dout_BLAC.astype(out_BLAC.dtype))

    return [np.asarray(array, np.float32) for array in run(*arrays)]
