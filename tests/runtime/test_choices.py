"""An unknown choice of an option raises everywhere, and the message lists the known ones."""

import jax.numpy as jnp
import pytest

from modse_jax.data import packing
from modse_jax.errors import describe_exception
from modse_jax.model import rematerialization
from modse_jax.moe import balancing, chosen_experts, dispatch, expert_placement, gates, router
from modse_jax.moe.experts import select
from modse_jax.moe.layer_options import Pool
from modse_jax.runtime import choices
from modse_jax.training import loss_free_balancing, optimizer

LOGITS = jnp.zeros((4, 3))
IDS = jnp.zeros((4, 1), jnp.int32)
COUNTS = jnp.ones((1, 3), jnp.int32)
LOADS = (COUNTS, jnp.ones(3), jnp.int32(3))
PLACEMENT = expert_placement.place_experts((4, 4), 1, "whole")

# Functions that take a choice, by the name of the option in the message.
FUNCTIONS = {
    "gate of compute_gates": lambda c: router.compute_gates(LOGITS, 1, c, "cpu"),
    "gate of compute_scores": lambda c: gates.compute_scores(LOGITS, c),
    "gate of log_probabilities": lambda c: gates.log_probabilities(LOGITS, c),
    "count": lambda c: balancing.balance_loss(*LOADS, c),
    "over_choices": lambda c: balancing.balance_loss(*LOADS, "top_k", c),
    "scale": lambda c: balancing.width_penalty(*LOADS, (1, 2, 3), c),
    "order": lambda c: dispatch.plan_dispatch(
        IDS, jnp.ones(4, bool), 3, "cpu", dispatch.Capacity(jnp.ones(1, jnp.int32), c)
    ),
    "form of select": lambda c: chosen_experts.select(LOGITS, IDS, c),
    "form of place": lambda c: chosen_experts.place(jnp.zeros((4, 1)), IDS, 3, c),
    "form of count": lambda c: chosen_experts.count(IDS, 3, c),
    "backend": lambda c: select.select_backend(c, PLACEMENT, (8, 4), "cpu", "float32"),
    "rule": lambda c: loss_free_balancing.update_bias(
        jnp.zeros((1, 3)), COUNTS, (Pool(3, 1),), c, 0.1, False
    ),
    "model.remat": lambda c: rematerialization.checkpoint_policy(c, None),
    "packing": lambda c: packing.make_packer(c, 8, 0),
    "optimizer.weight_decay_on": lambda c: optimizer.weight_decay_mask({}, c),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_choices_raise(function):
    name = function.partition(" ")[0]
    with pytest.raises(ValueError, match=f"{name}='sigmod' is unknown; choose one of "):
        FUNCTIONS[function]("sigmod")


def test_known_choices_are_looked_up():
    assert choices.look_up({"a": 1, "b": 2}, "name", "b") == 2


@pytest.mark.parametrize(
    "error, text",
    [
        (KeyError("moe.gate"), "the key moe.gate is missing"),
        (KeyError("there is no field 'gat'"), "there is no field 'gat'"),
        (KeyError(3), "the key 3 is missing"),
        (KeyError(), "KeyError"),
        (ValueError("two words"), "two words"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_exceptions_are_described_without_a_repr(error, text):
    assert describe_exception(error) == text
