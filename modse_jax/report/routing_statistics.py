"""Statistics of routing: the paper's Figures 3 and 4 and Tables 5 to 9, router stability, and more.

The functions take counts of tokens per expert, or a trace: the loss and the routing of every
position of a text. Counts may also be those that the paper prints; the tests compare the results
with the paper's.

Legend: Y layers, K choice ranks (0 is the largest gate), E experts, T tokens (positions), V
vocabulary entries that occur, S sources (datasets).
"""

import csv
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from modse_jax.moe.layer_options import Pool, pool_ranges

# Lower ends of the bins of the baseline's cross-entropy, in nats (MoDSE, Table 5).
THRESHOLDS = (2.0, 1.8, 1.6, 1.4, 1.2, 1.05)

RANK_NAMES = ("first", "second", "third", "fourth")


class Counts(NamedTuple):
    """Tokens per expert, by layer and choice rank.

    Attributes:
        counts_YKE: int64. Entry [y, k, e] is the number of tokens whose choice of rank k in layer y
            is expert e.
        widths: Hidden widths of the experts.
    """

    counts_YKE: np.ndarray
    widths: tuple[int, ...]


class Trace(NamedTuple):
    """The loss and the routing of every position of a text.

    The paper does not say whether its "difficult token" is the input or the predicted token of a
    position. Here it is the predicted token, together with the experts that predicted it.

    Attributes:
        nll_T: Cross-entropy of the predicted token, nats.
        token_T: The input token.
        target_T: The predicted token, which follows the input token.
        source_T: Index of the dataset that the text is from.
        ids_YTK: The experts that process the position in each layer, by choice rank.
        gates_YTK: The gates of these experts.
    """

    nll_T: np.ndarray
    token_T: np.ndarray
    target_T: np.ndarray
    source_T: np.ndarray
    ids_YTK: np.ndarray
    gates_YTK: np.ndarray


class Bin(NamedTuple):
    """Statistics of the tokens whose loss is in the interval (above, below].

    Attributes:
        above: Lower end of the interval, nats, exclusive.
        below: Upper end of the interval, nats, inclusive.
        tokens: Number of these tokens: positions, or vocabulary entries.
        reduction: Mean of the baseline's loss minus the model's, nats; positive if the model is
            better. 0 if there are no tokens.
        counts: How often the model chose each expert for them.
    """

    above: float
    below: float
    tokens: int
    reduction: float
    counts: Counts


class Specialist(NamedTuple):
    """A vocabulary token and the expert that is its first choice most often, in one layer.

    Attributes:
        expert: That expert.
        token: The token id.
        share: Fraction of the token's occurrences whose first choice is that expert.
        occurrences: Number of occurrences of the token.
    """

    expert: int
    token: int
    share: float
    occurrences: int


def read_csv(path: pathlib.Path) -> Counts:
    """Reads a table of counts with the columns layer, choice, e0_hWIDTH, e1_hWIDTH, and so on.

    Raises:
        ValueError: The header is different.
    """
    with open(path, encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    expert_columns = header[2:]
    if header[:2] != ["layer", "choice"] or not all("_h" in name for name in expert_columns):
        raise ValueError(f"{path} has columns {header[:3]}, not layer, choice, e0_hWIDTH, ...")
    num_layers = len({int(row[0]) for row in rows})
    table = np.array([[int(count) for count in row[2:]] for row in rows], np.int64)
    widths = tuple(int(name.split("_h")[1]) for name in expert_columns)
    return Counts(table.reshape(num_layers, -1, table.shape[1]), widths)


def write_csv(path: pathlib.Path, counts: Counts) -> None:
    """Writes a table of counts that `read_csv` can read."""
    experts = [f"e{expert}_h{width}" for expert, width in enumerate(counts.widths)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "choice", *experts])
        for layer, counts_KE in enumerate(counts.counts_YKE):
            for rank, counts_E in enumerate(counts_KE):
                writer.writerow([layer, rank_name(rank), *counts_E.tolist()])


def rank_name(rank: int) -> str:
    """Returns the name of a choice rank: "first" for rank 0, "second" for rank 1, and so on."""
    return RANK_NAMES[rank] if rank < len(RANK_NAMES) else f"{rank + 1}th"


def tokens_per_expert(counts: Counts) -> np.ndarray:
    """Returns the tokens of each expert, summed over layers and choices (MoDSE, Figure 3), [E]."""
    return counts.counts_YKE.sum(axis=(0, 1))


