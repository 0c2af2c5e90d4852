"""MoDSE-JAX: mixture-of-experts models whose experts have different widths.

The names below are the public API of the layer alone; it needs no training config:

    from flax import nnx
    from modse_jax import MoELayer, RouterOptions

    layer = MoELayer(64, (300, 100, 200, 200), RouterOptions(top_k=2), rngs=nnx.Rngs(0))
    out = layer(x)  # x: [batch, length, 64]; out.y_BLD, out.balance_loss, out.z_loss

Names are imported when they are first used, so that `import modse_jax` does not import jax.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "MoELayer": "modse_jax.moe.layer",
    "LayerOutput": "modse_jax.moe.layer",
    "RouterOptions": "modse_jax.moe.layer_options",
    "Pool": "modse_jax.moe.layer_options",
    "ExpertOptions": "modse_jax.moe.layer_options",
    "Blocks": "modse_jax.moe.experts.block_sizes",
    "route": "modse_jax.moe.router",
    "RouterWeights": "modse_jax.moe.router",
    "Routing": "modse_jax.moe.router",
    "expert_ffn": "modse_jax.moe.experts.select",
    "ExpertWeights": "modse_jax.moe.experts.expert_weights",
    "Placement": "modse_jax.moe.expert_placement",
    "place_experts": "modse_jax.moe.expert_placement",
    "PAPER_PAIRS": "modse_jax.moe.expert_widths",
    "equal_widths": "modse_jax.moe.expert_widths",
    "widths_from_ratio_pairs": "modse_jax.moe.expert_widths",
    "make_mesh": "modse_jax.runtime.sharding",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modse_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
