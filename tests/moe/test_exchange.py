"""All-to-all of routed tokens: rows arrive in order, come back, and their sizes agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from modse_jax.errors import UserError
from modse_jax.moe import exchange
from tests.helpers.configs import tiny_config

N, S, R = 4, 3, 10  # shards, slots, rows of a device


RNG = np.random.default_rng(0)


ROUTINGS = {  # rows of every device for every slot of every shard
    "random": RNG.multinomial(R, np.ones(N * S) / N / S, size=N).reshape(N, N, S),
    "all to one slot": np.eye(N * S, dtype=int)[[7] * N].reshape(N, N, S) * R,
    "no rows": np.zeros((N, N, S), int),
    "one device sends, not all its rows": np.concatenate(
        (RNG.multinomial(R - 3, np.ones(N * S) / N / S, size=1), np.zeros((N - 1, N * S), int))
    ).reshape(N, N, S),
}


def on_shards(f, *arrays):
    mesh = Mesh(np.array(jax.devices()[:N]), "x")
    return jax.jit(
        jax.shard_map(
            f, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
        )
    )(*arrays)


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_arrive_sorted_by_slot_and_source_and_come_back(name):
    counts = ROUTINGS[name]
    x = np.arange(1.0, N * R + 1, dtype=np.float32).reshape(N, R)
    sent = np.arange(R)[None] < counts.sum(axis=(1, 2))[:, None]

    def there_and_back(x_R1, rows_nS):
        there, back, rows_S = exchange.plan_sends(rows_nS[0], "x")
        arrived = exchange.send(x_R1[0], there, back, N * R, "x", False)
        returned = exchange.send(arrived, back, there, R, "x", False)
        agreed = there.recv_sizes == jax.lax.all_to_all(there.send_sizes, "x", 0, 0, tiled=True)
        agreed &= back.recv_sizes == jax.lax.all_to_all(back.send_sizes, "x", 0, 0, tiled=True)
        return arrived[None], returned[None], rows_S[None], agreed[None]

    arrived, returned, rows, agreed = on_shards(
        there_and_back, jnp.asarray(x)[:, :, None], jnp.asarray(counts)
    )
    assert agreed.all()
    np.testing.assert_array_equal(rows, counts.sum(axis=0))
    np.testing.assert_array_equal(returned[:, :, 0], np.where(sent, x, 0))
    starts = np.cumsum(counts.reshape(N, -1), axis=1).reshape(counts.shape) - counts
    for shard in range(N):
        want = [
            x[source, starts[source, shard, slot] + i]
            for slot in range(S)
            for source in range(N)
            for i in range(counts[source, shard, slot])
        ]
        np.testing.assert_array_equal(arrived[shard, :, 0], want + [0] * (N * R - len(want)))


def test_gradients_are_sent_back_to_their_source():
    """They equal the gradients that JAX derives from the reference exchange."""
    counts = jnp.asarray(ROUTINGS["random"])
    x, dy = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((N, R, 2), (N, N * R, 2)))
    )

    def gradient(x_R1, dy, rows_nS, plain):
        there, back, _ = exchange.plan_sends(rows_nS[0], "x")
        function = (
            functools.partial(exchange.send_by_all_gather, rows=N * R, plan=there, axis="x")
            if plain
            else lambda x: exchange.send(x, there, back, N * R, "x", False)
        )
        return jax.vjp(function, x_R1[0])[1](dy[0])[0][None]

    ours, plain = (
        on_shards(functools.partial(gradient, plain=p), x, dy, counts) for p in (False, True)
    )
    np.testing.assert_allclose(ours, plain, atol=1e-6)
    assert np.abs(ours).min() > 0


def test_all_to_all_requires_complete_experts_without_capacity():
    for changes in (dict(placement="split"), dict(capacity_factor=1.0)):
        with pytest.raises(UserError, match="moe.exchange=all_to_all needs whole experts"):
            tiny_config(moe=dict(exchange="all_to_all", **changes))
