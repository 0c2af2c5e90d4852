"""The identity of a run: its config, its data and the code that trains it."""

import hashlib
import json
from typing import Any, NamedTuple

from modse_jax.config.loading import to_saved
from modse_jax.config.options import Config
from modse_jax.runtime import code_revision

ID_BYTES = 8


class RunIdentity(NamedTuple):
    """Two runs with the same identity give the same result.

    Attributes:
        config: the config as the sweep file has it, with the data as it is named there.
        data: fingerprint of the content of all data.
        code: hash of the source code of this package.
    """

    config: Config
    data: str
    code: str

    @property
    def id(self) -> str:
        """Returns a hash of everything, which is the name of the run's directory."""
        return hash_values([to_saved(self.config), self.data, self.code])

    def to_json(self) -> dict[str, Any]:
        """Returns values that JSON can represent."""
        return {
            "id": self.id,
            "config": to_saved(self.config),
            "data": self.data,
            "code": self.code,
            "revision": code_revision.describe_revision(),
        }


def hash_values(values: Any) -> str:
    """Returns a hash of values that JSON can represent, as 16 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).hexdigest()
