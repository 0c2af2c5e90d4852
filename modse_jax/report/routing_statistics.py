"""What routing says: the paper's Figures 3 and 4, Tables 5 to 9, mean widths, router stability, co-activation.

Plain numpy on counts and on traces of single tokens, so that the paper's own tables can be put through the same code.

Legend: Y layers, K choice ranks (0: the largest gate), E experts, T tokens.
"""

import csv
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

THRESHOLDS = (2.0, 1.8, 1.6, 1.4, 1.2, 1.05)  # of a baseline's cross-entropy, nats (MoDSE, Table 5)


RANKS = ("first", "second", "third", "fourth")


class Counts(NamedTuple):
    """counts_YKE: int64, tokens of a layer whose k-th choice is an expert; widths: of the experts."""

    counts_YKE: np.ndarray
    widths: tuple[int, ...]


class Trace(NamedTuple):
    """What happened at every position of a text: the cross-entropy (nats) of the token that follows, the token there,
    the one that follows, which of the sources it is from, and the experts that saw it in every layer. The paper does
    not say which of the two tokens its difficult one is; here it is the one predicted, with the experts that did so.
    """

    nll_T: np.ndarray
    token_T: np.ndarray
    target_T: np.ndarray
    source_T: np.ndarray
    ids_YTK: np.ndarray
    gates_YTK: np.ndarray


def read_csv(path: pathlib.Path) -> Counts:
    """A table of counts: columns layer, choice, then e0_hWIDTH, ... (as the paper's counts are kept, and `write_csv`
    writes). Raises ValueError for another header."""
    with open(path) as file:
        header, *rows = list(csv.reader(file))
    if header[:2] != ["layer", "choice"] or not all("_h" in name for name in header[2:]):
        raise ValueError(f"{path} has columns {header[:3]}, not layer, choice, e0_hWIDTH, ...")
    layers = sorted({int(row[0]) for row in rows})
    table = np.array([[int(n) for n in row[2:]] for row in rows], np.int64)
    return Counts(
        table.reshape(len(layers), -1, table.shape[1]),
        tuple(int(n.split("_h")[1]) for n in header[2:]),
    )


def write_csv(path: pathlib.Path, counts: Counts) -> None:
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["layer", "choice", *(f"e{i}_h{w}" for i, w in enumerate(counts.widths))])
        for layer, counts_KE in enumerate(counts.counts_YKE):
            for rank, row in enumerate(counts_KE):
                out.writerow([layer, rank_name(rank), *row.tolist()])


def rank_name(rank: int) -> str:
    return RANKS[rank] if rank < len(RANKS) else f"{rank + 1}th"


def tokens_per_expert(counts: Counts) -> np.ndarray:
    """[E], summed over layers and choices (MoDSE, Figure 3)."""
    return counts.counts_YKE.sum(axis=(0, 1))


def max_over_min(counts: Counts) -> np.ndarray:
    """[Y, K]: most over fewest tokens of an expert (MoDSE, Tables 7 and 8); infinite where an expert has none."""
    least = counts.counts_YKE.min(axis=2)
    return np.where(least > 0, counts.counts_YKE.max(axis=2) / np.maximum(least, 1), np.inf)


