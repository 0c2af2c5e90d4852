"""Evaluates a checkpoint: validation loss, routing and samples, into a file and to the console."""

import codecs
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from modse_jax.data import batching, prepared_data
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading, result_files, text_table
from modse_jax.evaluation.model_loading import LoadedModel
from modse_jax.evaluation.text_table import Column, format_number
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.runtime import processes, sharding
from modse_jax.training import metrics, train_step, validation

SUITES = ("loss", "routing", "sample")
SINGLE_SUITES = ("analysis", "tasks", "compare", "verify")  # other functions run these
TOKENS_PER_CHUNK = 8  # new tokens between two updates of a sample on the console
SHOWN_EXPERTS = 16  # most columns of experts in the printed table of routing

Show = Callable[[str], None]


class ValidationResult(NamedTuple):
    """Loss and routing on validation records.

    Attributes:
        loss: {"loss", "bits_per_byte", "tokens", ...} of the validation split, as
            `validation.together` returns it. With validation sets also "macro_loss", and the same
            of every set under "sets".
        routing: One dictionary of routing statistics per layer, of the validation split; see
            `metrics.routing_by_layer`.
    """

    loss: dict
    routing: list[dict]


def show_nothing(text: str) -> None:
    """Discards console output; the default for `show` arguments."""


def evaluate(
    workdir: str,
    step: int,
    suites: tuple[str, ...],
    limit: int,
    batch_size: int,
    prompts: tuple[str, ...],
    show: Show = show_nothing,
) -> dict:
    """Evaluates a checkpoint, and writes the results to a file.

    The file is eval/STEP.json in the workdir, or eval/STEP.firstN.json with a limit of N.

    Args:
        workdir: The directory of the run.
        step: A saved step; 0 for the newest.
        suites: What to evaluate, some of SUITES.
        limit: Number of validation records of each dataset; 0 for all.
        batch_size: Sequences per batch; 0 for `evaluation.batch_size` of the config.
        prompts: Prompts of the samples; empty for those of the config.
        show: Called with each piece of console output; samples come a few characters at a time, as
            they are generated.

    Returns:
        The content of the file; on processes other than the main one, only the new results.

    Raises:
        UserError: A suite is unknown, or a prompt does not fit into the context.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise UserError(
            f"--suite={','.join(unknown)} is unknown; suites: {', '.join(SUITES)}, and each alone: "
            f"{', '.join(SINGLE_SUITES)}"
        )
    directory = pathlib.Path(workdir).expanduser().absolute()
    batch_size = batch_size or model_loading.read_config(directory).evaluation.batch_size
    model = model_loading.load_model(directory, step, batch_size)
    results = {"step": model.step, "limit": limit}
    if "loss" in suites or "routing" in suites:
        validated = validate(model, limit, batch_size)
        if "loss" in suites:
            results["loss"] = validated.loss
        if "routing" in suites:
            widths = list(model.config.widths)
            results["routing"] = {"widths": widths, "layers": validated.routing}
    show(format_results(results) + "\n")
    if "sample" in suites:
        results["samples"] = sample(model, prompts or model.config.evaluation.prompts, show)
    if processes.is_main_process():
        results = result_files.add_results(directory, model.step, limit, results)
    return results


def validate(model: LoadedModel, limit: int, batch_size: int) -> ValidationResult:
    """Computes loss and routing on the validation records of the run's datasets.

    Args:
        model: The model.
        limit: Number of records of each dataset, from its first one on; 0 for all.
        batch_size: Sequences per batch.
    """
    score = train_step.jitted_score_step(model.config, model.mesh)

    def score_all(datasets: tuple[prepared_data.Dataset, ...]) -> dict[str, validation.Scored]:
        return {
            dataset.name: _score_dataset(score, model, dataset, limit, batch_size)
            for dataset in datasets
        }

    loss, statistics = validation.together(score_all(model.data.datasets))
    has_capacity = model.config.evaluation.capacity_factor > 0
    loss |= validation.summarize_sets(score_all(model.data.validation_sets), has_capacity)
    if has_capacity:
        loss["dropped"] = metrics.count_dropped(statistics)
    config = model.config
    layers = metrics.routing_by_layer(statistics, config.widths, config.pools)
    return ValidationResult(loss, layers)


def _score_dataset(
    score: train_step.ScoreStep,
    model: LoadedModel,
    dataset: prepared_data.Dataset,
    limit: int,
    batch_size: int,
) -> validation.Scored:
    """Scores the first `limit` validation records of a dataset, or all."""
    batches = read_validation_batches(model, dataset, limit, batch_size)
    is_complete = not limit or limit >= len(dataset.splits["validation"])
    return validation.run(score, model.variables, batches, dataset, is_complete)


def read_validation_batches(
    model: LoadedModel, dataset: prepared_data.Dataset, limit: int, batch_size: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields the validation records of a dataset in batches, sharded over the model's devices.

    See `validate` for `limit` and `batch_size`.
    """
    batches = batching.validation_batches(
        dataset,
        batch_size,
        model.config.model.vocab_size,
        limit,
        sharding.local_rows(model.mesh, batch_size),
    )
    for batch in batches:
        yield sharding.shard_batch(model.mesh, batch, batch_size)


