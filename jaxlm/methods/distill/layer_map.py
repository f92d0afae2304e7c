"""Which of the teacher's layers each of the student's layers learns from."""

from collections.abc import Sequence

LayerPairs = tuple[tuple[int, int], ...]


def layer_map(student_layers: int, teacher_layers: int, kind: str | Sequence[Sequence[int]]) -> LayerPairs:
    """Pairs `(student, teacher)` of depths: 0 is the embeddings, i the i-th layer.

    `uniform` spreads the student's layers over the teacher's, `last` maps them to its last ones, `final` pairs the two
    last layers only; or the pairs themselves, in which a layer may stand several times.

    >>> layer_map(2, 4, "uniform")
    ((0, 0), (1, 2), (2, 4))
    >>> layer_map(2, 4, "last")
    ((1, 3), (2, 4))
    >>> layer_map(2, 4, "final")
    ((2, 4),)
    """
    if kind == "uniform":
        pairs = [(i, round(i * teacher_layers / student_layers)) for i in range(student_layers + 1)]
    elif kind == "last":
        pairs = [(i, teacher_layers - student_layers + i) for i in range(1, student_layers + 1)]
    elif kind == "final":
        pairs = [(student_layers, teacher_layers)]
    elif isinstance(kind, str):
        raise ValueError(f"unknown layer map {kind!r}; known: uniform, last, final, or (student, teacher) pairs")
    else:
        pairs = [(s, t) for s, t in kind]
    for s, t in pairs:
        if not (0 <= s <= student_layers and 0 <= t <= teacher_layers):
            raise ValueError(f"layer pair ({s}, {t}) does not exist: 0..{student_layers} and 0..{teacher_layers} do")
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"the layer map {tuple(pairs)} is empty or names a pair twice")
    return tuple(pairs)