def mean_width(counts: Counts, axes: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """sum c_i h_i / sum c_i, over layers (0) and choices (1) or one of them. In `modse_tables` it is 3,810.2 at epoch 2
    and 3,822.3 at epoch 7, where the paper prints 4,045 for all of training."""
    summed = counts.counts_YKE.sum(axis=axes)
    return summed @ np.array(counts.widths) / summed.sum(axis=-1)


def by_size(counts: Counts, rank: int | None = None) -> tuple[int, int]:
    """(tokens of experts wider, narrower than the mean), of one choice rank or of all (MoDSE, Table 6)."""
    chosen_E = (counts.counts_YKE if rank is None else counts.counts_YKE[:, rank : rank + 1]).sum(
        axis=(0, 1)
    )
    widths, mean = np.array(counts.widths), np.mean(counts.widths)
    return int(chosen_E[widths > mean].sum()), int(chosen_E[widths < mean].sum())


def enrichment(some: Counts, every: Counts, rank: int = 0) -> np.ndarray:
    """[E]: an expert's share of one choice rank among some tokens, over its share among all."""
    a, b = (c.counts_YKE[:, rank].sum(axis=0) for c in (some, every))
    return np.divide(a / max(a.sum(), 1), b / max(b.sum(), 1), out=np.zeros(len(a)), where=b > 0)


def counts_of(trace: Trace, widths: Sequence[int], chosen_T: np.ndarray | None = None) -> Counts:
    """Counts of the tokens where chosen_T holds, or of all."""
    ids = trace.ids_YTK if chosen_T is None else trace.ids_YTK[:, chosen_T]
    layers, _, ranks = ids.shape
    table = np.array(
        [
            [np.bincount(ids[y, :, k], minlength=len(widths)) for k in range(ranks)]
            for y in range(layers)
        ]
    )
    return Counts(table.astype(np.int64), tuple(widths))


def difficult(
    select_T: np.ndarray,
    base_T: np.ndarray,
    model: Trace,
    widths: Sequence[int],
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[dict]:
    """Tokens in disjoint bins of a loss, hardest first (MoDSE, Tables 5, 6 and 9, Figure 4).

    Args: select_T: the loss that chooses the bin. base_T: the baseline's loss. They are the same in the paper; but
    choosing by the loss that is then subtracted inflates the gain (regression to the mean), so choose also by the
    model's own loss, and by a second baseline's.
    Returns a row per bin: {"above", "below", "tokens", "reduction" (mean of base - model, nats), "counts"}.
    """
    return _bins(
        select_T, base_T - model.nll_T, thresholds, lambda mine_T: counts_of(model, widths, mine_T)
    )


def _bins(select, gain, thresholds, counts):
    rows, upper = [], np.inf
    for lower in thresholds:
        mine = (select > lower) & (select <= upper)
        rows.append(
            {
                "above": lower,
                "below": upper,
                "tokens": int(mine.sum()),
                "reduction": float(gain[mine].mean()) if mine.any() else 0.0,
                "counts": counts(mine),
            }
        )
        upper = lower
    return rows


def difficult_entries(
    select_T: np.ndarray,
    base_T: np.ndarray,
    model: Trace,
    widths: Sequence[int],
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[dict]:
    """`difficult` by vocabulary entry: an entry's loss is the mean over its occurrences, "tokens" counts entries, the
    reduction is their mean, and "counts" are of all their occurrences. The paper's 180 difficult tokens are probably
    such entries, since its counts are several times as many."""
    _, place_T, times = np.unique(model.target_T, return_inverse=True, return_counts=True)

    def mean(values_T):
        return np.bincount(place_T, values_T) / times

    return _bins(
        mean(select_T),
        mean(base_T - model.nll_T),
        thresholds,
        lambda mine_V: counts_of(model, widths, mine_V[place_T]),
    )


def by_source(trace: Trace, sources: int, experts: int) -> np.ndarray:
    """[Y, sources, E]: share of a source's first choices (specialisation by source)."""
    table = np.array(
        [
            [np.bincount(ids_T[trace.source_T == s], minlength=experts) for s in range(sources)]
            for ids_T in trace.ids_YTK[:, :, 0]
        ]
    )
    return table / np.maximum(table.sum(axis=2, keepdims=True), 1)


def moved(a: Trace, b: Trace) -> np.ndarray:
    """[Y]: share of tokens whose first choice differs between two checkpoints (router stability)."""
    return (a.ids_YTK[:, :, 0] != b.ids_YTK[:, :, 0]).mean(axis=1)


def coactivation(trace: Trace, experts: int) -> np.ndarray:
    """[Y, E, E]: of the tokens that chose expert i, the share that also chose j; 0 on the diagonal."""
    out = []
    for ids_TK in trace.ids_YTK:
        chosen_TE = np.zeros((len(ids_TK), experts))
        np.put_along_axis(chosen_TE, ids_TK, 1, axis=1)
        both_EE = chosen_TE.T @ chosen_TE
        share_EE = both_EE / np.maximum(np.diag(both_EE)[:, None], 1)
        np.fill_diagonal(share_EE, 0)
        out.append(share_EE)
    return np.array(out)


def specialists(
    trace: Trace, experts: int, layer: int, least: int = 20
) -> list[tuple[int, int, float, int]]:
    """(expert, token, share of the token's first choices, its count), the most one-sided tokens of a layer first; of
    tokens that occur `least` times."""
    tokens, place, counts = np.unique(trace.token_T, return_inverse=True, return_counts=True)
    table = np.zeros((len(tokens), experts), np.int64)
    np.add.at(table, (place, trace.ids_YTK[layer, :, 0]), 1)
    share, best = table.max(axis=1) / counts, table.argmax(axis=1)
    order = [i for i in np.lexsort((-counts, -share)) if counts[i] >= least]
    return [(int(best[i]), int(tokens[i]), float(share[i]), int(counts[i])) for i in order]


def width_of_first_choice(trace: Trace, widths: Sequence[int]) -> np.ndarray:
    """[T]: width of every token's first choice, mean over layers: what a coloured text shows."""
    return np.array(widths)[trace.ids_YTK[:, :, 0]].mean(axis=0)
