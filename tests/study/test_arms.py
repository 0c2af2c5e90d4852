"""Arms of the study: counts equal the authors' logs, the grid is theirs, and bad arms are refused.

The expected numbers are parameters and FLOPs of the public logs and launch scripts of Slicing and
Dicing, with a vocabulary of 100,352 and sequences of 2,048 tokens.
"""

import pathlib
import re
import time
from fractions import Fraction

import jax
import pytest

from modse_jax.config import loading
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import accounting, transformer
from modse_jax.study import arms, recipe
from modse_jax.study.arms import PoolOfArm

HALF, QUARTER, EIGHTH = Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)
TWO_POOLS = (PoolOfArm(16, QUARTER, 2), PoolOfArm(32, EIGHTH, 4))
THREE_POOLS = (PoolOfArm(16, HALF, 1), PoolOfArm(16, QUARTER, 2), PoolOfArm(32, EIGHTH, 4))


def count_built_parameters(config: Config) -> int:
    _, params = transformer.build_abstract_model(config)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "build, total, without_input, flops_per_token, total_flops",
    [
        (lambda: arms.build_dense("10M"), 9_745_008, 4_928_112, 33_105_888, 6.63038e15),
        (lambda: arms.build_dense("80M"), 81_898_320, 48_180_048, 355_108_320, 568.218e15),
        (
            lambda: arms.build_mixture("80M", 32, QUARTER),
            157_850_448,
            124_132_176,
            355_624_416,
            569.044e15,
        ),
    ],
)
def test_counts_equal_the_logs(build, total, without_input, flops_per_token, total_flops):
    config = build()
    counts = accounting.count_parameters(config)
    assert counts.total == total
    assert counts.total - counts.embeddings // 2 == without_input
    assert accounting.olmo_flops_per_token(config, 2048) == flops_per_token
    tokens = config.training.steps * config.training.batch_size * config.data.sequence_length
    assert flops_per_token * tokens == pytest.approx(total_flops, rel=1e-5)


@pytest.mark.parametrize(
    "build, total",
    [
        (lambda: arms.build_dense("20M"), 19_859_040),
        (lambda: arms.build_dense("50M"), 52_782_000),
        (lambda: arms.build_dense("100M"), 98_318_208),
        (lambda: arms.build_dense("110M"), 113_593_968),
        (lambda: arms.build_dense("300M"), 299_933_504),
        (lambda: arms.build_dense("500M"), 505_837_920),
        (lambda: arms.build_mixture("50M", 1024, EIGHTH), 492_922_800),
        (lambda: arms.build_mixture("50M", 512, HALF), 934_676_400),
        (lambda: arms.build_mixture("300M", 256, QUARTER), 6_582_345_536),
        (lambda: arms.build_mixture("200M", 512, QUARTER), 6_439_593_600),
        (lambda: arms.build_pools("50M", TWO_POOLS), 77_031_600),
        (lambda: arms.build_shared("50M", 31, QUARTER, QUARTER, "parallel"), 77_012_400),
    ],
)
def test_totals_equal_those_of_the_study(build, total):
    assert accounting.count_parameters(build()).total == total


@pytest.mark.parametrize(
    "name, tokens, steps",
    [
        ("10M", 0.2e9, 191),
        ("20M", 0.4e9, 382),
        ("50M", 1.0e9, 954),
        ("80M", 1.6e9, 1526),
        ("100M", 2.0e9, 1908),
        ("110M", 2.2e9, 2099),
        ("200M", 4.0e9, 3815),
        ("300M", 6.0e9, 5723),
        ("500M", 10e9, 9537),
    ],
)
def test_tokens_and_steps(name, tokens, steps):
    """Steps are rounded up: the logs of 10M end at step 191, those of 80M at 1526."""
    assert arms.SIZES[name].tokens == tokens
    assert arms.build_dense(name).training.steps == steps


def test_every_arm_of_the_grid_passes_accounting_in_seconds():
    """343 cells and 7 dense arms; their counts and FLOPs equal closed formulas to the unit."""
    start = time.process_time()
    grid = dict(arms.build_grid())
    counts = {name: accounting.count_parameters(config) for name, config in grid.items()}
    flops = {name: accounting.olmo_flops_per_token(config, 2048) for name, config in grid.items()}
    seconds = time.process_time() - start
    cells = arms.list_grid()
    assert len(cells) == 343 and len(grid) == 343 + 7
    for size in arms.STUDY_SIZES:
        V, d, L = size.vocab_size, size.dim, size.num_layers
        own = [cell for cell in cells if cell.size == size]
        assert len(own) == 49
        outside = 2 * V * d + 4 * d * d * L + (4 * L + 1) * d
        assert counts[f"{size.name}_dense"].total == outside + 12 * d * d * L
        for cell in own:
            n, g = cell.experts, cell.granularity
            assert 2 <= n <= 1024 and 1 <= n * g <= 128
            expected = outside + L * (3 * d * (4 * d * g) * n + n * d)
            assert counts[cell.name].total == expected
            matmuls = V * d + 16 * d * d * L + (2 * L + 1) * d + n * d * L
            assert flops[cell.name] == 6 * matmuls + 12 * L * d * 2048
    assert seconds < 10  # 0.8 s alone on a core of an AMD EPYC; the rest is for busy machines


@pytest.mark.slow
def test_every_arm_of_one_size_builds_with_the_counts_of_accounting():
    grid = dict(arms.build_grid((arms.SIZES["50M"],)))
    assert len(grid) == 49 + 1
    for name, config in grid.items():
        expected = accounting.count_parameters(config).total
        assert count_built_parameters(config) == expected, name


