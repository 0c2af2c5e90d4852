"""Evaluate a checkpoint of a workdir: held-out loss, routing, samples; into eval/STEP.json and the console."""

import codecs
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

from modse_jax.config.loading import from_saved
from modse_jax.config.options import Config
from modse_jax.data import batching, tokenizers, training_data
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.runtime import files, processes, sharding
from modse_jax.training import metrics, train_step, validation
from modse_jax.training.checkpointing import Checkpoints

SUITES = ("loss", "routing", "sample")


TOKENS_PER_CHUNK = 8  # tokens between two looks at a sample


class LoadedModel(NamedTuple):
    """A trained model and the data it was trained on."""

    config: Config
    data: training_data.TrainingData
    mesh: jax.sharding.Mesh
    step: int
    params: dict


def read_config(workdir: pathlib.Path) -> Config:
    """The config of a workdir, from its config.json: data, never code."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"--workdir={workdir} holds no run (no config.json); train one with train.py"
        )
    try:
        return from_saved(files.read_json(path))
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}") from None


def open_run(workdir: pathlib.Path, step: int, batch_size: int) -> LoadedModel:
    """A checkpoint's parameters. Args: step: 0 for the newest. batch_size: sequences, spread over all devices."""
    mesh = sharding.build_batch_mesh(batch_size)
    config = _avoid_wrong_kernels(read_config(workdir), mesh)
    checkpoints = open_checkpoints(workdir)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh)),
        jax.eval_shape(lambda: train_step.init_state(config)),
    )
    data = processes.on_all_processes(lambda: training_data.load(config, workdir), first_alone=True)
    step = find_valid_step(
        checkpoints,
        workdir,
        step,
        {"data": data.fingerprint, "tokenizer": tokenizers.fingerprint(data.tokenizer)},
    )
    state, reason = checkpoints.restore(step, abstract)
    checkpoints.close()
    if reason:
        raise UserError(f"checkpoint {step} is damaged: {reason}; name another with --step")
    params = state.params
    return LoadedModel(config, data, mesh, step, params)


def _avoid_wrong_kernels(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """Returns the config, with plain XLA for experts and attention if kernels fail their check on a device."""
    try:
        processes.on_all_processes(
            lambda: kernel_selection.check_kernels(kernel_selection.for_evaluation(config), mesh)
        )
    except UserError as error:
        print(
            f"{error}; this evaluation uses moe.backend=blocked and model.attention=blocks",
            file=sys.stderr,
        )
        return dataclasses.replace(
            config,
            moe=dataclasses.replace(config.moe, backend="blocked"),
            model=dataclasses.replace(config.model, attention="blocks"),
        )
    return config


def open_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """To read only. Raises UserError where there is no step."""
    directory = workdir / "checkpoints"
    checkpoints = Checkpoints(directory, read_only=True) if directory.is_dir() else None
    if checkpoints is None or not checkpoints.steps():
        raise UserError(f"{workdir} holds no checkpoint yet")
    return checkpoints


def find_valid_step(checkpoints, workdir, step, facts):
    """That step, or the newest sound one (0). Raises UserError where it is damaged, or of other data."""

    def check(step, meta):
        for name, value in facts.items():
            if meta[name] != value:
                raise UserError(
                    f"checkpoint {step} was trained with other data ({name} {meta[name]!r}), now "
                    f"{value!r}; restore the data it was trained on"
                )

    if not step:
        found = checkpoints.newest(check)
        for number, reason in found.damaged:
            print(
                f"checkpoint {number} is damaged ({reason}); evaluating step {found.step}",
                file=sys.stderr,
            )
        return found.step
    have = checkpoints.steps()
    if step not in have:
        raise UserError(
            f"--step={step} is not saved in {workdir}; saved: {', '.join(map(str, have))}"
        )
    reason = processes.broadcast_from_main(lambda: checkpoints.verify(step))
    if reason:
        raise UserError(f"checkpoint {step} is damaged: {reason}; name another with --step")
    check(step, checkpoints.meta(step))
    return step


def verify(workdir: str) -> tuple[str, bool]:
    """(a line per checkpoint, whether all are sound): every file against its hash."""
    workdir = pathlib.Path(workdir).expanduser().absolute()
    checkpoints = open_checkpoints(workdir)
    reasons = {step: checkpoints.verify(step) for step in checkpoints.steps()}
    lines = [
        f"step {step:8}  {'damaged: ' + reason if reason else 'good'}"
        for step, reason in reasons.items()
    ]
    return "\n".join(lines), not any(reasons.values())


def evaluate(
    workdir: str,
    step: int,
    suites: tuple[str, ...],
    limit: int,
    batch_size: int,
    prompts: tuple[str, ...],
    show: Callable[[str], None] = lambda text: None,
) -> dict:
    """Runs the suites and writes eval/STEP.json, or eval/STEP.firstN.json with a limit.

    Args: step: 0 for the newest. limit: validation records, 0 for all. batch_size: 0 for the config's. prompts: () for
    the config's. show: is told what there is to read, samples word by word as they come.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise UserError(f"--suite={','.join(unknown)} is unknown; suites: {', '.join(SUITES)}")
    workdir = pathlib.Path(workdir).expanduser().absolute()
    batch_size = batch_size or read_config(workdir).evaluation.batch_size
    run = open_run(workdir, step, batch_size)
    result = {"step": run.step, "limit": limit}
    if "loss" in suites or "routing" in suites:
        loss, routing = validate(run, limit, batch_size)
        if "loss" in suites:
            result["loss"] = loss
        if "routing" in suites:
            result["routing"] = {"widths": list(run.config.widths), "layers": routing}
    show(format_results(result) + "\n")
    if "sample" in suites:
        result["samples"] = sample(run, prompts or run.config.evaluation.prompts, show)
    if processes.is_main_process():
        result = write(workdir, run.step, limit, result)
    return result


def results_path(workdir: pathlib.Path, step: int, limit: int) -> pathlib.Path:
    """Where the results of a step are; those of its first `limit` records or documents stand apart."""
    return workdir / "eval" / (f"{step}.first{limit}.json" if limit else f"{step}.json")


def write(workdir: pathlib.Path, step: int, limit: int, result: dict) -> dict:
    """Adds to the results of a step what `result` has of them; returns all."""
    path = results_path(workdir, step, limit)
    path.parent.mkdir(exist_ok=True)
    if path.exists():  # suites run one after the other make one result
        result = {**json.loads(path.read_text()), **result}
    files.write_atomically(path, json.dumps(result, indent=2) + "\n")
    return result


def validate(run: LoadedModel, limit: int, batch_size: int) -> tuple[dict, list[dict]]:
    """Loss over the held-out records, and routing by layer."""
    score = train_step.jitted_score_step(run.config, run.mesh)
    scored = {}
    for dataset in run.data.datasets:
        batches = batching.validation_batches(
            dataset,
            batch_size,
            run.config.model.vocab_size,
            limit,
            sharding.local_rows(run.mesh, batch_size),
        )
        placed = (sharding.shard_batch(run.mesh, batch, batch_size) for batch in batches)
        whole = not limit or limit >= len(dataset.splits["validation"])
        scored[dataset.name] = validation.run(score, run.params, placed, dataset, whole)
    result, statistics = validation.together(scored)
    return result, metrics.routing_by_layer(statistics, run.config.widths)


def sample(
    run: LoadedModel, prompts: tuple[str, ...], show: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """A continuation of each prompt, as the run's evaluation settings say."""
    e, tokenizer = run.config.evaluation, run.data.tokenizer
    room = run.config.model.context_length - e.sample_tokens
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt.encode()).tolist()] for prompt in prompts]
    for prompt, tokens in zip(prompts, ids):
        if len(tokens) > room:
            raise UserError(
                f"prompt {prompt[:40]!r} has {len(tokens)} tokens; with evaluation.sample_tokens="
                f"{e.sample_tokens} the context holds {max(room, 0)}"
            )
    out = []
    for number, prompt in enumerate(prompts):
        show(f"\nsample after {prompt!r}\n" + _indented("\n" + prompt)[1:])
        text = ""
        for piece in _continued(run, ids[number], number):
            show(_indented(piece))
            text += piece
        show("\n")
        out.append({"prompt": prompt, "text": text})
    return out


