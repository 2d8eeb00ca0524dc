"""The main path: from a snapshot to an artifact, checked from outside."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from references import stored_rows
from safetensors import safe_open
from safetensors.torch import load_file
from support import FEATURES, PREFIX, TABLES, make_rows, state_dict, write_config

from export import build_artifact
from export.errors import ExportError, GateError, PublishError, RowsError, SnapshotError
from runtime_py import load_artifact, verify_artifact


def build(tmp_path, snapshot, name="artifact", tables=TABLES, **sections):
    config = write_config(tmp_path / f"{name}.yaml", snapshot, tables, **sections)
    return build_artifact(config, tmp_path / name, workers=2)


def test_workers_do_not_change_a_byte_of_the_rows_or_the_graph(tmp_path, dcp_snapshot):
    config = write_config(tmp_path / "c.yaml", dcp_snapshot)
    built = [build_artifact(config, tmp_path / str(workers), workers=workers).artifact for workers in (1, 3)]
    for file in ("weights/tables.safetensors", "graphs/lookup.torchscript.pt"):
        assert (built[0] / file).read_bytes() == (built[1] / file).read_bytes()


_OUTSIDER = """
import json, sys
from safetensors.numpy import load_file
rows = load_file(sys.argv[1] + "/weights/tables.safetensors")
manifest = json.load(open(sys.argv[1] + "/manifest.json"))
assert "torch" not in sys.modules
for table in manifest["tables"]:
    array = rows[table["name"]]
    assert list(array.shape) == [table["num_embeddings"], table["embedding_dim"]]
    print(table["name"], array.dtype, array.tobytes().hex())
"""


def test_an_outside_program_reads_every_row_with_safetensors_and_json_alone(built_artifact, rows):
    done = subprocess.run(
        [sys.executable, "-c", _OUTSIDER, str(built_artifact)], capture_output=True, text=True, check=True
    )
    found = {name: (dtype, data) for name, dtype, data in (line.split() for line in done.stdout.splitlines())}
    for table in TABLES:
        expected = stored_rows(rows[table["name"]].numpy(), table.get("serving_precision", "fp16"))
        assert found[table["name"]] == (str(expected.dtype), expected.tobytes().hex())


def test_the_loader_equals_torchrecs_quantized_collection_bit_for_bit(built_artifact, rows):
    """Over whole tables, not the probe rows of the build's own gate; the stored rows are read by safetensors."""
    from torchrec import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_configs import DataType
    from torchrec.quant.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    configs, weights = [], {}
    with safe_open(built_artifact / "weights/tables.safetensors", "pt") as file:
        for table in TABLES:
            stored = file.get_tensor(table["name"])
            weights[table["name"]] = (stored.view(torch.uint8), None)
            configs.append(
                EmbeddingBagConfig(
                    name=table["name"],
                    num_embeddings=table["num_embeddings"],
                    embedding_dim=table["embedding_dim"],
                    feature_names=table.get("feature_names", [table["name"]]),
                    pooling=PoolingType.MEAN if table.get("pooling") == "mean" else PoolingType.SUM,
                    data_type=DataType.FP16 if stored.dtype is torch.float16 else DataType.FP32,
                )
            )
    reference = EmbeddingBagCollection(configs, False, torch.device("cpu"), table_name_to_quantized_weights=weights)
    artifact = load_artifact(built_artifact)
    limits = {f: t["num_embeddings"] for t in TABLES for f in t.get("feature_names", [t["name"]])}
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 7, 200):
        lengths = torch.randint(0, 9, (len(FEATURES) * batch,), generator=generator, dtype=torch.int32)
        counts = lengths.view(len(FEATURES), -1).sum(1).tolist()
        values = [torch.randint(0, limits[f], (n,), generator=generator) for f, n in zip(FEATURES, counts, strict=True)]
        features = KeyedJaggedTensor(keys=FEATURES, values=torch.cat(values), lengths=lengths)
        expected = reference(features).to_dict()
        got = artifact(features)
        for feature in FEATURES:
            assert torch.equal(got[feature].view(torch.int32), expected[feature].view(torch.int32)), feature


