"""The table before every run: counts, the layer in words, and the symbols of the papers."""

from fractions import Fraction

from modse_jax.study import arms, model_table
from modse_jax.study.arms import PoolOfArm
from tests.helpers.configs import tiny_config


def test_table_of_pools_with_a_shared_expert():
    pools = (PoolOfArm(8, Fraction(1, 4), 1), PoolOfArm(16, Fraction(1, 8), 2))
    config = arms.build_pools("50M", pools, Fraction(1, 2), "in_layer")
    assert model_table.format_model_table(config).splitlines() == [
        "parameters                 all          active",
        "  embeddings        48,168,960      48,168,960",
        "  attention          1,152,000       1,152,000",
        "  shared             1,728,000       1,728,000",
        "  experts           13,824,000       1,728,000",
        "  router                28,800          28,800",
        "  norms                  5,040           5,040",
        "  total             64,906,800      52,810,800",
        "  weights           64,872,960      52,776,960  without router and norms",
        "FLOPs per token: 201,818,880 in training, if experts are equally loaded (OLMo-core's "
        "count: 201,834,720)",
        "layer: 8 experts of width 240, top-1; 16 experts of width 120, top-2; shared expert of "
        "width 480, in_layer",
        "relative to the dense FFN of width 960, whose FLOPs match: 1 * 1/4 + 2 * 1/8 + 1/2 = 1",
        "  Slicing and Dicing   n 24, k 3, g 1/6, s 9/2",
        "  Krajewski, joint law E 9/2",
        "  Krajewski            G 6",
        "  Ling                 E 24, G 3, A 2/9",
        "  Tencent              G 3, S 1/2",
    ]


def test_table_without_a_claim_is_relative_to_the_active_width():
    table = model_table.format_model_table(tiny_config())
    assert "layer: 4 experts of widths 20, 4, 12, 12, top-2\n" in table
    assert "relative to a dense FFN of width 24, the same as a token's experts\n" in table
    assert "Slicing and Dicing   n 4, k 2, g 1/2, s 2\n" in table


def test_a_dense_model_has_no_symbols():
    lines = model_table.format_model_table(arms.build_dense("10M")).splitlines()
    assert lines[-1] == "layer: dense FFN of width 192"
    assert not any(line.split()[0] in ("router", "experts") for line in lines)
