"""Every option of a run, once: type, default, allowed values, one line of help.

A config file builds a ConfigDict with `default_config()` and overrides a few values; `from_dict` turns it (or a
workdir's config.json) into the frozen, checked `Config` that the rest of the code reads. Values 0 and "" mean "off",
because a flag cannot override None. `python -m modse_jax.config` prints the table of the README.
"""
import dataclasses
import difflib
import math
import sys
import typing

import ml_collections

from modse_jax.moe import sizing

BACKENDS = ("auto", "reference", "blocked", "pallas_tpu", "pallas_gpu", "pallas_triton")
ANYWHERE = ("auto", "reference", "blocked")    # backends that need no particular device
GATES = ("top_k_softmax", "softmax_top_k", "softmax_top_k_renormalised")
GATE_TERMS = ("none", "learned")
DTYPES = ("float32", "bfloat16")
PACKINGS = ("concat", "best_fit")
UNDECODABLE = ("skip", "replace", "fail")

# Values that options no longer have: (option, old value) -> the value that replaces it. Old config files, flags and
# workdirs stay readable; `from_dict` replaces the value and says so.
RENAMED_VALUES = {
    ("moe.backend", "virtual"): "auto",    # ran lax.ragged_dot, whose weight gradient no jax before 0.12 fuses on GPU
}

# What a resumed run may change. Of these only training.steps touches training, by the length of the cosine.
RESUMABLE = ("training.steps", "training.log_every", "training.eval_every", "training.checkpoint_every",
             "training.max_nonfinite_steps", "training.rewind", "training.replay_check", "training.hang_minutes",
             "checkpoint.keep", "checkpoint.keep_every", "evaluation.batch_size", "evaluation.sample_tokens",
             "evaluation.prompts", "evaluation.temperature", "evaluation.top_k", "evaluation.top_p")
# And this, which changes the order of sums, unless a capacity or a balance loss holds for part of the devices.
RESUMABLE_ANY_MESH = ("mesh.data", "mesh.fsdp", "mesh.expert", "moe.placement", "moe.exchange")


class UserError(Exception):
    """What the user can mend: shown as one line, exit code 2, nothing written."""


class RunError(Exception):
    """What stops a run that had begun: shown as one line, exit code 1. What was saved before is sound."""