@pytest.mark.parametrize(
    "name", ["50M_dense", "50M_n2_k1", "50M_n16_k16", "50M_n32_k4", "50M_n1024_k8", "50M_n64_k64"]
)
def test_arms_at_the_ends_of_the_grid_build_with_the_counts_of_accounting(name):
    config = dict(arms.build_grid((arms.SIZES["50M"],)))[name]
    assert count_built_parameters(config) == accounting.count_parameters(config).total


@pytest.mark.parametrize(
    "build",
    [
        lambda: arms.build_pools("50M", TWO_POOLS),
        lambda: arms.build_shared("50M", 31, QUARTER, QUARTER, "parallel"),
        lambda: arms.build_shared("50M", 31, QUARTER, QUARTER, "in_layer"),
        lambda: arms.build_pools(
            "50M", (PoolOfArm(15, QUARTER, 1), PoolOfArm(30, EIGHTH, 2)), HALF, "parallel"
        ),
    ],
)
def test_pools_and_shared_experts_build_with_the_counts_of_accounting(build):
    config = build()
    assert count_built_parameters(config) == accounting.count_parameters(config).total
    assert config.active_width == 960


def test_the_page_lists_the_sizes():
    """The table of docs/study.md: size, dim, layers, heads, parameters, tokens, steps."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "study.md").read_text()
    for size in arms.STUDY_SIZES:
        config = arms.build_dense(size)
        parameters = accounting.count_parameters(config).total
        row = (
            f"| {size.name} | {size.dim} | {size.num_layers} | {size.num_heads} | {parameters:,} | "
            f"{size.tokens / 1e9:.1f} B | {config.training.steps:,} |"
        )
        assert row in page


def test_arms_of_a_size_share_everything_but_the_layer():
    """A cell differs from the dense arm in its layer alone, so that arms can be compared."""
    dense = arms.build_dense("50M")
    changed = loading.differences(dense, arms.build_mixture("50M", 32, QUARTER))
    assert {line.split(":")[0] for line in changed} == {
        "model.dense_width",
        "moe.num_experts",
        "moe.width",
        "moe.top_k",
    }
    for path, value in recipe.recipe_options().items():
        if path != "model.vocab_size":
            assert loading.to_flat_dict(dense)[path] == value


def test_changed_arms():
    config = arms.build_mixture("50M", 32, QUARTER)
    limited = arms.limit_capacity(config, 1.2, evaluation_factor=1.2)
    assert (limited.moe.capacity_factor, limited.evaluation.capacity_factor) == (1.2, 1.2)
    assert arms.limit_capacity(config, 1.2).evaluation.capacity_factor == 0
    both = arms.set_balancing(config, 1e-4, 1e-3)
    assert (both.moe.balance_loss_weight, both.moe.bias_rule) == (1e-4, "sign")
    assert arms.set_balancing(both, 1e-2, 0).moe.bias_rule == "none"
    slices = arms.build_slices("50M", QUARTER)
    assert (slices.moe.num_experts, slices.moe.top_k, slices.moe.gate) == (4, 4, "uniform")
    assert arms.build_slices("50M", QUARTER, "softmax_top_k").moe.gate == "softmax_top_k"


def test_three_pools_that_use_more_than_the_dense_ffn_are_refused():
    """The study's scripts have them; their active width is 3/2 of the dense one."""
    with pytest.raises(
        UserError, match=re.escape("a token uses 1440 hidden units per layer, which is 3/2 of it")
    ):
        arms.build_pools("50M", THREE_POOLS)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: arms.build_dense("50m"), "unknown size '50m'; did you mean 50M?"),
        (lambda: arms.build_dense("huge"), "unknown size 'huge'; known sizes: 10M, 20M"),
        (lambda: arms.build_mixture("50M", 8, Fraction(2, 3)), "k = (1 - g_shared) / g = 3/2 must"),
        (lambda: arms.build_mixture("10M", 256, Fraction(1, 128)), "is 3/2 hidden units"),
        (lambda: arms.build_mixture("50M", 2, QUARTER), "moe.top_k=4 is larger than"),
        (lambda: arms.build_shared("50M", 31, QUARTER, QUARTER, "layer"), "must be one of none"),
        (lambda: arms.build_shared("50M", 31, QUARTER, QUARTER, "none"), "needs a placement"),
        (lambda: arms.build_shared("50M", 31, QUARTER, HALF + EIGHTH, "in_layer"), "= 3/2 must"),
    ],
)
def test_bad_arms_are_refused(build, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build()


def test_a_flop_match_that_rounding_would_hide_is_refused():
    """Widths (7, 7, 6) have the mean 20/3; three of them sum to 20 exactly, two to 40/3."""
    moe = {"moe.num_experts": 3, "moe.widths": (7, 7, 6), "moe.pairs": False}
    exact = loading.override_options(
        Config(), {**moe, "moe.top_k": 3, "moe.flop_matched_width": 20}
    )
    assert exact.active_width == 20
    message = (
        "moe.flop_matched_width=13, but a token uses 40/3 hidden units per layer, which is 40/39"
    )
    with pytest.raises(UserError, match=message):
        loading.override_options(Config(), {**moe, "moe.flop_matched_width": 13})
    with pytest.raises(UserError, match="is 97/96 of it instead of 1: model.dense_width=970"):
        loading.override_options(
            Config(), {"model.dense_width": 970, "moe.flop_matched_width": 960}
        )
