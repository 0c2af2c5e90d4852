"""Statistics of routing: the paper's own numbers from its own tables, and small cases by hand."""

import pathlib

import numpy as np
import pytest
from matplotlib.patches import StepPatch

from modse_jax.moe.layer_options import Pool
from modse_jax.report import routing_statistics, run_plots
from modse_jax.report.routing_statistics import Counts, Trace

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
WIDTHS = (20, 4, 12, 12)


def read_table(name: str) -> Counts:
    return routing_statistics.read_csv(FIXTURES / f"{name}.csv")


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
def test_tables_are_complete_and_written_as_read(name, total, tmp_path):
    counts = read_table(name)
    assert counts.counts_YKE.shape == (8, 2, 8)
    assert counts.counts_YKE.sum() == total
    copy = tmp_path / "copy.csv"
    routing_statistics.write_csv(copy, counts)
    assert copy.read_text().split() == (FIXTURES / f"{name}.csv").read_text().split()


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
def test_tokens_per_expert_match_figure_3(name, millions):
    tokens = routing_statistics.tokens_per_expert(read_table(name))
    np.testing.assert_allclose(tokens / 1e6, millions, atol=0.00501)


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
def test_max_over_min_matches_tables_7_and_8(name, printed):
    imbalance = routing_statistics.max_over_min(read_table(name)).reshape(-1)
    np.testing.assert_allclose(imbalance, [float(x) for x in printed.split()], atol=0.0051)


@pytest.mark.parametrize(
    "epoch, all_choices, first, second", [(2, 3810.2, 3693, 3927), (7, 3822.3, 3798, 3847)]
)
def test_mean_widths_of_the_papers_counts(epoch, all_choices, first, second):
    counts = read_table(f"modse_300m_x8_epoch{epoch}")
    assert routing_statistics.mean_width(counts) == pytest.approx(all_choices, abs=0.05)
    by_rank = routing_statistics.mean_width(counts, (0,))
    np.testing.assert_allclose(by_rank, (first, second), atol=0.51)


def test_mean_widths_of_layers_and_of_difficult_tokens():
    expected = (3827.7, 3828.0, 3832.9, 3823.4, 3809.8, 3818.5, 3814.3, 3823.7)
    by_layer = routing_statistics.mean_width(read_table("modse_300m_x8_epoch7"), (1,))
    np.testing.assert_allclose(by_layer, expected, atol=0.051)
    difficult = routing_statistics.mean_width(read_table("difficult_table9"))
    assert difficult == pytest.approx(3973, abs=0.51)


def test_difficult_tokens_match_table_6():
    difficult = read_table("difficult_table9")
    every = read_table("modse_300m_x8_epoch7")
    assert routing_statistics.count_by_size(difficult, 0) == (6215, 3085)
    assert routing_statistics.count_by_size(difficult) == (10473, 8326)
    first_choices = difficult.counts_YKE[:, 0].sum(axis=0)
    assert first_choices.tolist() == [1560, 2313, 2342, 1166, 1566, 1363, 873, 849]
    np.testing.assert_allclose(
        routing_statistics.enrichment(difficult, every),
        (1.01, 1.65, 1.64, 0.80, 1.01, 0.88, 0.57, 0.53),
        atol=0.0051,
    )


def make_trace(nll, ids, tokens=None, targets=None, sources=None) -> Trace:
    ids = np.array(ids)
    positions = range(len(nll))
    return Trace(
        np.array(nll, float),
        np.array(tokens or positions),
        np.array(targets or positions),
        np.array(sources or [0] * len(nll)),
        ids,
        np.full(ids.shape, 0.5),
    )


def test_difficult_positions_are_in_disjoint_bins():
    model = make_trace((1.0, 1.5, 0.5, 3.0), [[(0, 1), (0, 2), (3, 1), (1, 0)]])
    base = np.array((2.5, 1.9, 0.4, 2.1))
    thresholds = (2.0, 1.0)
    bins = routing_statistics.bin_difficult_positions(base, base, model, WIDTHS, thresholds)
    hard, easier = bins
    assert (hard.above, hard.below, hard.tokens) == (2.0, np.inf, 2)
    assert (easier.above, easier.below, easier.tokens) == (1.0, 2.0, 1)
    assert hard.reduction == pytest.approx((1.5 - 0.9) / 2)
    assert easier.reduction == pytest.approx(0.4)
    assert hard.counts.counts_YKE.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0]]]


def test_difficult_positions_can_be_selected_by_the_models_own_loss():
    model = make_trace((1.0, 1.5, 0.5, 3.0), [[(0, 1), (0, 2), (3, 1), (1, 0)]])
    base = np.array((2.5, 1.9, 0.4, 2.1))
    own_loss = model.nll_T
    (hard,) = routing_statistics.bin_difficult_positions(own_loss, base, model, WIDTHS, (2.0,))
    assert hard.tokens == 1
    assert hard.reduction == pytest.approx(-0.9)


