"""The forms of a block: every kind of feed-forward part, with both positions of the norms."""

from modse_jax.config.options import Config
from tests.helpers.configs import tiny_config

KINDS = {
    "moe": {},
    "in_layer": dict(moe=dict(shared_width=10, shared_placement="in_layer")),
    "parallel": dict(moe=dict(shared_width=10, shared_placement="parallel")),
    "dense": dict(model=dict(dense_width=24)),
}
NORM_POSITIONS = ("pre", "post")
FORMS = [(kind, position) for kind in KINDS for position in NORM_POSITIONS]


def config_of(kind: str, norm_position: str, **sections) -> Config:
    """Returns the tiny config of a form. QK-norm comes with post-norms, as in OLMo 2."""
    qk_norm = "full" if norm_position == "post" else "none"
    model = dict(norm_position=norm_position, qk_norm=qk_norm)
    model |= KINDS[kind].get("model", {}) | sections.pop("model", {})
    moe = KINDS[kind].get("moe", {}) | sections.pop("moe", {})
    return tiny_config(model=model, moe=moe, **sections)