def test_output_columns_have_the_order_of_the_embedding_bag_collection(built_artifact, tmp_path, dcp_snapshot):
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from export import LargeEmbeddings, load_config

    config = load_config(write_config(tmp_path / "c.yaml", dcp_snapshot))
    model = LargeEmbeddings(config.large_embeddings)
    model.fill({t["name"]: torch.ones(t["num_embeddings"], t["embedding_dim"]) for t in TABLES})
    ones = torch.ones(len(FEATURES), dtype=torch.int32)
    eager = model(KeyedJaggedTensor(keys=FEATURES, values=torch.zeros(len(FEATURES), dtype=torch.int64), lengths=ones))
    pooled = load_artifact(built_artifact)({name: [[0]] for name in FEATURES})
    assert pooled.keys() == list(eager.keys())
    assert [pooled[key].shape[1] for key in pooled.keys()] == list(eager.length_per_key())  # noqa: SIM118


def test_the_reports_hold_what_the_manifest_sums_up(built_artifact):
    manifest = verify_artifact(built_artifact)
    accuracy = json.loads((built_artifact / "reports/accuracy.json").read_text())
    parity = json.loads((built_artifact / "reports/parity.json").read_text())
    for figures, table in zip(manifest.accuracy, accuracy["tables"], strict=True):
        assert asdict(figures).items() <= table.items()
        assert sum(table["row_errors"]["rows"]) + table["row_errors"]["exact_rows"] == figures.rows
        assert table["lookups"]["bags"] == 256
    assert [figures.table for figures in manifest.accuracy] == [table["name"] for table in TABLES]
    assert manifest.parity.cases == len(parity["cases"])
    assert manifest.parity.quantization_max_error == max(case["max_error"] for case in parity["cases"])


def test_provenance_says_which_snapshot_step_tools_and_configuration(built_artifact, dcp_snapshot):
    provenance = verify_artifact(built_artifact).provenance
    (snapshot,) = provenance.snapshots
    assert (snapshot.uri, snapshot.format) == (str(dcp_snapshot), "dcp")
    assert provenance.tools["torch"] == torch.__version__
    assert provenance.configuration["large_embeddings"]["tables"][1]["feature_names"] == ["item", "last_item"]


def test_pretrained_rows_come_from_the_other_snapshot(tmp_path, rows, dcp_snapshot):
    other = make_rows([TABLES[0] | {"name": "people"}], seed=4)
    torch.save(state_dict(other), tmp_path / "other.pt")
    pretrained = {"emb_name": "people", "embedding_snapshot_uri": str(tmp_path / "other.pt")}
    result = build(tmp_path, dcp_snapshot, tables=[TABLES[0] | {"pretrained": pretrained}, *TABLES[1:]])
    with safe_open(result.artifact / "weights/tables.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("user"), other["people"].numpy().astype(np.float16))
        np.testing.assert_array_equal(file.get_tensor("item"), rows["item"].numpy())
    assert [snapshot.format for snapshot in result.manifest.provenance.snapshots] == ["dcp", "state_dict"]


def refuse(tmp_path, kind, match, rows, tables=TABLES, **sections):
    """Builds, expects one refusal, and nothing left behind."""
    torch.save(state_dict(rows), tmp_path / "snapshot.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=match):
        build(tmp_path, tmp_path / "snapshot.pt", "refused", tables, **sections)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*before, "refused.yaml"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65520.0, -1e30])
def test_values_that_fp16_cannot_hold_are_refused_with_their_place(tmp_path, rows, bad):
    rows = {name: tensor.clone() for name, tensor in rows.items()}
    rows["user"][123, 5] = bad
    rows["user"][299, 7] = bad
    refuse(tmp_path, RowsError, r"table 'user': .*row 123, column 5 is .*in all: 2 ", rows)


