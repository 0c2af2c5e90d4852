"""Analyses of routing: the paper's own numbers from its own tables, and small cases worked by hand."""

import pathlib

import numpy as np
import pytest

from modse_jax.report import routing_statistics

DATA = pathlib.Path(__file__).parents[1] / "fixtures"


WIDTHS = (20, 4, 12, 12)


def table(name):
    return routing_statistics.read_csv(DATA / f"{name}.csv")


@pytest.mark.parametrize(
    "name, total",
    [
        ("baseline_300m_x8_epoch2", 3166962266),
        ("baseline_300m_x8_epoch7", 3130522930),
        ("modse_300m_x8_epoch2", 3166961547),
        ("modse_300m_x8_epoch7", 3130522452),
        ("difficult_table9", 24064),
    ],
)
def test_the_tables_are_whole(name, total, tmp_path):
    counts = table(name)
    assert counts.counts_YKE.shape == (8, 2, 8) and counts.counts_YKE.sum() == total
    routing_statistics.write_csv(tmp_path / "copy.csv", counts)
    assert (tmp_path / "copy.csv").read_text().split() == (DATA / f"{name}.csv").read_text().split()


@pytest.mark.parametrize(
    "name, millions",
    [
        ("modse_300m_x8_epoch2", (386.57, 388.18, 392.31, 397.21, 396.87, 398.41, 401.93, 405.47)),
        ("modse_300m_x8_epoch7", (386.33, 385.76, 388.30, 393.08, 392.72, 393.10, 394.87, 396.36)),
        (
            "baseline_300m_x8_epoch2",
            (392.74, 399.49, 393.54, 393.94, 396.49, 400.46, 395.34, 394.97),
        ),
        (
            "baseline_300m_x8_epoch7",
            (388.56, 393.84, 389.86, 390.55, 392.19, 394.09, 390.73, 390.69),
        ),
    ],
)
def test_figure_3(name, millions):
    np.testing.assert_allclose(
        routing_statistics.tokens_per_expert(table(name)) / 1e6, millions, atol=0.00501
    )


@pytest.mark.parametrize(
    "name, printed",
    [
        (
            "modse_300m_x8_epoch2",
            "3.01 5.06 3.07 5.25 1.99 2.62 1.51 1.34 1.64 1.51 1.55 1.83 2.32 2.23 1.49 1.53",
        ),
        (
            "modse_300m_x8_epoch7",
            "2.60 3.69 2.34 2.98 1.70 1.97 1.51 1.52 1.65 1.79 1.82 2.36 2.59 2.37 1.67 1.69",
        ),
        (
            "baseline_300m_x8_epoch2",
            "1.47 1.49 1.51 1.57 2.19 2.23 1.18 1.21 1.68 1.63 1.66 1.65 1.26 1.18 1.53 1.53",
        ),
        (
            "baseline_300m_x8_epoch7",
            "1.63 1.57 1.64 1.81 2.45 2.98 1.40 1.35 2.35 2.32 1.63 1.56 1.39 1.30 1.67 1.60",
        ),
    ],
)
def test_max_over_min_of_tables_7_and_8(name, printed):
    got = routing_statistics.max_over_min(table(name)).reshape(-1)
    np.testing.assert_allclose(got, [float(x) for x in printed.split()], atol=0.0051)


def test_mean_widths_of_the_papers_counts():
    for epoch, all_choices, first, second in ((2, 3810.2, 3693, 3927), (7, 3822.3, 3798, 3847)):
        counts = table(f"modse_300m_x8_epoch{epoch}")
        assert routing_statistics.mean_width(counts) == pytest.approx(all_choices, abs=0.05)
        np.testing.assert_allclose(
            routing_statistics.mean_width(counts, (0,)), (first, second), atol=0.51
        )
    layers = (3827.7, 3828.0, 3832.9, 3823.4, 3809.8, 3818.5, 3814.3, 3823.7)
    np.testing.assert_allclose(
        routing_statistics.mean_width(table("modse_300m_x8_epoch7"), (1,)), layers, atol=0.051
    )
    assert routing_statistics.mean_width(table("difficult_table9")) == pytest.approx(3973, abs=0.51)


