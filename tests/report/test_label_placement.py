import pytest

from jaxlm.report.label_placement import arrange, candidates

PANEL = (0.0, 0.0, 400.0, 300.0)


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@pytest.mark.parametrize("centres", [[(200, 150), (205, 155), (200, 170)], [(398, 150), (5, 5)], [(200, 150)] * 3])
def test_labels_stay_inside_and_apart(centres):
    centres = [tuple(map(float, c)) for c in centres]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    options = [candidates(c, [o for o in centres if o != c], 60.0, 1.0) for c in centres]
    boxes = [box for _, box in arrange(options, marks, PANEL, 1.0)]
    for i, box in enumerate(boxes):
        assert PANEL[0] <= box[0] and box[2] <= PANEL[2] and PANEL[1] <= box[1] and box[3] <= PANEL[3]
        assert not any(overlap(box, other) for other in [*boxes[:i], *marks])
