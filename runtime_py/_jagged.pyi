"""Addresses and sizes as numbers; `jagged.py` says what they are of."""

def add_lengths(lengths: int, count: int, offsets: int, /) -> int: ...
def copy_ids(values: int, offsets: int, last: int, features: int, bags: int, ids: int, count: int, /) -> bool: ...
def plan_pieces(offsets: int, features: int, bags: int, pieces: int, ahead: int, /) -> list[tuple[int, int, int]]: ...
def cut_piece(
    values: int,
    weights: int,
    offsets: int,
    last: int,
    features: int,
    bags: int,
    first: int,
    end: int,
    ids: int,
    piece_weights: int,
    piece_offsets: int,
    /,
) -> bool: ...
