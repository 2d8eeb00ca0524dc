"""Access counts: what is read, what is refused, and that rows are drawn in proportion to them."""

import numpy as np
import pytest
from support import write_counts

from export.access import AccessCounts, draw_bags, total_accesses
from export.config import AccessCountsConfig, EmbeddingBagConfig
from export.errors import AccessCountsError


def table(uri=None, rows=10, **names):
    counts = {"uri": str(uri), **names} if uri else None
    return EmbeddingBagConfig.model_validate(
        {"name": "t", "num_embeddings": rows, "embedding_dim": 4, "data_type": "fp32", "access_counts": counts}
    )


def test_a_row_has_the_sum_of_its_counts_over_all_files_and_none_where_it_is_not_named(tmp_path):
    write_counts(tmp_path / "monday.parquet", [3, 3, 0], [2, 5, 1])
    write_counts(tmp_path / "tuesday.parquet", np.array([9, 3], np.uint32), np.array([4, 1], np.int16))
    counts = AccessCounts("t", 10, AccessCountsConfig(uri=str(tmp_path)))
    with counts.by_row() as by_row:
        assert by_row.tolist() == [1, 0, 0, 8, 0, 0, 0, 0, 0, 4]
    assert counts.total() == total_accesses(table(tmp_path)) == 13


def test_rows_are_drawn_in_proportion_to_their_counts(tmp_path):
    rng = np.random.default_rng(1)
    weights = np.concatenate([rng.integers(0, 100, 149_990), np.full(10, 300_000)])
    write_counts(tmp_path / "counts.parquet", np.arange(150_000), weights)  # three batches
    drawn = AccessCounts("t", 150_000, AccessCountsConfig(uri=str(tmp_path))).draw(20_000, np.random.default_rng(2))
    assert (weights[drawn] > 0).all()
    heavy = (drawn >= 149_990).mean()
    assert heavy == pytest.approx(3_000_000 / weights.sum(), abs=0.02)
    assert not np.array_equal(drawn, np.sort(drawn))


def test_one_row_with_all_the_counts_is_the_only_one_drawn(tmp_path):
    write_counts(tmp_path / "c.parquet", [0, 7, 9], [0, 1, 0])
    assert set(np.concatenate(draw_bags(table(tmp_path), 3)).tolist()) == {7}


def test_bags_are_the_same_for_the_same_seed_and_others_for_another(tmp_path):
    write_counts(tmp_path / "c.parquet", np.arange(10), np.arange(10))
    for uri in (None, tmp_path):
        first, again, other = (draw_bags(table(uri), seed) for seed in (5, 5, 6))
        assert [bag.tolist() for bag in first] == [bag.tolist() for bag in again]
        assert [bag.tolist() for bag in first] != [bag.tolist() for bag in other]
        assert len(first) == 256
        assert {len(bag) for bag in first} == set(range(1, 9))
        assert all(((bag >= 0) & (bag < 10)).all() for bag in first)
    assert total_accesses(table()) == 0.0


@pytest.mark.parametrize(
    ("rows", "counts", "said"),
    [
        ([0, 10], [1, 1], r"row 1: index is 10, outside \[0, 10\), the table's rows"),
        ([-1], [1], r"row 0: index is -1, outside \[0, 10\)"),
        ([0, 1], [1, -2], "row 1: count is -2, expected 0 or more"),
        ([0, None], [1, 1], "row 1: index is null"),
        ([0, 1], [1, None], "row 1: count is null"),
        ([0.5], [1], "column 'index' is double, expected integers"),
        ([0], ["many"], "column 'count' is string, expected integers"),
        ([0, 1], [0, 0], "no row has an access count; remove the key 'access_counts'"),
    ],
)
def test_what_is_no_count_of_a_row_is_refused_by_file_and_row(tmp_path, rows, counts, said):
    write_counts(tmp_path / "c.parquet", rows, counts)
    with pytest.raises(AccessCountsError, match=f"table 't': .*{said}"):
        draw_bags(table(tmp_path), 0)


def test_columns_may_have_other_names_and_a_missing_one_lists_those_there_are(tmp_path):
    write_counts(tmp_path / "c.parquet", [1], [1], index="row", count="hits")
    assert np.concatenate(draw_bags(table(tmp_path, index="row", count="hits"), 0)).tolist().count(1) > 256
    with pytest.raises(
        AccessCountsError, match=r"no column 'index', it has: row, hits; name .* access_counts: \{index: …\}"
    ):
        draw_bags(table(tmp_path), 0)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(AccessCountsError, match=r"table 't': access counts .*absent: no such file or folder"):
        draw_bags(table(tmp_path / "absent"), 0)