def max_over_min(counts: Counts) -> np.ndarray:
    """Returns the most tokens of an expert over the fewest (MoDSE, Tables 7 and 8), [Y, K].

    1 means perfect balance. It is infinite if an expert has no tokens.
    """
    most_YK = counts.counts_YKE.max(axis=2)
    fewest_YK = counts.counts_YKE.min(axis=2)
    return np.where(fewest_YK > 0, most_YK / np.maximum(fewest_YK, 1), np.inf)


def split_pools(counts: Counts, pools: Sequence[Pool]) -> list[Counts]:
    """Returns the counts of every pool: its own experts, and its own choices."""
    return [
        Counts(counts.counts_YKE[:, pool.choices, pool.experts], counts.widths[pool.experts])
        for pool in pool_ranges(pools)
    ]


def mean_width(counts: Counts, axes: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """Returns the mean width of the chosen experts, sum(c_i * h_i) / sum(c_i).

    The counts that the paper prints give 3,810.2 at epoch 2 and 3,822.3 at epoch 7, while the paper
    reports 4,045 for all of training.

    Args:
        counts: Tokens per expert.
        axes: The axes over which the mean is taken: layers (0), choices (1) or both.
    """
    summed = counts.counts_YKE.sum(axis=axes)
    return summed @ np.array(counts.widths) / summed.sum(axis=-1)


def count_by_size(counts: Counts, rank: int | None = None) -> tuple[int, int]:
    """Returns the numbers of tokens of large and of small experts (MoDSE, Table 6).

    Large experts are wider than the mean of all experts, small ones are narrower.

    Args:
        counts: Tokens per expert.
        rank: The choice rank to count; None for all.

    Returns:
        (tokens of large experts, tokens of small experts).
    """
    counts_YKE = counts.counts_YKE if rank is None else counts.counts_YKE[:, rank : rank + 1]
    chosen_E = counts_YKE.sum(axis=(0, 1))
    widths = np.array(counts.widths)
    mean = np.mean(counts.widths)
    return int(chosen_E[widths > mean].sum()), int(chosen_E[widths < mean].sum())


def enrichment(some: Counts, every: Counts, rank: int = 0) -> np.ndarray:
    """Returns how much more often some tokens choose an expert than all tokens do, [E].

    It is the expert's share of the choices of `some` divided by its share of those of `every`.

    Args:
        some: Tokens per expert, of the selected tokens.
        every: Tokens per expert, of all tokens.
        rank: The choice rank to count.
    """
    some_E = some.counts_YKE[:, rank].sum(axis=0)
    every_E = every.counts_YKE[:, rank].sum(axis=0)
    some_share_E = some_E / max(some_E.sum(), 1)
    every_share_E = every_E / max(every_E.sum(), 1)
    return np.divide(some_share_E, every_share_E, out=np.zeros(len(some_E)), where=every_E > 0)


def count_choices(
    trace: Trace, widths: Sequence[int], selected_T: np.ndarray | None = None
) -> Counts:
    """Counts the tokens per expert in a trace.

    Args:
        trace: Loss and routing of every position.
        widths: Hidden widths of the experts.
        selected_T: Booleans that select the positions to count; None for all.
    """
    ids_YTK = trace.ids_YTK if selected_T is None else trace.ids_YTK[:, selected_T]
    num_layers, _, num_ranks = ids_YTK.shape
    counts_YKE = np.zeros((num_layers, num_ranks, len(widths)), np.int64)
    for layer, rank in np.ndindex(num_layers, num_ranks):
        ids_T = ids_YTK[layer, :, rank]
        counts_YKE[layer, rank] = np.bincount(ids_T, minlength=len(widths))
    return Counts(counts_YKE, tuple(widths))


def bin_difficult_positions(
    select_T: np.ndarray,
    base_T: np.ndarray,
    model: Trace,
    widths: Sequence[int],
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Bin]:
    """Divides positions by their loss into bins (MoDSE, Tables 5, 6 and 9, Figure 4).

    The reduction of a bin is the mean of the baseline's loss minus the model's. The paper uses the
    baseline's loss for the division, too. That overestimates the reduction of difficult tokens
    (regression to the mean), so `select_T` can also be the model's own loss or that of another
    baseline.

    Args:
        select_T: The loss of every position by which it is assigned to a bin.
        base_T: The loss of every position in the baseline.
        model: The trace of the model.
        widths: Hidden widths of its experts.
        thresholds: Lower ends of the bins, in descending order.

    Returns:
        The bins, the most difficult first.
    """

    def count_selected(selected_T: np.ndarray) -> Counts:
        return count_choices(model, widths, selected_T)

    return _make_bins(select_T, base_T - model.nll_T, thresholds, count_selected)


def bin_difficult_entries(
    select_T: np.ndarray,
    base_T: np.ndarray,
    model: Trace,
    widths: Sequence[int],
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Bin]:
    """Divides vocabulary entries by their loss into bins; see `bin_difficult_positions`.

    The loss of an entry is the mean over its occurrences in the text. In the resulting bins,
    `tokens` is the number of entries, and `counts` counts all their occurrences. The paper's 180
    difficult tokens are probably entries, because it counts several times as many choices.
    """
    _, entry_T, occurrences_V = np.unique(model.target_T, return_inverse=True, return_counts=True)
    select_V = np.bincount(entry_T, select_T) / occurrences_V
    reduction_V = np.bincount(entry_T, base_T - model.nll_T) / occurrences_V

    def count_selected(selected_V: np.ndarray) -> Counts:
        return count_choices(model, widths, selected_V[entry_T])

    return _make_bins(select_V, reduction_V, thresholds, count_selected)


def _make_bins(
    select: np.ndarray,
    reduction: np.ndarray,
    thresholds: Sequence[float],
    count_selected: Callable[[np.ndarray], Counts],
) -> list[Bin]:
    bins = []
    below = np.inf
    for above in thresholds:
        selected = (select > above) & (select <= below)
        mean = float(reduction[selected].mean()) if selected.any() else 0.0
        bins.append(Bin(above, below, int(selected.sum()), mean, count_selected(selected)))
        below = above
    return bins


def share_by_source(trace: Trace, num_sources: int, num_experts: int) -> np.ndarray:
    """Returns the share of each expert among the first choices of a dataset's tokens, [Y, S, E]."""
    num_layers = len(trace.ids_YTK)
    counts_YSE = np.zeros((num_layers, num_sources, num_experts), np.int64)
    for layer, source in np.ndindex(num_layers, num_sources):
        ids_T = trace.ids_YTK[layer, :, 0][trace.source_T == source]
        counts_YSE[layer, source] = np.bincount(ids_T, minlength=num_experts)
    return counts_YSE / np.maximum(counts_YSE.sum(axis=2, keepdims=True), 1)


def share_of_moved_choices(early: Trace, late: Trace) -> np.ndarray:
    """Returns the share of tokens whose first-choice expert differs between two checkpoints.

    Args:
        early: the recorded routing of the first checkpoint.
        late: the recorded routing of the second checkpoint on the same text.

    Returns:
        The share in each MoE layer, [layers].
    """
    return (early.ids_YTK[:, :, 0] != late.ids_YTK[:, :, 0]).mean(axis=1)


def coactivation(trace: Trace, num_experts: int) -> np.ndarray:
    """Returns how often two experts are chosen by the same token, [Y, E, E].

    Entry [y, i, j] is the share of the tokens that chose expert i in layer y that also chose expert
    j. The diagonal is 0.
    """
    shares = []
    for ids_TK in trace.ids_YTK:
        is_chosen_TE = np.zeros((len(ids_TK), num_experts))
        np.put_along_axis(is_chosen_TE, ids_TK, 1, axis=1)
        both_EE = is_chosen_TE.T @ is_chosen_TE
        tokens_E1 = np.diag(both_EE)[:, None]
        share_EE = both_EE / np.maximum(tokens_E1, 1)
        np.fill_diagonal(share_EE, 0)
        shares.append(share_EE)
    return np.array(shares)


def find_specialists(
    trace: Trace, num_experts: int, layer: int, min_count: int = 20
) -> list[Specialist]:
    """Finds the vocabulary tokens that one expert specializes in.

    Returns all tokens of the text, sorted by the share of a token's occurrences whose first choice
    is the same expert, largest share first. Tokens with equal shares are sorted by their number of
    occurrences.

    Args:
        trace: Loss and routing of every position.
        num_experts: Number of experts.
        layer: The layer whose choices are considered.
        min_count: Tokens that occur less often are left out.
    """
    tokens_V, entry_T, counts_V = np.unique(trace.token_T, return_inverse=True, return_counts=True)
    table_VE = np.zeros((len(tokens_V), num_experts), np.int64)
    np.add.at(table_VE, (entry_T, trace.ids_YTK[layer, :, 0]), 1)
    share_V = table_VE.max(axis=1) / counts_V
    expert_V = table_VE.argmax(axis=1)
    found = []
    for entry in np.lexsort((-counts_V, -share_V)):
        if counts_V[entry] >= min_count:
            found.append(
                Specialist(
                    int(expert_V[entry]),
                    int(tokens_V[entry]),
                    float(share_V[entry]),
                    int(counts_V[entry]),
                )
            )
    return found


def width_of_first_choice(trace: Trace, widths: Sequence[int]) -> np.ndarray:
    """Returns the width of every position's first-choice expert, as a mean over layers, [T]."""
    return np.array(widths)[trace.ids_YTK[:, :, 0]].mean(axis=0)