def test_table_6():
    hard, every = table("difficult_table9"), table("modse_300m_x8_epoch7")
    assert routing_statistics.by_size(hard, 0) == (6215, 3085) and routing_statistics.by_size(
        hard
    ) == (10473, 8326)
    assert hard.counts_YKE[:, 0].sum(axis=0).tolist() == [
        1560,
        2313,
        2342,
        1166,
        1566,
        1363,
        873,
        849,
    ]
    np.testing.assert_allclose(
        routing_statistics.enrichment(hard, every),
        (1.01, 1.65, 1.64, 0.80, 1.01, 0.88, 0.57, 0.53),
        atol=0.0051,
    )


def trace(nll, ids, tokens=None, targets=None, sources=None):
    ids = np.array(ids)
    places = range(len(nll))
    return routing_statistics.Trace(
        np.array(nll, float),
        np.array(tokens or places),
        np.array(targets or places),
        np.array(sources or [0] * len(nll)),
        ids,
        np.full(ids.shape, 0.5),
    )


def test_difficult_tokens_fall_into_disjoint_bins():
    model = trace((1.0, 1.5, 0.5, 3.0), [[(0, 1), (0, 2), (3, 1), (1, 0)]])
    base = np.array((2.5, 1.9, 0.4, 2.1))
    rows = routing_statistics.difficult(base, base, model, WIDTHS, (2.0, 1.0))
    assert [(r["above"], r["below"], r["tokens"]) for r in rows] == [
        (2.0, np.inf, 2),
        (1.0, 2.0, 1),
    ]
    assert rows[0]["reduction"] == pytest.approx((1.5 - 0.9) / 2) and rows[1][
        "reduction"
    ] == pytest.approx(0.4)
    assert rows[0]["counts"].counts_YKE.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0]]]
    own = routing_statistics.difficult(
        model.nll_T, base, model, WIDTHS, (2.0,)
    )  # by the model's own loss
    assert own[0]["tokens"] == 1 and own[0]["reduction"] == pytest.approx(-0.9)


def test_difficult_entries_are_means_over_their_occurrences():
    model = trace(
        (1.0, 1.5, 0.5, 3.0, 2.0),
        [[(0, 1), (0, 2), (3, 1), (1, 0), (2, 3)]],
        targets=[7, 7, 8, 9, 7],
    )
    base = np.array((2.5, 1.9, 0.4, 1.1, 2.2))  # means: entry 7 2.2, 8 0.4, 9 1.1
    rows = routing_statistics.difficult_entries(base, base, model, WIDTHS, (2.0, 1.0))
    assert [r["tokens"] for r in rows] == [1, 1]
    assert rows[0]["reduction"] == pytest.approx(2.2 - 1.5) and rows[1][
        "reduction"
    ] == pytest.approx(1.1 - 3.0)
    assert rows[0]["counts"].counts_YKE.tolist() == [[[2, 0, 1, 0], [0, 1, 1, 1]]]


def test_sources_and_their_experts():
    a = trace([1] * 4, [[(0, 1), (0, 2), (3, 1), (1, 0)]], sources=[0, 0, 0, 1])
    np.testing.assert_allclose(
        routing_statistics.by_source(a, 3, 4), [[[2 / 3, 0, 0, 1 / 3], [0, 1, 0, 0], [0] * 4]]
    )


def test_stability_coactivation_and_specialists():
    a = trace([1] * 4, [[(0, 1), (0, 2), (3, 1), (1, 0)], [(1, 0)] * 4], tokens=[7, 7, 8, 8])
    b = trace([1] * 4, [[(0, 1), (2, 0), (3, 1), (0, 1)], [(1, 0)] * 4])
    assert routing_statistics.moved(a, b).tolist() == [0.5, 0]
    both = routing_statistics.coactivation(a, 4)
    assert both[1].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert both[0][0].tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert routing_statistics.specialists(a, 4, 0, least=2)[0] == (0, 7, 1.0, 2)
    assert routing_statistics.specialists(a, 4, 0, least=3) == []
    assert routing_statistics.width_of_first_choice(a, WIDTHS).tolist() == [12, 12, 8, 4]


def test_an_expert_without_tokens_is_infinitely_uneven(tmp_path):
    counts = routing_statistics.Counts(np.array([[[3, 0]]]), (4, 2))
    assert routing_statistics.max_over_min(counts)[0, 0] == np.inf
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        routing_statistics.read_csv(tmp_path / "x.csv")