def _indented(text):
    return text.replace("\n", "\n  | ")


def _continued(run, prompt, number):
    """Pieces of text after a prompt, whole characters."""
    e, tokenizer = run.config.evaluation, run.data.tokenizer
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(run.config))
    params = jax.tree.map(
        lambda a: a.addressable_data(0), run.params
    )  # all of it is on every device
    settings = sampling.Settings(e.temperature, e.top_k, e.top_p)
    key = jax.random.fold_in(jax.random.key(run.config.seed), number)
    pieces = sampling.stream(
        graph,
        params,
        [prompt],
        e.sample_tokens,
        settings,
        key,
        tokenizer.pad_id,
        tokenizer.eos_id,
        TOKENS_PER_CHUNK,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for (tokens,) in pieces:
        yield decoder.decode(tokenizer.decode(tokens))
    yield decoder.decode(b"", final=True)


def format_results(result: dict) -> str:
    """Loss and routing as tables."""
    lines = [f"checkpoint of step {result['step']}"]
    if "loss" in result:
        r = result["loss"]
        part = f" (first {result['limit']} records)" if result["limit"] else ""
        lines += [
            f"  validation{part}: loss {r['loss']:.4f} nats/token, {r['bits_per_byte']:.4f} bits/byte, "
            f"{r['tokens']:,} tokens"
        ]
    if "routing" in result:
        widths = result["routing"]["widths"]
        lines += [
            "",
            "share of tokens per expert, %",
            "  layer  "
            + "".join(f"{w:>7}" for w in widths[:16])
            + "   max/mean  entropy  mean width",
        ]
        for layer in result["routing"]["layers"]:
            counts = layer["tokens_per_expert"]
            lines.append(
                f"  {layer['layer']:5}  "
                + "".join(f"{100 * c / max(sum(counts), 1):7.1f}" for c in counts[:16])
                + f"   {layer['max_over_mean']:8.3f}  {layer['entropy']:7.3f}  "
                + f"{layer['count_weighted_width']:10.1f}"
            )
    return "\n".join(lines)
