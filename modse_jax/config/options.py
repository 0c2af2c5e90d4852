"""Every option of a run, once: type, default, allowed values, one line of help.

A config file builds a ConfigDict with `default_config()` and overrides a few values; `from_dict` turns it (or a
workdir's config.json) into the frozen, checked `Config` that the rest of the code reads. Values 0 and "" mean "off",
because a flag cannot override None. `python -m modse_jax.config.reference` prints the table of the README.
"""

import dataclasses
import sys

from modse_jax.config.checks import check_data, check_fields, check_model, check_moe, check_training
from modse_jax.config.option_fields import fields_of, option
from modse_jax.moe import expert_widths, layer_options
from modse_jax.moe.experts.block_sizes import Blocks

ANYWHERE = ("auto", "reference", "blocked")  # backends that need no particular device


DTYPES = ("float32", "bfloat16")


PACKINGS = ("concat", "best_fit")


UNDECODABLE = ("skip", "replace", "fail")


# Values that options no longer have: (option, old value) -> the value that replaces it. Old config files, flags and
# workdirs stay readable; `from_dict` replaces the value and says so.
RENAMED_VALUES = {
    (
        "moe.backend",
        "virtual",
    ): "auto",  # ran lax.ragged_dot, whose weight gradient no jax before 0.12 fuses on GPU
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    dim: int = option(256, "model width D", minimum=2)
    num_layers: int = option(4, "decoder blocks, each with an MoE layer", minimum=1)
    num_heads: int = option(4, "attention heads; dim must divide by it", minimum=1)
    num_kv_heads: int = option(
        0, "key/value heads; 0 = num_heads (multi-head attention)", minimum=0
    )
    context_length: int = option(512, "longest sequence, in tokens", minimum=2)
    vocab_size: int = option(4096, "rows of the embedding; at least the tokenizer's", minimum=4)
    rope_base: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm", above=0)
    tie_embeddings: bool = option(False, "one matrix for input and output embedding")
    dtype: str = option(
        "float32", "compute type; parameters, router, softmax and loss stay float32", choices=DTYPES
    )
    attention: str = option(
        "auto",
        "over packed rows: XLA, in blocks of queries; JAX's splash kernels; or cuDNN's; "
        "auto = splash on TPU and cudnn on GPU, where they run, else blocks",
        choices=("auto", "blocks", "splash", "cudnn"),
    )
    unroll: int = option(
        0,
        "blocks per turn of the loop over blocks. In a turn, what is kept for the backward pass is "
        "not copied; many take long to compile. 0 = on CPU all, up to 4, where nothing is "
        "recomputed; else 1",
        minimum=0,
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes: nothing; every block but its routing; or that, but "
        "for products",
        choices=("none", "full", "save_routing_and_dots"),
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    num_experts: int = option(8, "experts per layer, E", minimum=1)
    top_k: int = option(2, "experts per token, K", minimum=1)
    width: int = option(
        640, "hidden width h of an expert when `widths` is empty; half of a pair's sum", minimum=1
    )
    widths: tuple[int, ...] = option(
        (), "hidden width of each expert, pair by pair; () = num_experts of `width`"
    )
    pairs: bool = option(
        False, "require that widths[2j] + widths[2j+1] = 2 * width (paper, Eq. 7-8)"
    )
    gate: str = option(
        "top_k_softmax",
        "softmax over the kept logits (paper), or over all and then top-k",
        choices=layer_options.GATES,
    )
    gate_term: str = option(
        "none",
        "learned: add RMSNorm(Softplus(x W_n)) to the logits (paper, Eq. 3)",
        choices=layer_options.GATE_TERMS,
    )
    balance_loss_weight: float = option(
        0.01, "weight of N * sum f_i P_i, summed over layers (paper, Eq. 9)", minimum=0
    )
    balance_loss_count: str = option(
        "top_k",
        "what f_i counts: all K choices, or the first (paper, Eq. 10)",
        choices=layer_options.BALANCE_LOSS_COUNTS,
    )
    balance_loss_scope: str = option(
        "batch",
        "tokens that f_i and P_i are of: a whole micro-batch, or a device's (and "
        "the loss the mean over devices, by tokens)",
        choices=layer_options.BALANCE_LOSS_SCOPES,
    )
    z_loss_weight: float = option(
        0.0, "weight of mean(logsumexp(router logits)^2), summed over layers", minimum=0
    )
    capacity_factor: float = option(
        0.0,
        "an expert's rows over its even share, per group of devices that share "
        "experts; 0 = dropless",
        minimum=0,
    )
    backend: str = option(
        "auto",
        "implementation of the expert FFN; auto = pallas_tpu on TPUs, pallas_triton on A100, "
        "H100, H200 and B200 in bfloat16, if they take model.dim, else blocked. Kernels pad widths "
        "to their tiles and report the waste",
        choices=layer_options.BACKENDS,
    )
    placement: str = option(
        "pairs",
        "a device of mesh.expert has whole experts of equal total width (the paper's "
        "pairs), or a share of every expert's columns",
        choices=layer_options.PLACEMENTS,
    )
    exchange: str = option(
        "auto",
        "how rows reach experts of other devices: all tokens gathered, or each row sent; "
        "auto = what sends less, of what runs there",
        choices=layer_options.EXCHANGES,
    )
    block_rows: int = option(
        1024,
        "blocked: rows of a block at most, but for an expert with up to half more, which is "
        "one block",
        minimum=1,
    )
    tail_rows: int = option(
        64, "blocked: no block has fewer rows, if experts have as many on average", minimum=1
    )
    saved_activations: float = option(
        1.25,
        "blocked: hidden activations kept for the backward pass, over those "
        "of evenly spread rows, at most 2^31 numbers a layer; the rest is recomputed",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = option(
        -1, "devices that share a batch and copy parameters; -1 = the rest", minimum=-1
    )
    fsdp: int = option(
        1, "devices that share a batch and the parameters; -1 = the rest", minimum=-1
    )
    expert: int = option(1, "devices that share a batch and the experts; -1 = the rest", minimum=-1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = option(
        "python_stdlib",
        "text:PATH, jsonl:PATH, parquet:PATH, tfds:NAME, python_stdlib, or prepared:DIR",
    )
    validation_source: str = option("", 'held-out documents; "": a part of the source\'s')
    mixture: tuple[tuple[str, float], ...] = option(
        (), 'instead of a source: (("DIR", weight), ...) of prepared data'
    )
    field: str = option("text", "jsonl field, parquet column or tfds feature that holds the text")
    tokenizer: str = option(
        "bytes", "bytes, sentencepiece:FILE, hf:FILE, or sentencepiece (trained on the source)"
    )
    sequence_length: int = option(512, "predicted tokens per record", minimum=2)
    validation_fraction: float = option(
        0.02,
        "share of documents held out, by a hash of their path, or of their text "
        "where many share a file",
        above=0,
        below=1,
    )
    packing: str = option(
        "concat",
        "documents end to end and cut, or whole where they fit and padded",
        choices=PACKINGS,
    )
    drop_duplicates: bool = option(False, "of documents that are exact copies, use the first alone")
    undecodable: str = option("skip", "documents that are not UTF-8", choices=UNDECODABLE)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = option(16, "sequences per step, over all devices", minimum=1)
    gradient_accumulation: int = option(1, "micro-batches per step", minimum=1)
    steps: int = option(1000, "optimiser steps", minimum=1)
    log_every: int = option(20, "steps between metrics", minimum=1)
    eval_every: int = option(0, "steps between validations; 0 = only after the last", minimum=0)
    checkpoint_every: int = option(
        200, "steps between checkpoints (the last step is always saved)", minimum=1
    )
    seed: int = option(0, "order of the data", minimum=0)
    max_nonfinite_steps: int = option(
        10, "non-finite steps in a row before the run stops with exit code 3", minimum=1
    )
    spike_factor: float = option(
        0.0,
        "a step whose gradient norm is this many times the running median changes nothing; 0 = off",
        minimum=0,
    )
    spike_window: int = option(
        128, "steps of that median; a quarter of them must have passed", minimum=4
    )
    rewind: tuple[int, ...] = option(
        (), "(step, batches): go back to that checkpoint, once, and skip as many batches of data"
    )
    replay_check: int = option(
        0, "every so many steps, run a step twice and compare bits; 0 = off", minimum=0
    )
    hang_minutes: float = option(
        60.0,
        "without a step for so long, print every thread's stack and end with exit code 1; 0 = off",
        minimum=0,
    )
    deterministic: bool = option(True, "on GPU, ask XLA for deterministic operations")
    loss_chunk: int = option(2048, "tokens whose logits a device holds at a time", minimum=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    keep: int = option(3, "newest steps kept, besides the best by validation loss", minimum=2)
    keep_every: int = option(
        0, "every so many steps, a checkpoint is kept for good; 0 = none", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
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
class EvaluationConfig:
    batch_size: int = option(16, "sequences per validation batch", minimum=1)
    sample_tokens: int = option(96, "tokens generated per sample", minimum=1)
    prompts: tuple[str, ...] = option(("def ", "import ", "class "), "prompts of the sample suite")
    temperature: float = option(0.8, "sampling temperature; 0 = greedy", minimum=0)
    top_k: int = option(0, "sample from the k likeliest tokens; 0 = all", minimum=0)
    top_p: float = option(0.95, "sample from the smallest set of this probability", above=0)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = option(0, "initial parameters, and samples", minimum=0)
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        for check in (check_fields, check_model, check_moe, check_data, check_training):
            check(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden width of every expert of a layer."""
        return self.moe.widths or expert_widths.equal_widths(self.moe.num_experts, self.moe.width)

    @property
    def router_options(self) -> layer_options.RouterOptions:
        """The options of the router of every layer."""
        return layer_options.RouterOptions(
            top_k=self.moe.top_k,
            gate=self.moe.gate,
            gate_term=self.moe.gate_term,
            balance_loss_count=self.moe.balance_loss_count,
            balance_loss_scope=self.moe.balance_loss_scope,
            norm_eps=self.model.norm_eps,
        )

    @property
    def expert_options(self) -> layer_options.ExpertOptions:
        """The options of the experts of every layer."""
        return layer_options.ExpertOptions(
            backend=self.moe.backend,
            placement=self.moe.placement,
            exchange=self.moe.exchange,
            capacity_factor=self.moe.capacity_factor,
            blocks=Blocks(self.moe.block_rows, self.moe.tail_rows, self.moe.saved_activations),
        )


def fields() -> list[tuple[str, dataclasses.Field]]:
    """("section.field", dataclass field) of every option."""
    return fields_of(Config)


_reported = set()  # keys of RENAMED_VALUES that this process has printed a line about


def renamed(value, path):
    """The value that replaces `value` of an option, where it is an old one."""
    key = path, value
    if not isinstance(value, str) or key not in RENAMED_VALUES:
        return value
    if key not in _reported:
        _reported.add(key)
        print(
            f"{path}={value} no longer exists; {path}={RENAMED_VALUES[key]} is used instead",
            file=sys.stderr,
        )
    return RENAMED_VALUES[key]
