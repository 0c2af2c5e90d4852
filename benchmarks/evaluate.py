"""Inference: scoring, prefill and decoding, MoDSE widths beside equal ones in one run (the paper's Table 4 in parts).

    python -m benchmarks.evaluate [--json=FILE] [--model_dim=256] [--model_layers=4] [--repeats=9]

Scoring is a validation step over packed rows, beside the training loss's forward pass on the same rows. Prefill is a
prompt of 256 tokens, decoding 64 more through the key/value cache, for 1 and for 64 prompts. Weights are random, and
their routing nearly even.
"""

import dataclasses
import json

import jax
import numpy as np
from absl import flags

from benchmarks import timing
from modse_jax.config import loading, options
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.moe import expert_widths
from modse_jax.training import train_step

DIM = flags.DEFINE_integer("model_dim", 256, "model width D")


LAYERS = flags.DEFINE_integer("model_layers", 4, "decoder blocks")


PROMPT, NEW, ROWS, LENGTH = 256, 64, 8, 512


BATCHES = (1, 64)


def shapes(dim: int, layers: int) -> dict[str, options.Config]:
    values = loading.default_config()
    values.model.update(
        dim=dim, num_layers=layers, num_heads=dim // 64, context_length=LENGTH, vocab_size=4096
    )
    values.training.batch_size, values.mesh.data, values.moe.width = ROWS, 1, int(2.5 * dim)
    equal = loading.from_dict(values.to_dict())
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    return {
        "modse": dataclasses.replace(equal, moe=dataclasses.replace(equal.moe, widths=widths)),
        "equal": equal,
    }


def jobs(config: options.Config, prompt: int = PROMPT, new: int = NEW, batches=BATCHES) -> dict:
    """{what: (function, arguments)} of one model."""
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    params = jax.jit(lambda: train_step.init_state(config))().params
    rng = np.random.default_rng(0)

    def tokens(rows, length):
        return rng.integers(4, config.model.vocab_size, (rows, length), dtype=np.int32)

    size = config.training.batch_size, config.data.sequence_length + 1
    batch = {"tokens": tokens(*size), "segments": np.ones(size, np.int32)}
    training = train_step.make_loss(config)
    out = {
        "score": (train_step.make_score_step(config), (params, batch)),
        "training forward": (lambda p, b: training(p, b, ROWS * LENGTH)[0], (params, batch)),
    }
    for rows in batches:
        for name, count in (("prefill", 1), ("decode", new + 1)):

            def generate(params, prompts, lengths, key, count=count):
                state = sampling.prefill(graph, params, prompts, lengths, count)
                keys = jax.random.split(key, count)
                return sampling.decode(graph, params, state, keys, sampling.Settings(0.0), 0, -1)

            out[f"{name} {rows}"] = (
                generate,
                (params, tokens(rows, prompt), np.full(rows, prompt, np.int32), jax.random.key(0)),
            )
    return out


def measure(shapes: dict, repeats: int, **sizes) -> list[dict]:
    """A row per model and kind of work: tokens/s; of MoDSE's also the time over equal widths'."""
    compiled = timing.compile_all(
        {
            (name, what): job
            for name, config in shapes.items()
            for what, job in jobs(config, **sizes).items()
        }
    )
    seconds = {k: np.array(v) for k, v in timing.time_interleaved(compiled, repeats).items()}
    prompt, new = sizes.get("prompt", PROMPT), sizes.get("new", NEW)
    rows = []
    for (name, what), taken in seconds.items():
        kind, _, batch = what.partition(" ")
        if kind == "decode":
            taken = taken - seconds[name, f"prefill {batch}"]  # of the tokens after the first
        config = shapes[name]
        count = {"prefill": prompt, "decode": new}.get(
            kind, config.training.batch_size * config.data.sequence_length
        )
        count *= int(batch) if kind in ("prefill", "decode") else 1
        other = seconds["equal", what] - (
            seconds["equal", f"prefill {batch}"] if kind == "decode" else 0
        )
        rows.append(
            {
                "model": name,
                "what": what,
                "tokens_per_second": count / float(np.median(taken)),
                "over_equal_width": timing.median_ratio(taken, other) if name == "modse" else None,
            }
        )
        if what == "score":
            rows[-1]["over_training_forward"] = timing.median_ratio(
                seconds[name, "training forward"], taken
            )
    return rows


def main(_):
    rows = measure(shapes(DIM.value, LAYERS.value), timing.REPEATS.value)
    for row in rows:
        print(json.dumps(row))
    timing.write({"machine": timing.describe_machine(), "rows": rows})


if __name__ == "__main__":
    timing.run(main)