def test_difficult_entries_are_means_over_their_occurrences():
    model = make_trace(
        (1.0, 1.5, 0.5, 3.0, 2.0),
        [[(0, 1), (0, 2), (3, 1), (1, 0), (2, 3)]],
        targets=[7, 7, 8, 9, 7],
    )
    base = np.array((2.5, 1.9, 0.4, 1.1, 2.2))  # means: 2.2 of entry 7, 0.4 of 8, 1.1 of 9
    hard, easier = routing_statistics.bin_difficult_entries(base, base, model, WIDTHS, (2.0, 1.0))
    assert (hard.tokens, easier.tokens) == (1, 1)
    assert hard.reduction == pytest.approx(2.2 - 1.5)
    assert easier.reduction == pytest.approx(1.1 - 3.0)
    assert hard.counts.counts_YKE.tolist() == [[[2, 0, 1, 0], [0, 1, 1, 1]]]


def test_share_by_source_is_of_first_choices():
    trace = make_trace([1] * 4, [[(0, 1), (0, 2), (3, 1), (1, 0)]], sources=[0, 0, 0, 1])
    share = routing_statistics.share_by_source(trace, 3, 4)
    np.testing.assert_allclose(share, [[[2 / 3, 0, 0, 1 / 3], [0, 1, 0, 0], [0] * 4]])


IDS = [[(0, 1), (0, 2), (3, 1), (1, 0)], [(1, 0)] * 4]  # two layers


def test_moved_choices_are_first_choices_only():
    early = make_trace([1] * 4, IDS)
    late = make_trace([1] * 4, [[(0, 1), (2, 0), (3, 1), (0, 1)], [(1, 0)] * 4])
    assert routing_statistics.share_of_moved_choices(early, late).tolist() == [0.5, 0]


def test_coactivation_is_a_share_of_the_experts_tokens():
    share = routing_statistics.coactivation(make_trace([1] * 4, IDS), 4)
    assert share[1].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert share[0][0].tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])


def test_specialists_are_tokens_of_one_expert():
    trace = make_trace([1] * 4, IDS, tokens=[7, 7, 8, 8])
    best, *_ = routing_statistics.find_specialists(trace, 4, 0, min_count=2)
    assert best == (0, 7, 1.0, 2)
    assert routing_statistics.find_specialists(trace, 4, 0, min_count=3) == []


def test_width_of_first_choice_is_a_mean_over_layers():
    width = routing_statistics.width_of_first_choice(make_trace([1] * 4, IDS), WIDTHS)
    assert width.tolist() == [12, 12, 8, 4]


def test_imbalance_is_that_of_each_pool():
    """A choice of one pool is never an expert of another, which is no imbalance."""
    counts = Counts(np.array([[[4, 2, 0, 0], [0, 0, 3, 3], [0, 0, 3, 3]]]), (4, 2, 1, 1))
    first, second = routing_statistics.split_pools(counts, (Pool(2, 1), Pool(2, 2)))
    assert first.widths == (4, 2) and second.widths == (1, 1)
    assert routing_statistics.max_over_min(first).tolist() == [[2.0]]
    assert routing_statistics.max_over_min(second).tolist() == [[1.0, 1.0]]


def test_pictures_compare_with_an_even_share_of_the_pool():
    pools = (Pool(2, 1), Pool(4, 3))
    np.testing.assert_allclose(run_plots.even_shares(pools), [1 / 8] * 2 + [3 / 16] * 4)
    layers = [
        {
            "layer": 0,
            "tokens_per_expert": [8, 8, 12, 12, 12, 12],
            "tokens_per_expert_by_choice": [[8, 8, 0, 0, 0, 0], *[[0, 0, 4, 4, 4, 4]] * 3],
        }
    ]
    heatmap = run_plots.plot_load_heatmap(layers, (4, 4, 2, 2, 2, 2), pools, "step 1").figure
    np.testing.assert_allclose(heatmap.axes[0].images[0].get_array(), np.ones((1, 6)))
    bars = run_plots.plot_load_by_width(layers, (4, 4, 2, 2, 2, 2), pools, "step 1").figure
    line = next(patch for patch in bars.axes[0].patches if isinstance(patch, StepPatch))
    np.testing.assert_allclose(line.get_data().values, [12.5] * 2 + [18.75] * 4)


def test_imbalance_is_infinite_if_an_expert_has_no_tokens():
    counts = Counts(np.array([[[3, 0]]]), (4, 2))
    assert routing_statistics.max_over_min(counts)[0, 0] == np.inf


def test_tables_with_another_header_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        routing_statistics.read_csv(tmp_path / "x.csv")