def test_fp32_serving_stores_what_fp16_cannot_hold(tmp_path, rows):
    rows = {name: tensor.clone() for name, tensor in rows.items()}
    rows["user"][0, 0] = 1e30
    torch.save(state_dict(rows), tmp_path / "snapshot.pt")
    result = build(tmp_path, tmp_path / "snapshot.pt", serving={"precision": "fp32"})
    assert load_artifact(result.artifact)({name: [[0]] for name in FEATURES})["user"][0, 0] == torch.tensor(1e30)


def test_a_missing_table_a_wrong_shape_and_a_wrong_type_are_refused_by_name(tmp_path, rows):
    without = {name: tensor for name, tensor in rows.items() if name != "tag"}
    refuse(tmp_path, SnapshotError, r"table 'tag': .* has no tensor .*embedding_bags\.tag\.weight", without)
    refuse(
        tmp_path,
        SnapshotError,
        r"'user': .*\[299, 8\], the configuration says \[300, 8\]",
        rows | {"user": rows["user"][1:]},
    )
    refuse(tmp_path, SnapshotError, r"'user': .*torch.float16, .*data_type: fp32", rows | {"user": rows["user"].half()})


def test_a_budget_that_fails_is_a_gate_error_and_leaves_nothing(tmp_path, dcp_snapshot):
    parity = {"budgets": {"fp16": {"max_relative_l2": 1e-9}}, "table_budgets": {"tag": {}}}
    with pytest.raises(GateError) as caught:
        build(tmp_path, dcp_snapshot, "refused", parity=parity)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("table 'user': relative_l2 is 0.0002")
    assert not (tmp_path / "refused").exists()


def test_a_table_of_subnormal_values_fails_the_default_budget(tmp_path, rows):
    rows = rows | {"user": rows["user"] * 1e-7}
    refuse(tmp_path, GateError, r"table 'user': relative_l2 .*above its budget max_relative_l2: 0.000976562", rows)


def test_an_existing_target_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "artifact").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        build(tmp_path, tmp_path / "no such snapshot")


