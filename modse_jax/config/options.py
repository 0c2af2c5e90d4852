"""Every option of a run: its type, default, allowed values and one line of help.

A config file starts from `loading.default_config()` and overrides a few values. `loading.from_dict`
converts them into the frozen, checked `Config` that the rest of the code reads. The values 0 and ""
mean "off", because a command-line flag cannot be set to None.
`python -m modse_jax.config.reference` prints the table of docs/options.md.
"""

import dataclasses
from fractions import Fraction

from modse_jax.config.checks import (
    check_data,
    check_fields,
    check_flop_match,
    check_model,
    check_moe,
    check_training,
)
from modse_jax.config.option_fields import fields_of, option
from modse_jax.moe import expert_widths, layer_options
from modse_jax.moe.experts.block_sizes import Blocks

ANYWHERE = ("auto", "reference", "blocked")  # backends that run on any device
DTYPES = ("float32", "bfloat16")
NORM_POSITIONS = ("pre", "post")
QK_NORMS = ("none", "full")
SHARED_PLACEMENTS = ("none", "in_layer", "parallel")
PACKINGS = ("concat", "best_fit")
UNDECODABLE = ("skip", "replace", "fail")
REMATS = ("none", "full", "save_routing_and_dots")
WEIGHT_DECAY_ON = ("matrices", "all")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Options of the transformer."""

    dim: int = option(256, "model width D", minimum=2)
    num_layers: int = option(
        4, "decoder blocks, each with an MoE layer (or a dense FFN: `dense_width`)", minimum=1
    )
    num_heads: int = option(4, "attention heads; `dim` must be divisible by it", minimum=1)
    num_kv_heads: int = option(
        0, "key/value heads; 0 = num_heads (multi-head attention)", minimum=0
    )
    context_length: int = option(512, "longest sequence, in tokens", minimum=2)
    vocab_size: int = option(
        4096, "rows of the embedding; at least the size of the tokenizer's vocabulary", minimum=4
    )
    rope_base: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm", above=0)
    norm_position: str = option(
        "pre",
        "pre: normalize the input of attention and of the FFN, h = x + f(N(x)). post: normalize "
        "their outputs (reordered norms, as in OLMo 2), h = x + N(f(x))",
        choices=NORM_POSITIONS,
    )
    qk_norm: str = option(
        "none",
        "full: RMSNorm of queries and of keys, each over the width of all its heads, before RoPE",
        choices=QK_NORMS,
    )
    init_std: float = option(
        0.0,
        "standard deviation of every initial matrix, a normal distribution truncated at 3 "
        "standard deviations. 0 = by the fan-in of the matrix, less for outputs of branches",
        minimum=0,
    )
    dense_width: int = option(
        0,
        "hidden width of a dense SwiGLU FFN that takes the place of every MoE layer; such a model "
        "has no experts and no router, and of the options `moe.*` only `flop_matched_width` is "
        "used. 0 = MoE layers",
        minimum=0,
    )
    tie_embeddings: bool = option(False, "use one matrix for the input and the output embedding")
    dtype: str = option(
        "float32", "compute type; parameters, router, softmax and loss stay float32", choices=DTYPES
    )
    attention: str = option(
        "auto",
        "attention kernel for packed sequences: XLA in blocks of queries, JAX's splash "
        "kernels (TPU), or cuDNN (GPU). auto = splash on TPU and cudnn on GPU if they "
        "support the shapes, otherwise blocks",
        choices=("auto", "blocks", "splash", "cudnn"),
    )
    remat: str = option(
        "none",
        "activation checkpointing. none: save all activations. full: recompute each block, "
        "saving only its routing decisions. save_routing_and_dots: also save matmul outputs",
        choices=REMATS,
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Options of the mixture-of-experts layers."""

    num_experts: int = option(8, "experts per layer, E; not used with `pools`", minimum=1)
    top_k: int = option(2, "experts per token, K; not used with `pools`", minimum=1)
    width: int = option(
        640,
        "hidden width h of each expert if `widths` is empty; half of the sum of a pair; not used "
        "with `pools`",
        minimum=1,
    )
    widths: tuple[int, ...] = option(
        (),
        "hidden width of each expert, over all pools; 0 = an expert whose output is 0. () = "
        "num_experts experts of `width`, or the widths of the pools",
    )
    pools: tuple[tuple[int, int, int], ...] = option(
        (),
        "groups of experts with a router of their own: ((experts, width, top_k), ...). The output "
        "is sum k_i y_i / sum k_i. Every width is 0 if `widths` are given. () = one pool",
    )
    copy_experts: tuple[int, ...] = option(
        (), "numbers of the experts, of width 0, whose output is the input of the layer (MoE++)"
    )
    flop_matched_width: int = option(
        0,
        "width of the dense FFN whose FLOPs the layer is claimed to match: `shared_width` plus the "
        "sum over pools of top_k times the mean width must equal it exactly. 0 = no claim",
        minimum=0,
    )
    pairs: bool = option(
        False, "require that widths[2j] + widths[2j+1] = 2 * width (paper, Eq. 7-8)"
    )
    shared_width: int = option(
        0, "hidden width of the shared expert, which processes every token; 0 = none", minimum=0
    )
    shared_placement: str = option(
        "none",
        "in_layer: the shared expert reads the input of the MoE layer and is added to its output. "
        "parallel: it takes the place of the MoE layer after attention, and the MoE layer reads "
        "the input of the block; each has its own norm, and both are added",
        choices=SHARED_PLACEMENTS,
    )
    gate: str = option(
        "top_k_softmax",
        "weights of the chosen experts: a softmax over their logits (paper); their entries of a "
        "softmax over all experts, or their sigmoids, optionally divided by the sum; or 1/K each",
        choices=layer_options.GATES,
    )
    gate_scale: float = option(1.0, "factor of all gates", above=0)
    router_noise: str = option(
        "none",
        "learned: add RMSNorm(Softplus(x W_n)) to the logits (paper, Eq. 3)",
        choices=layer_options.ROUTER_NOISES,
    )
    balance_loss_weight: float = option(
        0.01,
        "weight of the load-balancing loss N * sum f_i P_i (paper, Eq. 9)",
        minimum=0,
    )
    balance_loss_count: str = option(
        "top_k",
        "choices that f_i counts: all K, or only the first (paper, Eq. 10)",
        choices=layer_options.BALANCE_LOSS_COUNTS,
    )
    balance_loss_scope: str = option(
        "batch",
        "tokens over which the load-balancing loss and the width penalty are computed: the whole "
        "micro-batch, or each device's share, or each row of the batch (then averaged, weighted by "
        "tokens)",
        choices=layer_options.BALANCE_LOSS_SCOPES,
    )
    balance_loss_over_choices: str = option(
        "sum",
        "mean: divide the load-balancing loss by the number of counted choices, so that a pool's "
        "is 1 at balance. sum: it is that number (K, or 1 for argmax)",
        choices=layer_options.BALANCE_LOSS_OVER_CHOICES,
    )
    z_loss_weight: float = option(
        0.0,
        "weight of the router z-loss mean(logsumexp(router logits)^2)",
        minimum=0,
    )
    auxiliary_over_layers: str = option(
        "sum",
        "the load-balancing loss, the router z-loss and the width penalty are summed over "
        "layers, or averaged",
        choices=("sum", "mean"),
    )
    width_penalty_weight: float = option(
        0.0, "weight of the width penalty, which favors narrow experts (HMoE)", minimum=0
    )
    width_penalty_scale: str = option(
        "mean",
        "widths in the width penalty are relative to the mean or to the largest of the pool",
        choices=layer_options.WIDTH_PENALTY_SCALES,
    )
    bias_rule: str = option(
        "none",
        "loss-free balancing: a bias of every expert, added to its score when experts are chosen, "
        "grows after each step with rate * sign(mean(c) - c_i), or with rate * (mean(c) - c_i) / "
        "mean(c), where c_i counts the tokens of expert i",
        choices=("none", "sign", "proportional"),
    )
    bias_rate: float = option(1e-3, "rate of `bias_rule`", above=0)
    bias_schedule: str = option(
        "constant",
        "the rate stays the same, or decays to 0 at training.steps",
        choices=("constant", "linear", "cosine"),
    )
    bias_recenter: bool = option(
        False, "subtract the mean bias of a pool after each step, so that the bias cannot drift"
    )
    capacity_factor: float = option(
        0.0,
        "maximum tokens routed to an expert, as a multiple of an even share of its pool's tokens, "
        "per group of devices that share experts; tokens beyond it are dropped, and padding takes "
        "no room. 0 = dropless",
        minimum=0,
    )
    capacity_order: str = option(
        "choice",
        "which tokens an expert keeps. choice: the first choices of all tokens, then the second "
        "choices, and so on (GShard). token: all choices of the first token, then of the second",
        choices=layer_options.CAPACITY_ORDERS,
    )
    backend: str = option(
        "auto",
        "implementation of the expert FFN. auto = pallas_tpu on TPU, pallas_triton on "
        "A100, H100, H200 and B200 in bfloat16, if they support model.dim, otherwise "
        "blocked. The kernels pad widths to their tiles and report the waste",
        choices=layer_options.BACKENDS,
    )
    placement: str = option(
        "whole",
        "how experts are sharded over `mesh.expert`. whole: each device holds whole "
        "experts of equal total width. split: each device holds a slice of every "
        "expert's hidden units",
        choices=layer_options.PLACEMENTS,
    )
    exchange: str = option(
        "auto",
        "how tokens reach experts on other devices: all-gather of all tokens, or "
        "all-to-all of the routed tokens. auto = the supported one that sends less",
        choices=layer_options.EXCHANGES,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes of the device mesh."""

    data: int = option(
        -1,
        "devices for data parallelism: the batch is sharded, parameters are replicated; -1 "
        "= all remaining devices",
        minimum=-1,
    )
    fsdp: int = option(
        1,
        "devices for fully sharded data parallelism: batch and parameters are sharded; -1 "
        "= all remaining devices",
        minimum=-1,
    )
    expert: int = option(
        1,
        "devices for expert parallelism: batch and experts are sharded; -1 = all remaining devices",
        minimum=-1,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Options of the data and its tokenizer."""

    source: str = option(
        "python_stdlib",
        "text:PATH, jsonl:PATH, parquet:PATH, tfds:NAME, python_stdlib, or prepared:DIR",
    )
    validation_source: str = option(
        "", 'source of the validation documents; "" = a part of `source`'
    )
    mixture: tuple[tuple[str, float], ...] = option(
        (), 'prepared data to mix, instead of a source: (("DIR", weight), ...)'
    )
    validation_sources: tuple[tuple[str, str], ...] = option(
        (),
        "validation sets, each with a loss of its own, beside the validation split of the data: "
        '(("NAME", "SOURCE"), ...)',
    )
    field: str = option("text", "JSONL field, Parquet column or TFDS feature that holds the text")
    tokenizer: str = option(
        "bytes", "bytes, sentencepiece:FILE, hf:FILE, or sentencepiece (trained on the source)"
    )
    sequence_length: int = option(512, "predicted tokens per record", minimum=2)
    validation_fraction: float = option(
        0.02,
        "fraction of documents used for validation, selected by a hash of their path, or "
        "of their text if many share a file",
        above=0,
        below=1,
    )
    packing: str = option(
        "concat",
        "concat: documents are concatenated and split into sequences. best_fit: documents "
        "are kept whole if they fit, and sequences are padded",
        choices=PACKINGS,
    )
    shuffle_seed: int = option(0, "seed of the order of the training records", minimum=0)
    drop_duplicates: bool = option(False, "keep only the first of documents that are exact copies")
    undecodable: str = option(
        "skip", "what to do with documents that are not valid UTF-8", choices=UNDECODABLE
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Options of the training loop."""

    batch_size: int = option(16, "sequences per step, over all devices", minimum=1)
    gradient_accumulation: int = option(
        1, "micro-batches per step; batch_size must be divisible by it", minimum=1
    )
    steps: int = option(1000, "optimizer steps", minimum=1)
    log_every: int = option(20, "steps between two lines of metrics", minimum=1)
    eval_every: int = option(
        0, "steps between two validations; 0 = only after the last step", minimum=0
    )
    checkpoint_every: int = option(
        200, "steps between two checkpoints (the last step is always saved)", minimum=1
    )
    spike_factor: float = option(
        0.0,
        "skip the update if the gradient norm exceeds this multiple of its running median; 0 = off",
        minimum=0,
    )
    rewind: tuple[int, ...] = option(
        (),
        "(step, batches): return once to the checkpoint of `step` and skip that many "
        "batches of data; () = off",
    )
    deterministic: bool = option(True, "request deterministic operations from XLA on GPU")
    vocab_z_loss_weight: float = option(
        0.0,
        "weight of the z-loss of the vocabulary, the mean over targets of logsumexp(logits)^2",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Options that decide which checkpoints are kept."""

    keep: int = option(
        3,
        "number of newest checkpoints to keep, besides the one with the best validation loss",
        minimum=2,
    )
    keep_every: int = option(
        0, "keep the checkpoint of every n-th step permanently; 0 = none", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of AdamW and of its learning-rate schedule."""

    learning_rate: float = option(3e-4, "peak learning rate of AdamW", above=0)
    initial_learning_rate: float = option(
        2e-7, "learning rate of step 0 of the schedule, where the warm-up starts", minimum=0
    )
    final_learning_rate: float = option(
        3e-5,
        "floor of the cosine schedule, which it reaches at step training.steps of the schedule",
        minimum=0,
    )
    warmup_steps: int = option(100, "steps of linear warm-up", minimum=0)
    first_step: int = option(
        0,
        "step of the schedule that the first update uses: 0, or 1 as in OLMo-core, where the last "
        "update has the final learning rate",
        minimum=0,
        below=2,
    )
    beta1: float = option(0.9, "decay rate of the first moment", minimum=0, below=1)
    beta2: float = option(0.95, "decay rate of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "constant added to the square root of the second moment", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", minimum=0)
    weight_decay_on: str = option(
        "matrices",
        "parameters that decay: matrices (of embeddings, attention, experts and routers), or all, "
        "which adds the scales of the norms",
        choices=WEIGHT_DECAY_ON,
    )
    grad_clip: float = option(1.0, "maximum global norm of the gradient", above=0)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Options of validation and sampling."""

    batch_size: int = option(16, "sequences per validation batch", minimum=1)
    capacity_factor: float = option(
        0.0,
        "`moe.capacity_factor` of validation, of the suites loss and routing, and of the analysis. "
        "Above 0, the score of a token depends on the other tokens of its batch. 0 = dropless, as "
        "samples and benchmark tasks always are",
        minimum=0,
    )
    sample_tokens: int = option(
        96, "tokens to generate per sample, or as many as the context holds", minimum=1
    )
    prompts: tuple[str, ...] = option(("def ", "import ", "class "), "prompts of the sample suite")
    temperature: float = option(0.8, "sampling temperature; 0 = greedy", minimum=0)
    top_k: int = option(
        0,
        "sample from the k most likely tokens, and those as likely as the last of them; 0 = all",
        minimum=0,
    )
    top_p: float = option(
        0.95,
        "sample from the fewest most likely tokens with at least this total probability, and those "
        "as likely as the last of them",
        above=0,
    )


@dataclasses.dataclass(frozen=True)
class AdvancedConfig:
    """Options that are rarely needed: speed, memory, and protection against faults."""

    loss_chunk: int = option(
        2048, "tokens whose logits are held in memory at once on each device", minimum=1
    )
    unroll: int = option(
        0,
        "transformer blocks per iteration of `lax.scan`. Unrolling avoids copying saved "
        "activations but compiles more slowly. 0 = automatic: up to 4 on CPU without "
        "rematerialization, otherwise 1",
        minimum=0,
    )
    block_rows: int = option(
        1024,
        "`blocked` backend: maximum rows per block. An expert with up to 1.5 times as many "
        "rows is still processed as one block",
        minimum=1,
    )
    tail_rows: int = option(
        64,
        "`blocked` backend: minimum rows per block (ignored if experts receive fewer rows "
        "on average)",
        minimum=1,
    )
    saved_activations: float = option(
        1.25,
        "`blocked` backend: size of the buffer of saved hidden activations, as a multiple "
        "of what balanced routing needs (at most 2^31 elements per layer). What does not "
        "fit is recomputed in the backward pass",
        minimum=0,
    )
    spike_window: int = option(
        128,
        "steps in the window of the median of `training.spike_factor`; spike detection "
        "starts when a quarter of it is filled",
        minimum=4,
    )
    max_nonfinite_steps: int = option(
        10, "consecutive non-finite steps after which the run stops with exit code 3", minimum=1
    )
    replay_check: int = option(
        0, "run every n-th step twice and compare the results bit by bit; 0 = off", minimum=0
    )
    hang_minutes: float = option(
        60.0,
        "minutes without a step after which the stacks of all threads are printed and the "
        "run ends with exit code 1; 0 = off",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of a run. Building one checks every value and raises UserError."""

    seed: int = option(0, "seed of the initial parameters and of sampling", minimum=0)
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    advanced: AdvancedConfig = AdvancedConfig()

    def __post_init__(self) -> None:
        for check in (check_fields, check_model, check_moe, check_data, check_training):
            check(self)
        check_flop_match(self)

    @property
    def is_dense(self) -> bool:
        """True for a model with a dense FFN in place of every MoE layer."""
        return self.model.dense_width > 0

    @property
    def depends_on_mesh(self) -> bool:
        """True if training depends on which tokens are on the same device, so on the mesh.

        That is so with a capacity, or with a balancing loss per device. A dense model has neither.
        """
        has_capacity = self.moe.capacity_factor > 0
        return not self.is_dense and (has_capacity or self.moe.balance_loss_scope == "device")

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden width of every expert of a layer, over all pools; () for a dense model."""
        if self.is_dense:
            return ()
        if self.moe.widths:
            return self.moe.widths
        if not self.moe.pools:
            return expert_widths.equal_widths(self.moe.num_experts, self.moe.width)
        return tuple(width for experts, width, _ in self.moe.pools for _ in range(experts))

    @property
    def pools(self) -> tuple[layer_options.Pool, ...]:
        """The pools of experts of a layer, in the order of the experts; () for a dense model."""
        if self.is_dense:
            return ()
        if not self.moe.pools:
            return (layer_options.Pool(self.moe.num_experts, self.moe.top_k),)
        return tuple(layer_options.Pool(experts, top_k) for experts, _, top_k in self.moe.pools)

    @property
    def active_width(self) -> Fraction:
        """The hidden units that a token uses per layer, the shared expert's included.

        The experts of a pool are taken to receive equally many tokens.
        """
        if self.is_dense:
            return Fraction(self.model.dense_width)
        return self.moe.shared_width + expert_widths.mean_active_width(self.widths, self.pools)

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer, over all pools."""
        return sum(pool.num_experts for pool in self.pools)

    @property
    def top_k(self) -> int:
        """The number of experts that a token is routed to, over all pools."""
        return sum(pool.top_k for pool in self.pools)

    @property
    def router_options(self) -> layer_options.RouterOptions:
        """The options of the router of every layer."""
        return layer_options.RouterOptions(
            top_k=self.top_k,
            pools=self.pools,
            gate=self.moe.gate,
            gate_scale=self.moe.gate_scale,
            router_noise=self.moe.router_noise,
            balance_loss_count=self.moe.balance_loss_count,
            balance_loss_scope=self.moe.balance_loss_scope,
            balance_loss_over_choices=self.moe.balance_loss_over_choices,
            width_penalty_scale=self.moe.width_penalty_scale,
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
            capacity_order=self.moe.capacity_order,
            copy_experts=self.moe.copy_experts,
            blocks=Blocks(
                self.advanced.block_rows,
                self.advanced.tail_rows,
                self.advanced.saved_activations,
            ),
        )


def fields() -> list[tuple[str, dataclasses.Field]]:
    """Returns ("section.option", dataclass field) of every option."""
    return fields_of(Config)
