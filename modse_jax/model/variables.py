"""The arrays that a model computes with.

Legend: L layers, E experts.
"""

from typing import Any, NamedTuple

import jax

Params = dict[str, Any]  # nested, with arrays as leaves
RouterBias = dict[str, Any]  # {} or {"blocks": {"moe": {"router_bias": float32 [layers, E]}}}


class Variables(NamedTuple):
    """The parameters of a model, and what it needs beside them.

    Attributes:
        params: The parameters, which the optimizer updates.
        router_bias: The bias of loss-free balancing, by which experts are chosen; {} if the model
            was trained without `moe.bias_rule`. It has the nesting of the parameters.
    """

    params: Params
    router_bias: RouterBias

    @property
    def router_bias_LE(self) -> jax.Array | None:
        """The bias of every expert in every layer; None without a bias rule."""
        return router_bias_array(self.router_bias)


def router_bias_array(router_bias: RouterBias) -> jax.Array | None:
    """Returns the array [layers, E] that the nested dict of a router bias holds; None for {}."""
    return router_bias["blocks"]["moe"]["router_bias"] if router_bias else None


def nest_router_bias(router_bias_LE: jax.Array) -> RouterBias:
    """Returns the nested dict, like that of the parameters, that holds a bias [layers, E]."""
    return {"blocks": {"moe": {"router_bias": router_bias_LE}}}
