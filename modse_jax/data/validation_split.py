"""The validation split: a deterministic choice of documents, by a hash of their names.

A document's score depends on its name only, so it stays in the same split when the source grows,
when it is read by another number of processes, and when it is prepared again.
"""

import hashlib

HASH_DIGITS = 13  # 52 bits: the most hexadecimal digits that a float holds exactly


def holdout_score(name: str) -> float:
    """Returns a hash of a document's name, as a number that is uniformly distributed in [0, 1).

    A document belongs to the validation split if its score is below `holdout_threshold`.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return int(digest[:HASH_DIGITS], 16) / 16**HASH_DIGITS


def holdout_threshold(
    num_below: int, lowest_score: float, highest_score: float, fraction: float
) -> float:
    """Returns the threshold of the validation split.

    A document belongs to it if its holdout score, a hash of its name in [0, 1), is below the
    threshold. The threshold is `fraction`, or a little lower or higher if one of the splits would
    be empty otherwise. A source of a single document cannot be split.

    Args:
        num_below: number of documents whose score is below `fraction`.
        lowest_score: lowest score of all documents.
        highest_score: highest score of all documents.
        fraction: requested share of validation documents.
    """
    if num_below == 0:
        return lowest_score + 16.0**-HASH_DIGITS
    return min(fraction, highest_score)
