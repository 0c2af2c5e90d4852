"""Decodes prepared records (fixed numbers of tokens) back to the documents they were made from."""

from collections.abc import Iterator

from modse_jax.data.prepared_data import Dataset
from modse_jax.runtime import choices


def decode_documents(dataset: Dataset, split: str) -> Iterator[bytes]:
    """Yields the documents of a split, decoded from its records.

    With `concat` packing these are exactly the documents that were prepared, in the same order.
    With `best_fit` they are in the order of the records, and a document that was cut, because it
    does not fit into a record, is yielded in its pieces, which need not follow one another.
    """
    decoders = {"concat": _decode_sequence, "best_fit": _decode_pieces}
    return choices.look_up(decoders, "packing", dataset.card["packing"])(dataset, split)


def _decode_pieces(dataset: Dataset, split: str) -> Iterator[bytes]:
    """Yields the decoded documents and pieces of documents in records that `best_fit` packed."""
    begin_id = dataset.tokenizer.bos_id
    for record in dataset.splits[split]:
        for segment in range(1, int(record["segments"].max()) + 1):
            ids = record["tokens"][record["segments"] == segment].tolist()
            # A piece that continues a document repeats the last token of the piece before.
            yield dataset.tokenizer.decode(ids if ids[0] == begin_id else ids[1:])


def _decode_sequence(dataset: Dataset, split: str) -> Iterator[bytes]:
    """Yields the decoded documents of records that `concat` packed."""
    begin_id = dataset.tokenizer.bos_id
    document: list[int] = []
    for record in dataset.splits[split]:
        ids = record["tokens"][record["segments"] > 0].tolist()
        if document and ids[0] == document[-1]:
            ids = ids[1:]  # a document that continues repeats the last token of the record before
        for token in ids:
            if token == begin_id and document:
                yield dataset.tokenizer.decode(document)
                document = []
            document.append(token)
    if document:
        yield dataset.tokenizer.decode(document)
