"""Widths in plain integers, with the errors a user meets."""
import pytest

from modse_jax.moe import sizing

RATIOS = ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))


def test_the_papers_widths():
    assert sizing.widths_from_ratio_pairs(RATIOS, 1536) == (6912, 768, 6144, 1536, 4608, 3072, 3840, 3840)
    assert sizing.widths_from_ratio_pairs(RATIOS, 2048) == (9216, 1024, 8192, 2048, 6144, 4096, 5120, 5120)


@pytest.mark.parametrize("call, message", [
    (lambda: sizing.widths_from_ratio_pairs(((2.5, 2.5),), 3), "ratios \\[2.5, 2.5\\] times model width 3"),
    (lambda: sizing.check_widths((3, -1)), "expert 1 has width -1"),
    (lambda: sizing.check_pairs((3, 3, 3), 3), "3 experts cannot form pairs"),
    (lambda: sizing.check_pairs((4, 2, 5, 2), 3), "experts 2 and 3 of widths 5 \\+ 2 = 7 must sum to 2 \\* width = 6"),
])
def test_rules_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_and_size_classes_cover_the_flat_axis_once():
    widths = (5, 2, 5, 7, 2)
    assert sizing.offsets(widths) == (0, 5, 7, 12, 19)
    classes = sizing.size_classes(widths)
    assert [k.width for k in classes] == [7, 5, 2]
    covered = sorted(c for k in classes for o in k.offsets for c in range(o, o + k.width))
    assert covered == list(range(sum(widths)))
    assert {e: widths[e] for k in classes for e in k.experts} == dict(enumerate(widths))