def option(default, help, *, minimum=None, above=None, below=None, choices=None):
    limits = dict(help=help, minimum=minimum, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Model:
    dim: int = option(256, "model width D", minimum=2)
    num_layers: int = option(4, "decoder blocks, each with an MoE layer", minimum=1)
    num_heads: int = option(4, "attention heads; dim must divide by it", minimum=1)
    num_kv_heads: int = option(0, "key/value heads; 0 = num_heads (multi-head attention)", minimum=0)
    context_length: int = option(512, "longest sequence, in tokens", minimum=2)
    vocab_size: int = option(4096, "rows of the embedding; at least the tokenizer's", minimum=4)
    rope_base: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm", above=0)
    tie_embeddings: bool = option(False, "one matrix for input and output embedding")
    dtype: str = option("float32", "compute type; parameters, router, softmax and loss stay float32", choices=DTYPES)
    attention: str = option("auto", "over packed rows: XLA, in blocks of queries; JAX's splash kernels; or cuDNN's; "
                            "auto = splash on TPU and cudnn on GPU, where they run, else blocks",
                            choices=("auto", "blocks", "splash", "cudnn"))
    unroll: int = option(0, "blocks per turn of the loop over blocks. In a turn, what is kept for the backward pass is "
                         "not copied; many take long to compile. 0 = on CPU all, up to 4, where nothing is "
                         "recomputed; else 1", minimum=0)
    remat: str = option("none", "what the backward pass recomputes: nothing; every block but its routing; or that, but "
                        "for products", choices=("none", "full", "save_routing_and_dots"))


@dataclasses.dataclass(frozen=True)
class MoE:
    num_experts: int = option(8, "experts per layer, E", minimum=1)
    top_k: int = option(2, "experts per token, K", minimum=1)
    width: int = option(640, "hidden width h of an expert when `widths` is empty; half of a pair's sum", minimum=1)
    widths: tuple[int, ...] = option((), "hidden width of each expert, pair by pair; () = num_experts of `width`")
    pairs: bool = option(False, "require that widths[2j] + widths[2j+1] = 2 * width (paper, Eq. 7-8)")
    gate: str = option("top_k_softmax", "softmax over the kept logits (paper), or over all and then top-k",
                       choices=GATES)
    gate_term: str = option("none", "learned: add RMSNorm(Softplus(x W_n)) to the logits (paper, Eq. 3)",
                            choices=GATE_TERMS)
    balance_loss_weight: float = option(0.01, "weight of N * sum f_i P_i, summed over layers (paper, Eq. 9)",
                                        minimum=0)
    balance_loss_count: str = option("top_k", "what f_i counts: all K choices, or the first (paper, Eq. 10)",
                                     choices=("top_k", "argmax"))
    balance_loss_scope: str = option("batch", "tokens that f_i and P_i are of: a whole micro-batch, or a device's (and "
                                     "the loss the mean over devices, by tokens)", choices=("batch", "device"))
    z_loss_weight: float = option(0.0, "weight of mean(logsumexp(router logits)^2), summed over layers", minimum=0)
    capacity_factor: float = option(0.0, "an expert's rows over its even share, per group of devices that share "
                                    "experts; 0 = dropless", minimum=0)
    backend: str = option("auto", "implementation of the expert FFN; auto = pallas_tpu on TPUs, pallas_triton on A100, "
                          "H100, H200 and B200 in bfloat16, if they take model.dim, else blocked. Kernels pad widths "
                          "to their tiles and report the waste", choices=BACKENDS)
    placement: str = option("pairs", "a device of mesh.expert has whole experts of equal total width (the paper's "
                            "pairs), or a share of every expert's columns", choices=("pairs", "columns"))
    exchange: str = option("auto", "how rows reach experts of other devices: all tokens gathered, or each row sent; "
                           "auto = what sends less, of what runs there",
                           choices=("auto", "gather", "all_to_all"))
    block_rows: int = option(1024, "blocked: rows of a block at most, but for an expert with up to half more, which is "
                             "one block", minimum=1)
    tail_rows: int = option(64, "blocked: no block has fewer rows, if experts have as many on average", minimum=1)
    saved_activations: float = option(1.25, "blocked: hidden activations kept for the backward pass, over those "
                                      "of evenly spread rows, at most 2^31 numbers a layer; the rest is recomputed",
                                      minimum=0)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = option(-1, "devices that share a batch and copy parameters; -1 = the rest", minimum=-1)
    fsdp: int = option(1, "devices that share a batch and the parameters; -1 = the rest", minimum=-1)
    expert: int = option(1, "devices that share a batch and the experts; -1 = the rest", minimum=-1)


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = option("python_stdlib", "text:PATH, jsonl:PATH, parquet:PATH, tfds:NAME, python_stdlib, or "
                         "prepared:DIR")
    validation_source: str = option("", "held-out documents; \"\": a part of the source's")
    mixture: tuple[tuple[str, float], ...] = option((), "instead of a source: ((\"DIR\", weight), ...) of prepared "
                                                    "data")
    field: str = option("text", "jsonl field, parquet column or tfds feature that holds the text")
    tokenizer: str = option("bytes", "bytes, sentencepiece:FILE, hf:FILE, or sentencepiece (trained on the source)")
    sequence_length: int = option(512, "predicted tokens per record", minimum=2)
    validation_fraction: float = option(0.02, "share of documents held out, by a hash of their path, or of their text "
                                        "where many share a file", above=0, below=1)
    packing: str = option("concat", "documents end to end and cut, or whole where they fit and padded",
                          choices=PACKINGS)
    drop_duplicates: bool = option(False, "of documents that are exact copies, use the first alone")
    undecodable: str = option("skip", "documents that are not UTF-8", choices=UNDECODABLE)


@dataclasses.dataclass(frozen=True)
class Training:
    batch_size: int = option(16, "sequences per step, over all devices", minimum=1)
    gradient_accumulation: int = option(1, "micro-batches per step", minimum=1)
    steps: int = option(1000, "optimiser steps", minimum=1)
    log_every: int = option(20, "steps between metrics", minimum=1)
    eval_every: int = option(0, "steps between validations; 0 = only after the last", minimum=0)
    checkpoint_every: int = option(200, "steps between checkpoints (the last step is always saved)", minimum=1)
    seed: int = option(0, "order of the data", minimum=0)
    max_nonfinite_steps: int = option(10, "non-finite steps in a row before the run stops with exit code 3",
                                      minimum=1)
    spike_factor: float = option(0.0, "a step whose gradient norm is this many times the running median changes "
                                 "nothing; 0 = off", minimum=0)
    spike_window: int = option(128, "steps of that median; a quarter of them must have passed", minimum=4)
    rewind: tuple[int, ...] = option((), "(step, batches): go back to that checkpoint, once, and skip as many batches "
                                     "of data")
    replay_check: int = option(0, "every so many steps, run a step twice and compare bits; 0 = off", minimum=0)
    hang_minutes: float = option(60.0, "without a step for so long, print every thread's stack and end with exit code "
                                 "1; 0 = off", minimum=0)
    deterministic: bool = option(True, "on GPU, ask XLA for deterministic operations")
    loss_chunk: int = option(2048, "tokens whose logits a device holds at a time", minimum=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    keep: int = option(3, "newest steps kept, besides the best by validation loss", minimum=2)
    keep_every: int = option(0, "every so many steps, a checkpoint is kept for good; 0 = none", minimum=0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", above=0)
    initial_learning_rate: float = option(2e-7, "learning rate of step 0", minimum=0)
    final_learning_rate: float = option(3e-5, "floor of the cosine", minimum=0)
    warmup_steps: int = option(100, "steps of linear warm-up", minimum=0)
    beta1: float = option(0.9, "decay of the first moment", minimum=0, below=1)
    beta2: float = option(0.95, "decay of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(0.1, "decoupled decay, on matrices only", minimum=0)
    grad_clip: float = option(1.0, "largest global norm of the gradient", above=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    batch_size: int = option(16, "sequences per validation batch", minimum=1)
    sample_tokens: int = option(96, "tokens generated per sample", minimum=1)
    prompts: tuple[str, ...] = option(("def ", "import ", "class "), "prompts of the sample suite")
    temperature: float = option(0.8, "sampling temperature; 0 = greedy", minimum=0)
    top_k: int = option(0, "sample from the k likeliest tokens; 0 = all", minimum=0)
    top_p: float = option(0.95, "sample from the smallest set of this probability", above=0)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = option(0, "initial parameters, and samples", minimum=0)
    model: Model = Model()
    moe: MoE = MoE()
    mesh: Mesh = Mesh()
    data: Data = Data()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self):
        for check in (_check_fields, _check_model, _check_moe, _check_data, _check_training):
            check(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden width of every expert of a layer."""
        return self.moe.widths or sizing.equal_widths(self.moe.num_experts, self.moe.width)


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict: the start of every file in configs/."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: dict) -> Config:
    """A checked Config from nested plain values (a ConfigDict's to_dict(), or config.json). Raises UserError.

    A value in RENAMED_VALUES is replaced by its new one, with one line on stderr per process.
    """
    return _build(Config, values, "")


def to_flat_dict(config: Config) -> dict:
    """{"section.field": value}: for diffs between two configs."""
    return {path: _get(config, path) for path, _ in fields()}


def differences(old: Config, new: Config) -> list[str]:
    """Lines `name: old -> new` for every value that differs."""
    new_values = to_flat_dict(new)
    return [f"{path}: {value!r} -> {new_values[path]!r}" for path, value in to_flat_dict(old).items()
            if value != new_values[path]]


def fields() -> list[tuple[str, dataclasses.Field]]:
    """("section.field", dataclass field) of every option."""
    out = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            out += [(f"{field.name}.{f.name}", f) for f in dataclasses.fields(field.type)]
        else:
            out.append((field.name, field))
    return out


def _get(config, path):
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _build(cls, values, prefix):
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"unknown option {prefix}{name}; {hint}")
    missing = [prefix + name for name in known if name not in values]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}")
    return cls(**{name: _cast(known[name], value, prefix + name) for name, value in values.items()})


_reported = set()    # keys of RENAMED_VALUES that this process has printed a line about


def _renamed(value, path):
    """The value that replaces `value` of an option, where it is an old one."""
    key = path, value
    if not isinstance(value, str) or key not in RENAMED_VALUES:
        return value
    if key not in _reported:
        _reported.add(key)
        print(f"{path}={value} no longer exists; {path}={RENAMED_VALUES[key]} is used instead", file=sys.stderr)
    return RENAMED_VALUES[key]


def _cast(field, value, path):
    if dataclasses.is_dataclass(field.type):
        return _build(field.type, value, path + ".")
    if typing.get_origin(field.type) is tuple:
        item = typing.get_args(field.type)[0]
        if typing.get_origin(item) is tuple:    # data.mixture
            if not isinstance(value, (tuple, list)) or not all(isinstance(v, (tuple, list)) and len(v) == 2 and _is(
                    v[0], str) and (_is(v[1], float) or _is(v[1], int)) for v in value):
                raise UserError(f'{path}={value!r} must be (("DIR", weight), ...)')
            return tuple((name, float(weight)) for name, weight in value)
        if not isinstance(value, (tuple, list)) or not all(_is(v, item) for v in value):
            raise UserError(f"{path}={value!r} must be a tuple of {item.__name__}")
        return tuple(value)
    if field.type is float and _is(value, int):
        return float(value)
    if not _is(value, field.type):
        raise UserError(f"{path}={value!r} must be of type {field.type.__name__}")
    return _renamed(value, path)


def _is(value, kind):
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _check_fields(config):
    for path, field in fields():
        value, rule = _get(config, path), field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}={value} must be finite")
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{path}={value!r} must be one of {', '.join(rule['choices'])}")
        for name, sign, bad in (("minimum", ">=", lambda v, b: v < b), ("above", ">", lambda v, b: v <= b),
                                ("below", "<", lambda v, b: v >= b)):
            if rule[name] is not None and bad(value, rule[name]):
                raise UserError(f"{path}={value} must be {sign} {rule[name]}")


def _check_model(config):
    m = config.model
    if m.dim % m.num_heads:
        divisors = [n for n in range(1, m.dim + 1) if m.dim % n == 0 and (m.dim // n) % 2 == 0]
        raise UserError(f"model.dim={m.dim} does not divide by model.num_heads={m.num_heads}; "
                        f"heads that divide it: {', '.join(map(str, divisors[:12]))}")
    if (m.dim // m.num_heads) % 2:
        raise UserError(f"head size model.dim/model.num_heads={m.dim // m.num_heads} must be even (rotary pairs)")
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        raise UserError(f"model.num_heads={m.num_heads} does not divide by model.num_kv_heads={m.num_kv_heads}")
    if config.data.sequence_length > m.context_length:
        raise UserError(f"data.sequence_length={config.data.sequence_length} is longer than "
                        f"model.context_length={m.context_length}; lower the first or raise the second")


def _check_moe(config):
    moe = config.moe
    if moe.top_k > moe.num_experts:
        raise UserError(f"moe.top_k={moe.top_k} is larger than moe.num_experts={moe.num_experts}")
    try:
        if moe.widths:
            sizing.check_widths(moe.widths)
            if len(moe.widths) != moe.num_experts:
                raise ValueError(f"{len(moe.widths)} widths for {moe.num_experts} experts")
        if moe.pairs:
            sizing.check_pairs(config.widths, moe.width)
    except ValueError as error:
        raise UserError(f"moe.widths: {error}") from None
    if moe.exchange == "all_to_all" and (moe.placement != "pairs" or moe.capacity_factor):
        raise UserError("moe.exchange=all_to_all sends every row to a whole expert: it needs moe.placement=pairs and "
                        "moe.capacity_factor=0; or take moe.exchange=gather")
    if moe.tail_rows > moe.block_rows:
        raise UserError(f"moe.tail_rows={moe.tail_rows} is larger than moe.block_rows={moe.block_rows}")


def _check_data(config):
    mixture = config.data.mixture
    total = sum(weight for _, weight in mixture)
    for name, weight in mixture:
        if not math.isfinite(weight) or weight <= 0 or weight < total / 1000:
            raise UserError(f"data.mixture: the weight of {name!r} is {weight}; weights must be positive, and none "
                            "below a thousandth of their sum")
    if len({name for name, _ in mixture}) < len(mixture):
        raise UserError(f"data.mixture={mixture} names a directory twice; add up its weights")


def _check_training(config):
    t = config.training
    if t.batch_size % t.gradient_accumulation:
        raise UserError(f"training.batch_size={t.batch_size} does not divide by "
                        f"training.gradient_accumulation={t.gradient_accumulation}")
    if t.rewind and (len(t.rewind) != 2 or min(t.rewind) < 1):
        raise UserError(f"training.rewind={t.rewind} must be (a saved step, batches to skip), or () for none")
    if 0 < t.spike_factor <= 1:
        raise UserError(f"training.spike_factor={t.spike_factor} must be above 1, or 0 for none")
    o = config.optimizer
    for name in ("initial_learning_rate", "final_learning_rate"):
        if getattr(o, name) > o.learning_rate:
            raise UserError(f"optimizer.{name}={getattr(o, name)} is above the peak "
                            f"optimizer.learning_rate={o.learning_rate}")
    e = config.evaluation
    if not e.prompts or not all(e.prompts):
        raise UserError(f"evaluation.prompts={e.prompts} must be texts that are not empty")
    if e.sample_tokens >= config.model.context_length:
        raise UserError(f"evaluation.sample_tokens={e.sample_tokens} must be below model.context_length="
                        f"{config.model.context_length}")
    if config.evaluation.top_p > 1:
        raise UserError(f"evaluation.top_p={config.evaluation.top_p} must be <= 1")
    mesh = dataclasses.asdict(config.mesh)
    if 0 in mesh.values() or list(mesh.values()).count(-1) > 1:
        raise UserError(f"{', '.join(f'mesh.{k}={v}' for k, v in mesh.items())}: each must be a number of devices, or "
                        "-1 for the rest in one place at most")


def markdown_table() -> str:
    """The options as the README shows them."""
    lines = ["| option | default | what |", "|---|---|---|"]
    for path, field in fields():
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"| `{path}` | `{field.default!r}` | {field.metadata['help']}{choices} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
