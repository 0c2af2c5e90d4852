"""The validation split is stable, and both splits have a document."""

from modse_jax.data.validation_split import holdout_score, holdout_threshold


def count_validation(fraction, scores):
    num_below = sum(score < fraction for score in scores)
    threshold = holdout_threshold(num_below, min(scores), max(scores), fraction)
    return sum(score < threshold for score in scores)


def test_fraction_of_documents_is_in_the_validation_split():
    scores = [holdout_score(f"n{i}") for i in range(200)]
    assert 5 < count_validation(0.1, scores) < 40
    assert count_validation(0.1, scores) == sum(score < 0.1 for score in scores)


def test_score_depends_on_the_name_only():
    """The scores of data that was prepared earlier must not change."""
    assert holdout_score("a") == 0xCA978112CA1BB / 16**13
    assert holdout_score("a") != holdout_score("b")


def test_no_split_is_empty_for_two_documents():
    scores = [holdout_score("a"), holdout_score("b")]
    assert count_validation(min(scores) / 2, scores) == 1
    assert count_validation(0.9999, scores) == 1