def sample(model: LoadedModel, prompts: tuple[str, ...], show: Show = show_nothing) -> list[dict]:
    """Generates a continuation of each prompt, with the sampling options of the config.

    A continuation is shorter than `evaluation.sample_tokens` if the context holds no more.

    Returns:
        {"prompt": prompt, "text": continuation} for each prompt.

    Raises:
        UserError: A prompt is not UTF-8, or leaves no room for a continuation in the context.
    """
    prompts = tuple(_decode_prompt(prompt) for prompt in prompts)
    encoded = [_encode_prompt(model, prompt) for prompt in prompts]
    samples = []
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded)):
        show(f"\nsample after {prompt!r}\n" + _indent("\n" + prompt)[1:])
        text = ""
        for piece in _generate(model, tokens, number):
            show(_indent(piece))
            text += piece
        show("\n")
        samples.append({"prompt": prompt, "text": text})
    return samples


def _decode_prompt(prompt: str) -> str:
    """Returns a prompt of the command line as the UTF-8 text that its bytes are.

    Python reads bytes that it cannot decode as surrogates: all but ASCII with `LC_ALL=C`, and
    otherwise those that are not UTF-8.
    """
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(f"prompt {prompt[:40]!r} is not UTF-8; convert it") from None


def _encode_prompt(model: LoadedModel, prompt: str) -> list[int]:
    max_tokens = model.config.model.context_length - 1
    tokenizer = model.data.tokenizer
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt.encode()).tolist()]
    if len(tokens) > max_tokens:
        raise UserError(
            f"prompt {prompt[:40]!r} has {len(tokens)} tokens; the context holds {max_tokens} and "
            f"one more to generate (model.context_length={model.config.model.context_length}); "
            "give a shorter prompt"
        )
    return tokens


def _indent(text: str) -> str:
    return text.replace("\n", "\n  | ")


def _generate(model: LoadedModel, prompt: list[int], number: int) -> Iterator[str]:
    """Yields the generated text after a prompt, a few complete characters at a time.

    `number` is the index of the prompt, from which its random key is derived.
    """
    options = model.config.evaluation
    tokenizer = model.data.tokenizer
    graph, _ = transformer.build_abstract_model(kernel_selection.for_generation(model.config))
    # Samples are generated on one device. It holds all arrays, because they are replicated.
    variables = jax.tree.map(lambda array: array.addressable_data(0), model.variables)
    pieces = sampling.stream(
        graph,
        variables,
        [prompt],
        min(options.sample_tokens, model.config.model.context_length - len(prompt)),
        sampling.Settings(options.temperature, options.top_k, options.top_p),
        jax.random.fold_in(jax.random.key(model.config.seed), number),
        tokenizer.pad_id,
        tokenizer.eos_id,
        TOKENS_PER_CHUNK,
    )
    # A character may be split between two pieces; the decoder waits for the rest of its bytes.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for (tokens,) in pieces:
        yield decoder.decode(tokenizer.decode(tokens))
    yield decoder.decode(b"", final=True)


def format_results(results: dict) -> str:
    """Returns the loss and the routing of a result file as text for the console and the report."""
    lines = [f"checkpoint of step {results['step']}"]
    if "loss" in results:
        loss = results["loss"]
        part = f" (first {results['limit']} records)" if results["limit"] else ""
        lines.append(
            f"  validation{part}: loss {format_number(loss['loss'], '.4f')} nats/token, "
            f"{format_number(loss['bits_per_byte'], '.4f')} bits/byte, {loss['tokens']:,} tokens"
            + (f", {loss['dropped']:,} dropped" if "dropped" in loss else "")
        )
        if "sets" in loss:
            lines += ["", f"validation sets{part}", _format_sets(loss)]
    if "routing" in results:
        lines += ["", _format_routing(results["routing"])]
    return "\n".join(lines)


def _format_sets(loss: dict) -> str:
    """Returns a table with a row per validation set, and the macro-average below them."""
    name_width = max(map(len, ("macro-average", *loss["sets"])))
    columns = [
        Column(name_width, "left", gap=2),
        Column(11, gap=2),
        Column(9, gap=2),
        Column(12, gap=2),
    ]
    rows = [["set", "nats/token", "bits/byte", "tokens"]]
    for name, result in loss["sets"].items():
        rows.append(
            [
                name,
                format_number(result["loss"], ".4f"),
                format_number(result["bits_per_byte"], ".4f"),
                f"{result['tokens']:,}",
            ]
        )
    rows.append(["macro-average", format_number(loss["macro_loss"], ".4f")])
    return text_table.text_table(columns, rows)


def _format_routing(routing: dict) -> str:
    """Returns the table of the share of tokens per expert: a row per layer, a column per expert.

    Only the first SHOWN_EXPERTS experts have a column. Further columns are statistics of the layer.
    A dense model has no table.
    """
    if not routing["widths"]:
        return "no routing: the model is dense"
    widths = routing["widths"][:SHOWN_EXPERTS]
    experts = [Column(7, gap=2)] + [Column(7, gap=0)] * (len(widths) - 1)
    columns = [Column(5, gap=2), *experts, Column(8, gap=3), Column(7, gap=2), Column(10, gap=2)]
    rows = [["layer", *map(str, widths), "max/mean", "entropy", "mean width"]]
    for layer in routing["layers"]:
        counts = layer["tokens_per_expert"]
        total = max(sum(counts), 1)
        rows.append(
            [
                str(layer["layer"]),
                *(f"{100 * count / total:.1f}" for count in counts[:SHOWN_EXPERTS]),
                format_number(layer["max_over_mean"], ".3f"),
                format_number(layer["entropy"], ".3f"),
                format_number(layer["count_weighted_width"], ".1f"),
            ]
        )
    return "share of tokens per expert, %\n" + text_table.text_table(columns, rows)
