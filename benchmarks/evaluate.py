"""Inference speed: scoring, prefill and decoding, with MoDSE widths and with equal widths.

    python -m benchmarks.evaluate [--json=FILE] [--model_dim=256] [--model_layers=4] [--repeats=9]

The two kinds of models are timed side by side, as in parts of the paper's Table 4. Scoring is a
validation step over packed rows, timed beside the forward pass of training on the same rows.
Prefill processes prompts of 256 tokens; decoding generates 64 more with the key/value cache, for 1
and for 64 prompts. Weights are random, so their routing is nearly balanced.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import timing
from modse_jax.config import loading, options
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.model.variables import Variables
from modse_jax.moe import expert_widths
from modse_jax.training import train_step

DIM = flags.DEFINE_integer("model_dim", 256, "model width D")
LAYERS = flags.DEFINE_integer("model_layers", 4, "decoder blocks")

PROMPT_TOKENS = 256
NEW_TOKENS = 64
ROWS = 8  # of a batch that is scored
CONTEXT_LENGTH = 512
BATCH_SIZES = (1, 64)  # prompts

Job = tuple[Callable, tuple]  # a function and its arguments


def shapes(dim: int, layers: int) -> dict[str, options.Config]:
    """Returns the configs of the models: "modse" and "equal", with equally many parameters."""
    values = loading.default_config()
    values.model.update(
        dim=dim,
        num_layers=layers,
        num_heads=dim // 64,
        context_length=CONTEXT_LENGTH,
        vocab_size=4096,
    )
    values.training.batch_size = ROWS
    values.mesh.data = 1
    values.moe.width = int(2.5 * dim)
    equal = loading.from_dict(values.to_dict())
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    modse = dataclasses.replace(equal, moe=dataclasses.replace(equal.moe, widths=widths))
    return {"modse": modse, "equal": equal}


def jobs(
    config: options.Config,
    prompt: int = PROMPT_TOKENS,
    new: int = NEW_TOKENS,
    batches: Sequence[int] = BATCH_SIZES,
) -> dict[str, Job]:
    """Returns the jobs of one model by name, for example "score" or "decode 64"."""
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    variables = jax.jit(lambda: train_step.init_state(config))().variables
    rng = np.random.default_rng(0)
    rows = config.training.batch_size
    record_length = config.data.sequence_length + 1
    batch = {
        "tokens": _random_tokens(rng, config, rows, record_length),
        "segments": np.ones((rows, record_length), np.int32),
    }
    loss = train_step.make_loss(config)
    num_tokens = jnp.float32(ROWS * CONTEXT_LENGTH)
    totals = train_step.BatchTotals(targets=num_tokens, routed=num_tokens)
    named = {
        "score": (train_step.make_score_step(config), (variables, batch)),
        "training forward": (
            lambda variables, batch: loss(*variables, batch, totals)[0],
            (variables, batch),
        ),
    }
    for size in batches:
        # "decode" includes the prefill, whose time is subtracted later.
        for name, count in (("prefill", 1), ("decode", new + 1)):
            prompts = _random_tokens(rng, config, size, prompt)
            lengths = np.full(size, prompt, np.int32)
            arguments = (variables, prompts, lengths, jax.random.key(0))
            named[f"{name} {size}"] = (_make_generate(graph, count), arguments)
    return named


def _random_tokens(
    rng: np.random.Generator, config: options.Config, rows: int, length: int
) -> np.ndarray:
    return rng.integers(4, config.model.vocab_size, (rows, length), dtype=np.int32)


def _make_generate(graph: nnx.GraphDef, count: int) -> Callable:
    """Returns a function that generates `count` tokens after each prompt."""

    def generate(
        variables: Variables, prompts: jax.Array, lengths: jax.Array, key: jax.Array
    ) -> Any:
        state = sampling.prefill(graph, variables, prompts, lengths, count)
        keys = jax.random.split(key, count)
        return sampling.decode(graph, variables, state, keys, sampling.Settings(0.0), 0, -1)

    return generate


def measure(shapes: dict[str, options.Config], repeats: int, **sizes: Any) -> list[dict]:
    """Times all jobs of all models, interleaved.

    Args:
        shapes: The config of each model; one of them must be "equal".
        repeats: Timed repeats of each job.
        **sizes: Arguments of `jobs`.

    Returns:
        A row per model and job with tokens/s, and for "modse" its time over that of "equal".
    """
    cases = {}
    for name, config in shapes.items():
        for what, job in jobs(config, **sizes).items():
            cases[name, what] = job
    compiled = timing.compile_all(cases)
    seconds = {
        case: np.array(taken) for case, taken in timing.time_interleaved(compiled, repeats).items()
    }
    prompt = sizes.get("prompt", PROMPT_TOKENS)
    new = sizes.get("new", NEW_TOKENS)
    rows = []
    for name, what in seconds:
        taken = _net_seconds(seconds, name, what)
        ratio = None
        if name == "modse":
            ratio = timing.median_ratio(taken, _net_seconds(seconds, "equal", what))
        num_tokens = _count_tokens(shapes[name], what, prompt, new)
        row = {
            "model": name,
            "what": what,
            "tokens_per_second": num_tokens / float(np.median(taken)),
            "over_equal_width": ratio,
        }
        if what == "score":
            forward = seconds[name, "training forward"]
            row["over_training_forward"] = timing.median_ratio(forward, taken)
        rows.append(row)
    return rows


def _net_seconds(seconds: dict[tuple[str, str], np.ndarray], name: str, what: str) -> np.ndarray:
    """Returns the seconds of a job. Those of decoding are without the prefill."""
    kind, _, batch_size = what.partition(" ")
    if kind == "decode":
        return seconds[name, what] - seconds[name, f"prefill {batch_size}"]
    return seconds[name, what]


def _count_tokens(config: options.Config, what: str, prompt: int, new: int) -> int:
    """Returns the tokens that a job processes."""
    kind, _, batch_size = what.partition(" ")
    if kind == "prefill":
        return prompt * int(batch_size)
    if kind == "decode":
        return new * int(batch_size)
    return config.training.batch_size * config.data.sequence_length


def main(_: list[str]) -> None:
    """Prints a row per model and job, and writes them to --json."""
    rows = measure(shapes(DIM.value, LAYERS.value), timing.REPEATS.value)
    for row in rows:
        print(json.dumps(row))
    timing.write({"machine": timing.describe_machine(), "rows": rows})


if __name__ == "__main__":
    timing.run(main)
