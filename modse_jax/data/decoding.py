"""Decodes prepared records (fixed numbers of tokens) back to the documents they were made from."""

from collections.abc import Iterator

from modse_jax.data.prepared_data import Dataset


def decode_documents(dataset: Dataset, split: str) -> Iterator[bytes]:
    """Yields the documents of a split, decoded from its records.

    With `concat` packing these are exactly the bytes that were prepared, in the same order.
    """
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