def test_the_prefix_in_the_configuration_chooses_between_two_collections(tmp_path, rows):
    both = state_dict(rows) | state_dict(make_rows(TABLES, seed=8), "ema.ebc")
    torch.save(both, tmp_path / "two.pt")
    with pytest.raises(SnapshotError, match=r"2 candidates: .*snapshot.prefix"):
        build(tmp_path, tmp_path / "two.pt", "refused")
    config = write_config(tmp_path / "c.yaml", "", TABLES)
    document = json.loads(config.read_text())
    document["snapshot"] = {"uri": str(tmp_path / "two.pt"), "prefix": PREFIX}
    config.write_text(json.dumps(document))
    result = build_artifact(config, tmp_path / "artifact", workers=1)
    with safe_open(result.artifact / "weights/tables.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("item"), rows["item"].numpy())


@pytest.mark.parametrize("key", ["vocab", "access_counts"])
def test_a_path_that_is_no_text_is_refused_before_anything_is_read(tmp_path, dcp_snapshot, key):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    tables = [TABLES[0] | {key: "relative/to/it"}, *TABLES[1:]]
    config = write_config(folder / "r.yaml", dcp_snapshot, tables)
    with pytest.raises(PublishError, match="the name is not valid UTF-8; rename it"):
        build_artifact(config, tmp_path / "artifact", workers=1)
    assert not (tmp_path / "artifact").exists()


def test_every_file_may_be_read_by_whoever_the_umask_lets(built_artifact: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in built_artifact.rglob("*") if path.is_file()}
    assert {path for path, mode in modes.items() if mode != 0o666 & ~mask} == set()


def test_an_output_inside_an_artifact_is_refused(built_artifact: Path, dcp_snapshot: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "release.yaml", dcp_snapshot)
    (tmp_path / "manifest.json").write_text("{}")  # somebody else's
    for output in (built_artifact / "sub", built_artifact / "graphs" / "sub"):
        text = f"--output: {output} is inside the artifact {built_artifact}, which never changes; name another place"
        with pytest.raises(PublishError, match=f"^{re.escape(text)}$"):
            build_artifact(config, output, workers=1)
    build_artifact(config, tmp_path / "artifact", workers=1)


def test_tables_of_several_models_are_not_put_together(tmp_path: Path) -> None:
    """A table that was renamed in one model would be taken from another, a teacher or an average of it."""
    tables = [TABLES[0], TABLES[1]]
    rows = make_rows(tables)
    state = {
        "online.ebc.embedding_bags.user.weight": rows["user"],
        "teacher.ebc.embedding_bags.item.weight": rows["item"],
        "online.ebc.embedding_bags.item_v2.weight": rows["item"],
    }
    torch.save(state, tmp_path / "s.pt")
    text = (
        f"{tmp_path}/s.pt: the tables are in several collections: 'online.ebc' has 'user', 'teacher.ebc' has 'item'; say "
        "with snapshot.prefix which one is released, and take tables of another one with pretrained"
    )
    with pytest.raises(SnapshotError, match=f"^{re.escape(text)}"):
        build(tmp_path, tmp_path / "s.pt", tables=tables)
    taken = {"pretrained": {"embedding_snapshot_uri": "s.pt", "emb_name": "item"}}
    artifact = build(tmp_path, tmp_path / "s.pt", tables=[tables[0], tables[1] | taken]).artifact
    assert torch.equal(load_file(artifact / "weights/tables.safetensors")["item"], rows["item"].half())


def test_a_pretrained_table_of_one_of_several_models_is_named_by_its_prefix(tmp_path: Path) -> None:
    tables = [TABLES[0], TABLES[1]]
    rows, taught, averaged = (make_rows(tables, seed) for seed in range(3))
    torch.save(state_dict(rows), tmp_path / "s.pt")
    torch.save({**state_dict(taught, "teacher"), **state_dict(averaged, "average.ebc")}, tmp_path / "other.pt")
    taken = {"embedding_snapshot_uri": "other.pt", "emb_name": "item"}
    text = (
        f"table 'item': {tmp_path}/other.pt has 2 candidates: teacher.embedding_bags.item.weight, "
        "average.ebc.embedding_bags.item.weight; say which with pretrained.prefix"
    )
    with pytest.raises(SnapshotError, match=f"^{re.escape(text)}"):
        build(tmp_path, tmp_path / "s.pt", tables=[tables[0], tables[1] | {"pretrained": taken}])
    with pytest.raises(SnapshotError, match=r"has no tensor 'pupil\.embedding_bags\.item\.weight'"):
        build(tmp_path, tmp_path / "s.pt", tables=[tables[0], tables[1] | {"pretrained": taken | {"prefix": "pupil"}}])
    both = [
        table | {"pretrained": taken | {"emb_name": table["name"], "prefix": prefix}}
        for table, prefix in zip(tables, ("teacher", "average.ebc"), strict=True)
    ]
    artifact = build(tmp_path, tmp_path / "s.pt", tables=both).artifact
    stored = load_file(artifact / "weights/tables.safetensors")
    assert torch.equal(stored["user"], taught["user"].half())
    assert torch.equal(stored["item"], averaged["item"].half())
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert len(manifest["provenance"]["snapshots"]) == 2


def test_a_build_that_was_killed_when_it_was_done_leaves_its_container_to_the_next_one(
    tmp_path: Path, dcp_snapshot: Path
) -> None:
    build(tmp_path, dcp_snapshot)
    left, other = tmp_path / ".artifact.staging-abcd1234", tmp_path / ".artifact.staging-b.staging-abcd1234"
    for folder in (left, other):
        folder.mkdir()
        (folder / "export.lock").touch()
    with pytest.raises(PublishError, match="exists already"):
        build(tmp_path, dcp_snapshot)
    assert not left.exists()
    assert other.exists()  # of an artifact that is called artifact.staging-b
