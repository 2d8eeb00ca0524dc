"""The rows phase: this process's share of the weight file, resumed or new, and what all processes' shares add up to."""

import json
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path

from export.errors import PublishError, SnapshotError
from export.journal import Journal, PieceResult, read_journals, set_aside_journals
from export.progress import Progress
from export.publish import Staging, fsync
from export.ranks import Ranks
from export.weight_file import WeightPlan, WrittenWeights, assemble, create_weight_file, write_pieces
from runtime_py.manifest import WEIGHTS

__all__ = ["help_with_rows", "prepare_rows", "write_rows"]


def prepare_rows(ranks: Ranks, plan: WeightPlan, staging: Staging) -> None:
    """Clears what an interrupted build has left, but the rows, makes the file, and lets the other ranks begin.

    Raises:
        OSError: the file cannot be written; a full disk shows here.
    """
    path = staging.folder / WEIGHTS
    for other in [*staging.folder.iterdir(), *staging.container.glob("scratch-*")]:
        if other != path.parent:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    set_aside_journals(staging.container)
    path.parent.mkdir(exist_ok=True)
    create_weight_file(path, plan)
    ranks.tell("staging", json.dumps([str(staging.container), str(staging.folder), plan.fingerprint]))


def write_rows(ranks: Ranks, plan: WeightPlan, staging: Staging, workers: int, progress: Progress) -> WrittenWeights:
    """What rank 0 does: writes its share, waits for the others', and adds all of them up.

    Raises:
        ExportError: see `write_pieces`; another rank has failed; or its work is not to be seen.
    """
    results = _write_share(ranks, plan, staging, workers, progress)
    for rank in range(1, ranks.world):
        ranks.wait(f"written by {rank}", rank)
    if ranks.world > 1:
        results = read_journals(staging.container, plan.fingerprint) | results
    missing = [piece.key for piece in plan.pieces if piece.key not in results]
    if missing:
        raise PublishError(
            f"{staging.container}: the journals lack {len(missing)} pieces; do all ranks see this folder?"
        )
    return assemble(plan, results)


def help_with_rows(ranks: Ranks, plan: WeightPlan, workers: int, progress: Progress) -> None:
    """What every other rank does: writes its share, as soon as rank 0 has prepared.

    Raises:
        ExportError: see `write_rows`; or this rank has planned another file than rank 0.
    """
    container, folder, fingerprint = json.loads(ranks.wait("staging", 0))
    if fingerprint != plan.fingerprint:
        raise SnapshotError(
            f"rank {ranks.rank} sees another snapshot, configuration or version than rank 0; all ranks need the same files"
        )
    _write_share(ranks, plan, Staging(Path(container), Path(folder)), workers, progress)
    ranks.tell(f"written by {ranks.rank}", "")


def _write_share(
    ranks: Ranks, plan: WeightPlan, staging: Staging, workers: int, progress: Progress
) -> dict[str, PieceResult]:
    """Writes the pieces of one rank, and makes them durable."""
    path = staging.folder / WEIGHTS
    pieces = plan.share(ranks.rank, ranks.world)
    finished = read_journals(staging.container, plan.fingerprint)
    table_bytes: Counter[str] = Counter()
    for piece in pieces:
        table_bytes[piece.table.name] += piece.bytes
    progress.start(table_bytes)
    results = {}
    with (
        Journal(staging.container, ranks.rank, plan.fingerprint) as journal,
        closing(write_pieces(path, pieces, workers, finished)) as written,
    ):
        for piece, result in written:
            if result is not finished.get(piece.key):
                journal.append(piece.key, result)
            results[piece.key] = result
            progress.advance(piece.table.name, piece.bytes)
            ranks.check()
        fsync(path)
        journal.sync()
    return results
