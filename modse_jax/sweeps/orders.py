"""The messages between a runner and its worker: orders, and replies to them, one per line."""

import json
from typing import NamedTuple

from modse_jax.config.loading import from_saved, to_saved
from modse_jax.config.options import Config
from modse_jax.sweeps.identity import RunIdentity
from modse_jax.sweeps.results import SweepDirectory

# Kinds of replies.
ENDED = "ended"  # the run has a result
BUSY = "busy"  # another process trains it
STOPPED = "stopped"  # by a signal; the run can resume
DISK_FULL = "disk full"


class Order(NamedTuple):
    """An order to train a run.

    Attributes:
        directory: the sweep.
        identity: the run.
        config: the config to train with, which names the prepared data.
    """

    directory: SweepDirectory
    identity: RunIdentity
    config: Config


class Reply(NamedTuple):
    """The reply to an order: its kind, and what to tell the user about it."""

    kind: str
    text: str


def encode_order(order: Order) -> str:
    """Returns an order as a line."""
    identity = order.identity
    values = {
        "workdir": str(order.directory.root),
        "identity": [to_saved(identity.config), identity.data, identity.code],
        "config": to_saved(order.config),
    }
    return json.dumps(values) + "\n"


def decode_order(line: str) -> Order:
    """Returns the order of a line."""
    values = json.loads(line)
    config, data, code = values["identity"]
    return Order(
        SweepDirectory(values["workdir"]),
        RunIdentity(from_saved(config), data, code),
        from_saved(values["config"]),
    )


def encode_reply(reply: Reply) -> str:
    """Returns a reply as a line."""
    return json.dumps(reply) + "\n"


def decode_reply(line: str | bytes) -> Reply:
    """Returns the reply of a line."""
    return Reply(*json.loads(line))
