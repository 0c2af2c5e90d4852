"""Look at prepared data: its card, decoded records with the borders of documents, histograms.

python -m modse_jax.data.inspect --data=DIR [--record=N] [--split=train] [--out=DIR]
"""

import argparse
import json
import pathlib
import sys

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from modse_jax.data import loader, prepare
from modse_jax.errors import UserError

matplotlib.use("Agg")


LOOKED_AT = 20_000  # records in the histograms


def show(dataset: loader.Dataset, split: str, number: int) -> str:
    """A record, decoded, a line per token run of a document."""
    record = loader.read_records(dataset, split, [number], dataset.card["vocab_size"])
    tokens, segments = record["tokens"][0], record["segments"][0]
    lines = [
        f"---- record {number} of {split}: {len(tokens)} tokens, {int(segments.max())} documents or parts, "
        f"{int((segments == 0).sum())} padding"
    ]
    for segment in range(1, int(segments.max()) + 1):
        ids = tokens[segments == segment].tolist()
        begins, ends = ids[0] == dataset.tokenizer.bos_id, ids[-1] == dataset.tokenizer.eos_id
        lines += [
            f"==== segment {segment}, {len(ids)} tokens, {'begins here' if begins else 'goes on from before'}, "
            f"{'ends here' if ends else 'goes on after'}",
            dataset.tokenizer.decode(ids).decode("utf-8", "replace"),
        ]
    return "\n".join(lines)


def draw(dataset: loader.Dataset, split: str, path: pathlib.Path) -> None:
    """Tokens of the documents' parts in a record, and documents per record, of the first records."""
    count = min(len(dataset.splits[split]), LOOKED_AT)
    segments = np.stack([dataset.splits[split][i]["segments"] for i in range(count)]).astype(
        np.int64
    )
    top = int(segments.max())
    sizes = np.concatenate([np.bincount(row, minlength=top + 1)[1:] for row in segments])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    axes[0].hist(sizes[sizes > 0], bins=40, color="#0072B2")
    axes[0].set(
        xlabel="tokens of a document in one record",
        ylabel="parts of documents",
        title=f"{split}: lengths",
    )
    axes[1].hist(segments.max(axis=1), bins=np.arange(0.5, top + 1.5), color="#D55E00")
    axes[1].set(
        xlabel="documents in a record", ylabel="records", title=f"{split}: first {count:,} records"
    )
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv=None):
    parser = prepare.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a prepared directory, or a run's data/")
    parser.add_argument("--record", type=int, default=0, help="the record to decode")
    parser.add_argument("--split", choices=prepare.SPLITS, default="train")
    parser.add_argument("--out", default=".", help="where lengths.png goes")
    a = parser.parse_args(argv)
    try:
        if not pathlib.Path(a.out).is_dir():
            raise UserError(f"--out={a.out} is not a directory")
        dataset = loader.open_prepared(pathlib.Path(a.data).expanduser().absolute())
        if not 0 <= a.record < len(dataset.splits[a.split]):
            raise UserError(
                f"--record={a.record}: {a.split} has records 0 to {len(dataset.splits[a.split]) - 1}"
            )
        card = {k: v for k, v in dataset.card.items() if k not in ("files", "splits", "waste")}
        print(json.dumps(card, indent=1))
        print(prepare.summary(dataset.card))
        print(show(dataset, a.split, a.record))
        path = pathlib.Path(a.out) / "lengths.png"
        draw(dataset, a.split, path)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
