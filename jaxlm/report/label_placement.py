"""Where labels of a chart stand: beside their points, covering as little as possible.

Pure geometry in pixels; `dot` is the number of pixels in a typographic point.
"""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""
OFFSETS = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)]
OFFSETS += [(0.5, 1.0), (-0.5, 1.0), (0.5, -1.0), (-0.5, -1.0)]
"""Where a label may stand: to the right of its point, to the left, above, …"""


def candidates(
    centre: tuple[float, ...], others: Sequence[tuple[float, ...]], width: float, dot: float
) -> list[tuple[float, Box]]:
    """Places for a label around its point, each with a cost for its distance and for being closer to another point."""
    options = []
    for gap in (10, 20, 34, 50):
        for across, up in OFFSETS:
            reach = gap * dot * (0.75 if across and up else 1)
            left = centre[0] + across * (reach + width / 2) - width / 2
            bottom = centre[1] + up * (reach + 12 * dot) - 12 * dot
            box = (left, bottom, left + width, bottom + 24 * dot)
            near = min((math.dist(other, nearest(box, other)) for other in others), default=math.inf)
            ambiguous = near < 1.5 * math.dist(centre, nearest(box, centre))
            options.append((4.0 * gap + 90 * ambiguous, box))
    return options


def nearest(box: Box, point: Sequence[float]) -> tuple[float, float]:
    """The point of a box that is nearest to another point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def arrange(
    options: Sequence[Sequence[tuple[float, Box]]], obstacles: Sequence[Box], inside: Box, dot: float
) -> list[tuple[float, Box]]:
    """One place for each label: each takes its cheapest given the others, in turn, until none moves."""
    fixed = [[far + _cost(box, obstacles, inside, dot) for far, box in places] for places in options]
    chosen = [costs.index(min(costs)) for costs in fixed]
    for _ in range(8):
        before = list(chosen)
        for i, places in enumerate(options):
            others = [options[j][chosen[j]][1] for j in range(len(options)) if j != i]
            others = [(box[0] - 5 * dot, box[1] - dot, box[2] + 5 * dot, box[3] + dot) for box in others]
            total = [cost + 3 * _cost(box, others, box, dot) for cost, (_, box) in zip(fixed[i], places, strict=True)]
            chosen[i] = total.index(min(total))
        if chosen == before:
            break
    return [places[k] for places, k in zip(options, chosen, strict=True)]


def _cost(box: Box, taken: Sequence[Box], inside: Box, dot: float) -> float:
    """In points: each obstacle touched, the area covered, and above all what would lie outside the panel."""
    touched = [area for other in taken if (area := _overlap(box, other)) > 0]
    outside = _overlap(box, box) - _overlap(box, inside)
    return 100 * len(touched) + (sum(touched) + 20 * outside) / dot**2


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
