"""The choice of the implementation of attention, by the option `model.attention`.

Legend: B batch, L length, A query heads, C head size.
"""

from modse_jax.errors import UserError
from modse_jax.model.attention import cudnn_attention
from modse_jax.runtime import chips


def select_attention(kind: str, shape: tuple[int, int, int, int], chip: str, dtype: str) -> str:
    """Returns the implementation of attention over packed rows: "blocks", "splash" or "cudnn".

    "auto" chooses splash on TPUs and cuDNN on GPUs if they support the shape and dtype and are
    installed. Otherwise it chooses blocks, which is plain XLA and runs anywhere.

    Args:
        kind: the option model.attention.
        shape: the shape of the queries, [B, L, A, C].
        chip: the name of the chip; see chips.chip_name.
        dtype: the compute dtype.

    Raises:
        UserError: the requested implementation cannot run.
    """
    _, length, _, head_size = shape
    splash_runs = takes_splash(length, head_size, chip)
    if kind == "splash" and not splash_runs:
        raise UserError(
            f"model.attention=splash needs a TPU ({', '.join(chips.TPUS)}), a sequence length that "
            "is divisible by 128 and a head size that is divisible by 64. "
            f"The chip is {chip}, the length {length}, the head size {head_size}. "
            "Set model.attention=auto"
        )
    cudnn_runs = takes_cudnn(length, head_size, chip, dtype)
    if kind == "cudnn" and not cudnn_runs:
        raise UserError(
            f"model.attention=cudnn needs one of {', '.join(chips.GPUS)}, model.dtype=bfloat16, an "
            "even sequence length and a head size of at most 128 that is divisible by 8. "
            f"The chip is {chip}, the type {dtype}, the length {length}, the head size "
            f"{head_size}. Set model.attention=auto"
        )
    if kind == "cudnn" and not cudnn_attention.cudnn_version():
        raise UserError(
            "model.attention=cudnn needs cuDNN, which jax does not find. Install jax[cuda13] (its "
            "package is nvidia-cudnn-cu13), or set model.attention=blocks"
        )
    if kind != "auto":
        return kind
    if splash_runs:
        return "splash"
    if cudnn_runs and cudnn_attention.cudnn_version():
        return "cudnn"
    return "blocks"


def takes_splash(length: int, head_size: int, chip: str) -> bool:
    """Returns whether the splash kernels run on this chip with these shapes."""
    return chip in chips.TPUS and length % 128 == 0 and head_size % 64 == 0


def takes_cudnn(length: int, head_size: int, chip: str, dtype: str) -> bool:
    """Returns whether cuDNN's attention supports this chip, dtype and shapes.

    Whether cuDNN is installed is not checked.
    """
    takes_shape = length % 2 == 0 and head_size % 8 == 0 and head_size <= 128
    return chip in chips.GPUS and dtype == "bfloat16" and takes_shape
