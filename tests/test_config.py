"""The release configuration: what loads, and what each refusal says, with its file, line and key."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from export.config import (
    DEFAULT_BUDGETS,
    Budget,
    DataType,
    GraphKind,
    LargeEmbeddingsConfig,
    Mode,
    ParityConfig,
    Pooling,
    Precision,
    ReleaseConfig,
    ServingConfig,
    SnapshotFormat,
    Target,
    VocabularyConfig,
)
from export.config_file import load_config
from export.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"

BASE = """\
large_embeddings:
  tables:
    - name: user
      num_embeddings: 10
      embedding_dim: 4
      data_type: fp32
snapshot:
  uri: snapshots/demo
"""
LAST_LINE = len(BASE.splitlines())
TABLE = "large_embeddings.tables[0]"


def replaced(old: str, new: str) -> str:
    """The base with one of its lines in another form."""
    assert BASE.count(old) == 1, f"{old!r} is not one place of the base"
    return BASE.replace(old, new)


def table_with(lines: str) -> str:
    """The base with more keys in its table, from line 7 on."""
    return replaced("      data_type: fp32\n", "      data_type: fp32\n" + textwrap.indent(lines + "\n", "      "))


def release_with(lines: str) -> str:
    """The base with more sections, from line 9 on."""
    return BASE + lines + "\n"


def second_table(lines: str) -> str:
    """The base with a second table, from line 7 on."""
    item = "- num_embeddings: 3\n  embedding_dim: 2\n  data_type: fp32\n" + textwrap.indent(lines + "\n", "  ")
    return replaced("snapshot:\n", textwrap.indent(item, "    ") + "snapshot:\n")


def load(folder: Path, text: str | bytes) -> ReleaseConfig:
    path = folder / "release.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path)


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value).replace(str(folder / "release.yaml"), "release.yaml")


def label(value: object) -> str | None:
    """Names a case by everything but the text of its configuration."""
    return "" if isinstance(value, str) and value.endswith("\n") else None


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


# --- What loads ----------------------------------------------------------------------------------------------------


def test_upstreams_training_tables_load_unchanged(tmp_path: Path) -> None:
    section = (GOLDEN / "twhin_tables.yaml").read_text()
    config = load(tmp_path, f"large_embeddings:\n{textwrap.indent(section, '  ')}\nsnapshot: {{uri: model/100000}}\n")

    assert isinstance(config.large_embeddings, LargeEmbeddingsConfig)
    user, tweet = config.large_embeddings.tables
    assert (user.name, user.num_embeddings, user.embedding_dim, user.data_type) == ("user", 424241, 4, DataType.FP32)
    assert (tweet.name, tweet.num_embeddings, tweet.embedding_dim, tweet.data_type) == ("tweet", 72543, 4, "fp32")
    for table, rate in ((user, 0.01), (tweet, 0.005)):
        assert table.optimizer is not None
        assert table.optimizer.sgd is not None
        assert (table.optimizer.sgd.lr, table.optimizer.sgd.momentum) == (rate, 0.0)
        assert table.optimizer.learning_rate is not None
        assert table.optimizer.learning_rate.constant == rate
        assert (table.features, table.pooling, table.weighted) == ([table.name], Pooling.SUM, False)


@pytest.mark.parametrize(
    "optimizer",
    [
        "{adam: {lr: 0.1}}",
        "{adam: {lr: 0.1, betas: [0.8, 0.99], eps: 1.0e-8}}",
        "{adam: {lr: 1e-3, eps: 1e-8}}",
        "{sgd: {lr: 1, momentum: 0.9}}",
        "{adagrad: {lr: 0.1, eps: 0}}",
        "{sgd: {lr: 0.1}, learning_rate: {linear_ramp_to_constant: {learning_rate: 0.1, num_ramp_steps: 10}}}",
        "{sgd: {lr: 0.1}, learning_rate: {linear_ramp_to_cosine: "
        "{learning_rate: 0.1, final_learning_rate: 0.01, num_ramp_steps: 10, final_num_steps: 100}}}",
        "{sgd: {lr: 0.1}, learning_rate: {piecewise_constant: "
        "{learning_rate_boundaries: [1000, 2000], learning_rate_values: [0.1, 0.05, 0.01]}}}",
    ],
)
def test_every_optimizer_and_schedule_of_upstream_loads(tmp_path: Path, optimizer: str) -> None:
    config = load(tmp_path, table_with(f"optimizer: {optimizer}"))
    assert config.large_embeddings.tables[0].optimizer is not None


def test_what_the_configuration_leaves_out_has_a_default(tmp_path: Path) -> None:
    config = load(tmp_path, BASE)
    assert config.mode is Mode.INFERENCE
    assert config.surgery is None
    assert (config.snapshot.format, config.snapshot.step, config.snapshot.prefix) == (SnapshotFormat.AUTO, None, None)
    assert config.serving == ServingConfig(
        precision=Precision.FP16, graphs=[GraphKind.TORCHSCRIPT], targets=[Target.CPU]
    )
    assert config.parity == ParityConfig(seed=0, batches=8, budgets={}, table_budgets={})
    assert config.large_embeddings.tables_to_log is None
    assert not config.large_embeddings.weighted
    [table] = config.large_embeddings.tables
    assert (table.pretrained, table.vocab, table.optimizer, table.feature_names) == (None, None, None, None)
    assert table.serving_precision is None
    assert config.serving_precision(table) is Precision.FP16


def test_everything_that_this_version_builds_loads(tmp_path: Path) -> None:
    text = """\
        large_embeddings:
          tables:
            - name: user
              num_embeddings: 10
              embedding_dim: 4
              data_type: fp32
              weighted: true
              feature_names: [user, friend.of]
              pretrained: {emb_name: users, embedding_snapshot_uri: gs://bucket/users}
              serving_precision: fp32
            - {name: item, num_embeddings: 3, embedding_dim: 1, data_type: fp16, pooling: mean}
          tables_to_log: [user]
        mode: inference
        snapshot: {uri: snapshots, format: dcp, step: 0, prefix: model.ebc}
        serving: {precision: fp16, graphs: [torchscript], targets: [cpu]}
        surgery: null
        parity: {seed: 5, batches: 1, budgets: {fp16: {min_cosine: 0.9}}, table_budgets: {item: {}}}
        """
    config = load(tmp_path, textwrap.dedent(text))
    user, item = config.large_embeddings.tables
    assert user.features == ["user", "friend.of"]
    assert user.pretrained is not None
    assert user.pretrained.emb_name == "users"
    assert config.large_embeddings.weighted
    assert (item.features, item.pooling, item.weighted) == (["item"], Pooling.MEAN, False)
    assert (config.serving_precision(user), config.serving_precision(item)) == (Precision.FP32, Precision.FP16)
    assert (config.snapshot.format, config.snapshot.step, config.snapshot.prefix) == ("dcp", 0, "model.ebc")


def test_a_table_name_may_be_anything_that_torch_and_safetensors_take(tmp_path: Path) -> None:
    for name in ("weight", "ebc", "a b", "a/b", "ünï", 'quo"ted', "-", "1x"):
        config = load(tmp_path, replaced("name: user", f"name: '{name}'"))
        assert config.large_embeddings.tables[0].name == name


def test_a_yaml_anchor_and_a_merge_key_are_understood(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "large_embeddings:\n  tables:\n"
        "    - &base {name: a, num_embeddings: 3, embedding_dim: 2, data_type: fp16}\n"
        "    - {<<: *base, name: b}\n"
        "snapshot: {uri: x}\n",
    )
    assert [(table.name, table.num_embeddings) for table in config.large_embeddings.tables] == [("a", 3), ("b", 3)]


def test_a_standard_yaml_tag_does_not_change_what_a_value_is(tmp_path: Path) -> None:
    config = load(tmp_path, replaced("name: user", "name: !!str 7"))
    assert config.large_embeddings.tables[0].name == "7"


# --- Paths ---------------------------------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = table_with("pretrained: {emb_name: user, embedding_snapshot_uri: other/1200}").replace(
        "uri: snapshots/demo", "uri: ../snapshots/demo"
    )
    (tmp_path / "conf" / "release.yaml").write_text(text)
    for folder, path in ((tmp_path / "elsewhere", "../conf/release.yaml"), (tmp_path / "conf", "release.yaml")):
        monkeypatch.chdir(folder)
        config = load_config(path)
        assert config.snapshot.uri == str(tmp_path / "snapshots/demo")
        pretrained = config.large_embeddings.tables[0].pretrained
        assert pretrained is not None
        assert pretrained.embedding_snapshot_uri == str(tmp_path / "conf/other/1200")
        assert pretrained.emb_name == "user"


def test_absolute_paths_and_urls_stay_as_they_are_and_a_tilde_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri, expected in {
        "/data/snapshots": "/data/snapshots",
        "s3://bucket/a/../b": "s3://bucket/a/../b",
        "gs://bucket/x": "gs://bucket/x",
        "~/snapshots": str(tmp_path / "home/snapshots"),
    }.items():
        config = load(
            tmp_path,
            table_with(f"pretrained: {{emb_name: user, embedding_snapshot_uri: '{uri}'}}").replace(
                "uri: snapshots/demo", f"uri: '{uri}'"
            ),
        )
        assert config.snapshot.uri == expected
        pretrained = config.large_embeddings.tables[0].pretrained
        assert pretrained is not None
        assert pretrained.embedding_snapshot_uri == expected


@pytest.mark.parametrize("uri", ["'~nobody-of-that-name/x'", '"a\\0b"'], ids=["home of nobody", "NUL"])
def test_a_path_that_cannot_be_resolved_is_refused(tmp_path: Path, uri: str) -> None:
    assert "snapshot.uri" in refusal(tmp_path, replaced("uri: snapshots/demo", f"uri: {uri}"))


# --- Vocabularies --------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_a_path_as_in_training_or_a_mapping(tmp_path: Path) -> None:
    for text, expected in {
        "vocab: vocab/user/": VocabularyConfig(uri=str(tmp_path / "vocab/user")),
        "vocab: s3://bucket/user/": VocabularyConfig(uri="s3://bucket/user/"),
        "vocab: {uri: ids.parquet}": VocabularyConfig(uri=str(tmp_path / "ids.parquet")),
        "vocab: {uri: /v, entity_id: id, index: row, min_coverage: 0.5}": VocabularyConfig(
            uri="/v", entity_id="id", index="row", min_coverage=0.5
        ),
        "vocab: null": None,
    }.items():
        assert load(tmp_path, table_with(text)).large_embeddings.tables[0].vocab == expected


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("vocab: 7", 7, "vocab: expected a path, or a mapping with the key 'uri', got 7"),
        ("vocab: []", 7, "vocab: expected a path, or a mapping with the key 'uri', got []"),
        ("vocab: ''", 7, "vocab.uri: String should have at least 1 character"),
        ("vocab: {entity_id: x}", 7, "vocab.uri: Field required"),
        ("vocab:\n  uri: x\n  entity: y", 9, "vocab.entity: unknown key; did you mean 'entity_id'?"),
        ("vocab:\n  uri: x\n  min_coverage: 1.5", 9, "vocab.min_coverage: Input should be less than or equal to 1"),
        ("vocab: '~nobody-of-that-name/x'", None, "vocab.uri: '~nobody-of-that-name/x' is no path"),
    ],
)
def test_a_vocabulary_that_is_neither_is_refused(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    where = f"release.yaml:{line}: " if line else "release.yaml: "
    assert refusal(tmp_path, table_with(text)).startswith(f"{where}{TABLE}.{message}")


# --- Budgets -------------------------------------------------------------------------------------------------------


def test_a_tables_budget_comes_before_its_precisions_and_that_before_the_default(tmp_path: Path) -> None:
    text = """\
        parity:
          budgets:
            fp16: {max_relative_l2: 0.5}
          table_budgets:
            user: {min_cosine: 0.25}
        """
    config = load(tmp_path, release_with(textwrap.dedent(text)))
    [user] = config.large_embeddings.tables
    item = user.model_copy(update={"name": "item"})
    assert config.budgets(user, Precision.FP16) == [Budget(min_cosine=0.25)]
    assert config.budgets(user, Precision.FP32) == [Budget(min_cosine=0.25)]
    assert config.budgets(item, Precision.FP16) == [Budget(max_relative_l2=0.5)]
    assert config.budgets(item, Precision.INT8) == [DEFAULT_BUDGETS[Precision.INT8]]


def test_an_empty_budget_of_a_table_gates_nothing(tmp_path: Path) -> None:
    text = release_with("parity: {budgets: {fp16: {max_relative_l2: 0.5}}, table_budgets: {user: {}}}")
    config = load(tmp_path, text)
    assert config.budgets(config.large_embeddings.tables[0], Precision.FP16) == [Budget()]


@pytest.mark.parametrize(
    "columns", ["vocab: {uri: v, entity_id: index}", "access_counts: {uri: c, index: n, count: n}"]
)
def test_one_column_for_two_things_is_refused(tmp_path: Path, columns: str) -> None:
    assert "expected two columns, got '" in refusal(tmp_path, table_with(columns))


def test_the_default_budgets_allow_one_rounding_and_in_fp32_nothing() -> None:
    quantized = {Precision.INT8: (0.02, 0.999), Precision.INT4: (0.25, 0.97), Precision.INT2: (0.75, 0.75)}
    for precision, (error, cosine) in quantized.items():
        assert DEFAULT_BUDGETS[precision] == Budget(max_relative_l2=error, min_cosine=cosine)
    assert DEFAULT_BUDGETS[Precision.FP32] == Budget(max_absolute_error=0.0)
    assert DEFAULT_BUDGETS[Precision.FP16] == Budget(max_relative_l2=2**-10, min_cosine=0.999)


def test_a_table_left_to_auto_keeps_to_its_figures_and_to_its_own_budget(tmp_path: Path) -> None:
    text = (
        replaced("data_type: fp32", "data_type: fp32\n      serving_precision: auto")
        + "serving: {auto: {max_relative_l2: 0.1}}\n"
    )
    config = load(tmp_path, text)
    [user] = config.large_embeddings.tables
    assert config.serving_precision(user) is Precision.AUTO
    assert config.budgets(user, Precision.INT4) == [Budget(max_relative_l2=0.1, max_row_relative_l2=0.1)]
    config = load(tmp_path, text + "parity: {budgets: {int4: {min_cosine: 0.9}}}\n")
    assert config.budgets(user, Precision.INT4) == [
        Budget(min_cosine=0.9),
        Budget(max_relative_l2=0.1, max_row_relative_l2=0.1),
    ]
    assert config.budgets(user, Precision.INT8) == [Budget(max_relative_l2=0.1, max_row_relative_l2=0.1)]
    config = load(tmp_path, text.replace("max_relative_l2: 0.1", "max_bytes: 20 MB"))
    assert config.serving.auto is not None
    assert config.serving.auto.max_bytes == 20_000_000
    assert config.budgets(user, Precision.INT4) == [DEFAULT_BUDGETS[Precision.INT4]]


@pytest.mark.parametrize(
    ("dim", "offered", "candidates"),
    [
        (64, "", ["fp32", "fp16", "int8", "int4", "int2"]),
        (10, "", ["fp32", "fp16", "int8"]),
        (4, "", ["fp32", "fp16", "int8", "int4"]),
        (3, "", ["fp32", "fp16"]),
        (8, ", precisions: [int2, fp16]", ["fp16", "int2"]),
    ],
)
def test_auto_chooses_among_what_the_dimension_allows(
    tmp_path: Path, dim: int, offered: str, candidates: list[str]
) -> None:
    text = replaced("embedding_dim: 4", f"embedding_dim: {dim}\n      serving_precision: auto")
    config = load(tmp_path, text + f"serving: {{auto: {{min_cosine: 0.9{offered}}}}}\n")
    assert config.candidates(config.large_embeddings.tables[0]) == candidates


# --- Unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "nearest"),
    [
        (replaced("snapshot:", "snapshto:"), 7, "snapshto", "snapshot"),
        (replaced("tables:", "tabels:"), 2, "large_embeddings.tabels", "tables"),
        (replaced("num_embeddings:", "num_embedings:"), 4, f"{TABLE}.num_embedings", "num_embeddings"),
        (
            table_with("pretrained:\n  emb_nam: x\n  embedding_snapshot_uri: y"),
            8,
            f"{TABLE}.pretrained.emb_nam",
            "emb_name",
        ),
        (table_with("optimizer:\n  sdg: {lr: 0.1}"), 8, f"{TABLE}.optimizer.sdg", "sgd"),
        (
            table_with("optimizer:\n  sgd:\n    lr: 1\n    momentun: 1"),
            10,
            f"{TABLE}.optimizer.sgd.momentun",
            "momentum",
        ),
        (
            table_with("optimizer:\n  sgd: {lr: 1}\n  learning_rate:\n    constnt: 1"),
            10,
            f"{TABLE}.optimizer.learning_rate.constnt",
            "constant",
        ),
        (replaced("uri:", "ury:"), 8, "snapshot.ury", "uri"),
        (release_with("serving:\n  precison: fp16"), 10, "serving.precison", "precision"),
        (release_with("parity:\n  batch: 1"), 10, "parity.batch", "batches"),
        (
            release_with("parity:\n  budgets:\n    fp16:\n      min_cosin: 0.9"),
            12,
            "parity.budgets.fp16.min_cosin",
            "min_cosine",
        ),
        (
            release_with("parity:\n  table_budgets:\n    user:\n      max_absolut_error: 0.9"),
            12,
            "parity.table_budgets.user.max_absolut_error",
            "max_absolute_error",
        ),
    ],
    ids=label,
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one(
    tmp_path: Path, text: str, line: int, key: str, nearest: str
) -> None:
    lines = refusal(tmp_path, text).splitlines()
    assert f"release.yaml:{line}: {key}: unknown key; did you mean '{nearest}'?" in lines


@pytest.mark.parametrize(
    ("text", "line", "key", "shown"),
    [
        (replaced("uri: snapshots/demo", r'uri: "a\ud800"'), 8, "snapshot.uri", r"'a\ud800'"),
        (replaced("name: user", r'name: "\udfff"'), 3, f"{TABLE}.name", r"'\udfff'"),
        (
            release_with(
                textwrap.dedent(r"""
                surgery:
                  module: a:B
                  kwargs: {a: 1,
                    b: [{c: "\ud800x"}]}""").strip()
            ),
            12,
            "surgery.kwargs.b[0].c",
            r"'\ud800x'",
        ),
        (
            release_with(
                textwrap.dedent(r"""
                surgery:
                  module: a:B
                  kwargs: {"\ud800": 1}""").strip()
            ),
            11,
            "surgery.kwargs",
            r"'\ud800'",
        ),
    ],
    ids=["uri", "name", "inside", "key"],
)
def test_a_text_that_utf_8_cannot_hold_is_refused_wherever_it_is(
    tmp_path: Path, text: str, line: int, key: str, shown: str
) -> None:
    said = refusal(tmp_path, text)
    said.encode()
    assert said.endswith(
        f"release.yaml:{line}: {key}: {shown} has half a character, which no UTF-8 text has; write the character itself"
    ), said


def test_a_text_of_any_character_loads(tmp_path: Path) -> None:
    text = release_with('surgery: {module: "a:B", kwargs: {"\U0001f600 é": ["\U0001f600"]}}')
    surgery = load(tmp_path, text).surgery
    assert surgery is not None
    assert surgery.kwargs == {"\U0001f600 é": ["\U0001f600"]}


def test_a_key_that_is_no_text_is_unknown_in_its_line(tmp_path: Path) -> None:
    assert_matches(
        r"^release\.yaml:9: 7: unknown key; known keys: large_embeddings", refusal(tmp_path, release_with("7: 1"))
    )


def test_a_table_may_have_the_name_of_a_key(tmp_path: Path) -> None:
    text = replaced("name: user", "name: min_cosine") + "parity:\n  table_budgets:\n    min_cosine: {min_cosin: 1.0}\n"
    assert refusal(tmp_path, text) == (
        "release.yaml:11: parity.table_budgets.min_cosine.min_cosin: unknown key; did you mean 'min_cosine'?"
    )


def test_an_unknown_key_that_resembles_none_lists_the_known_ones(tmp_path: Path) -> None:
    assert refusal(tmp_path, release_with("zzz: 1")) == (
        "release.yaml:9: zzz: unknown key; known keys: large_embeddings, mode, snapshot, serving, surgery, parity"
    )


# --- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('"10"', "valid integer.*got '10'"),
        ("ten", "valid integer.*got 'ten'"),
        ("true", "valid integer.*got True"),
        ("10.0", r"valid integer.*got 10\.0"),
        ("null", "valid integer.*got None"),
        ("[10]", "valid integer"),
        ("{a: 10}", "valid integer"),
        ("0", "greater than or equal to 1.*got 0"),
        ("-10", "greater than or equal to 1.*got -10"),
        ("9223372036854775808", "less than 9223372036854775808.*got 9223372036854775808"),
    ],
)
def test_a_number_of_rows_is_a_positive_integer(tmp_path: Path, value: str, problem: str) -> None:
    message = refusal(tmp_path, replaced("num_embeddings: 10", f"num_embeddings: {value}"))
    assert message.startswith(f"release.yaml:4: {TABLE}.num_embeddings: ")
    assert_matches(problem, message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "line", "key", "problem"),
    [
        (replaced("embedding_dim: 4", "embedding_dim: true"), 5, f"{TABLE}.embedding_dim", "integer, got True"),
        (replaced("embedding_dim: 4", "embedding_dim: -4"), 5, f"{TABLE}.embedding_dim", "equal to 1, got -4"),
        (replaced("embedding_dim: 4", "embedding_dim: 1048577"), 5, f"{TABLE}.embedding_dim", "1048576, got 1048577"),
        (replaced("fp32", "fp64"), 6, f"{TABLE}.data_type", "'fp32' or 'fp16', got 'fp64'"),
        (replaced("fp32", "16"), 6, f"{TABLE}.data_type", "'fp32' or 'fp16', got 16"),
        (replaced("name: user", "name: 7"), 3, f"{TABLE}.name", "valid string, got 7"),
        (replaced("name: user", "name: null"), 3, f"{TABLE}.name", "valid string, got None"),
        (replaced("uri: snapshots/demo", "uri: 7"), 8, "snapshot.uri", "valid string, got 7"),
        (replaced("uri: snapshots/demo", "uri: null"), 8, "snapshot.uri", "valid string, got None"),
        (table_with("pooling: max"), 7, f"{TABLE}.pooling", "'sum' or 'mean', got 'max'"),
        (table_with("weighted: maybe"), 7, f"{TABLE}.weighted", "valid boolean.*got 'maybe'"),
        (table_with("weighted: 1"), 7, f"{TABLE}.weighted", "valid boolean, got 1"),
        (table_with("optimizer: {sgd: {lr: true}}"), 7, f"{TABLE}.optimizer.sgd.lr", "valid number, got True"),
        (table_with("feature_names: user"), 7, f"{TABLE}.feature_names", "valid list.*got 'user'"),
        (table_with("feature_names: []"), 7, f"{TABLE}.feature_names", "at least 1 item"),
        (table_with("feature_names: [a, 7]"), 7, f"{TABLE}.feature_names[1]", "valid string, got 7"),
        (table_with('feature_names: [""]'), 7, f"{TABLE}.feature_names[0]", "printable and not empty, got ''"),
        (table_with('feature_names: ["a\\tb"]'), 7, f"{TABLE}.feature_names[0]", r"printable.*got 'a\\tb'"),
        (table_with("optimizer: sgd"), 7, f"{TABLE}.optimizer", "dictionary"),
        (table_with("optimizer:\n  sgd: {lr: fast}"), 8, f"{TABLE}.optimizer.sgd.lr", "number.*got 'fast'"),
        (table_with("pretrained: {emb_name: x}"), 7, f"{TABLE}.pretrained.embedding_snapshot_uri", "required"),
        (release_with("mode: testing"), 9, "mode", "'train', 'evaluate' or 'inference', got 'testing'"),
        (release_with("serving: null"), 9, "serving", "dictionary.*got None"),
        (release_with("serving:\n  graphs: torchscript"), 10, "serving.graphs", "valid list"),
        (release_with("serving:\n  graphs: []"), 10, "serving.graphs", "at least 1 item"),
        (release_with("serving:\n  targets: [tpu]"), 10, "serving.targets[0]", "'cpu' or 'cuda', got 'tpu'"),
        (release_with("parity:\n  seed: -1"), 10, "parity.seed", "equal to 0, got -1"),
        (release_with("parity:\n  seed: true"), 10, "parity.seed", "integer, got True"),
        (release_with("parity:\n  batches: 0"), 10, "parity.batches", "equal to 1, got 0"),
        (
            release_with("parity:\n  table_budgets:\n    user: {min_cosine: 1.5}"),
            11,
            "parity.table_budgets.user.min_cosine",
            r"less than or equal to 1, got 1\.5",
        ),
        (
            release_with("parity:\n  table_budgets:\n    user: {max_absolute_error: .nan}"),
            11,
            "parity.table_budgets.user.max_absolute_error",
            "finite number, got nan",
        ),
        (
            release_with("parity:\n  table_budgets:\n    user: {max_absolute_error: -0.5}"),
            11,
            "parity.table_budgets.user.max_absolute_error",
            r"equal to 0, got -0\.5",
        ),
        (
            release_with("parity:\n  table_budgets:\n    user: {max_absolute_error: true}"),
            11,
            "parity.table_budgets.user.max_absolute_error",
            "valid number, got True",
        ),
        (release_with("parity:\n  budgets:\n    bf16: {}"), 11, "parity.budgets.bf16", "'fp32', 'fp16'.*got 'bf16'"),
        (replaced("uri: snapshots/demo", "uri: x\n  step: -1"), 9, "snapshot.step", "equal to 0, got -1"),
        (replaced("uri: snapshots/demo", "uri: x\n  step: true"), 9, "snapshot.step", "integer, got True"),
        (replaced("uri: snapshots/demo", 'uri: x\n  step: "3"'), 9, "snapshot.step", "integer, got '3'"),
        (replaced("uri: snapshots/demo", "uri: x\n  format: zip"), 9, "snapshot.format", "'dcp'.*got 'zip'"),
    ],
    ids=label,
)
def test_a_value_that_does_not_fit_is_refused_with_its_line_its_key_and_what_came(
    tmp_path: Path, text: str, line: int, key: str, problem: str
) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"release.yaml:{line}: {key}: ")
    assert_matches(problem, message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (replaced("      embedding_dim: 4\n", ""), 3, f"{TABLE}.embedding_dim"),
        (replaced("    - name: user\n      num", "    - num"), 3, f"{TABLE}.name"),
        (BASE[: BASE.index("snapshot:")], 1, "snapshot"),
        ("snapshot: {uri: x}\n", 1, "large_embeddings"),
        ("large_embeddings: {}\nsnapshot: {uri: x}\n", 1, "large_embeddings.tables"),
    ],
    ids=label,
)
def test_a_missing_key_is_named(tmp_path: Path, text: str, line: int, key: str) -> None:
    assert refusal(tmp_path, text) == f"release.yaml:{line}: {key}: Field required"


def test_a_section_without_tables_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "large_embeddings:\n  tables: []\nsnapshot: {uri: x}\n")
    assert_matches(r"^release\.yaml:2: large_embeddings\.tables: .*at least 1 item", message)


# --- Names ---------------------------------------------------------------------------------------------------------

RESERVED = sorted(dir(torch.nn.ModuleDict()))


@pytest.mark.parametrize("name", ["a.b", ".", "__metadata__", "forward", "keys", "type"])
def test_a_table_name_that_torch_or_safetensors_reserves_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, replaced("name: user", f"name: '{name}'"))
    assert message == f"release.yaml:3: {TABLE}.name: '{name}' cannot name a table: torch or safetensors reserves it"


def test_every_name_that_a_module_dict_refuses_is_refused(tmp_path: Path) -> None:
    refused = []
    for name in RESERVED:
        with pytest.raises(KeyError):  # why it is reserved: torchrec keeps its tables in a ModuleDict
            torch.nn.ModuleDict()[name] = torch.nn.Identity()
        try:
            load(tmp_path, replaced("name: user", f"name: {name}"))
        except ConfigError:
            refused.append(name)
    assert refused == RESERVED


@pytest.mark.parametrize(("name", "shown"), [('""', "''"), ('"a\\nb"', r"'a\nb'"), ('"a\\u200bb"', r"'a\u200bb'")])
def test_a_table_name_that_is_empty_or_cannot_be_printed_is_refused(tmp_path: Path, name: str, shown: str) -> None:
    message = refusal(tmp_path, replaced("name: user", f"name: {name}"))
    assert message == f"release.yaml:3: {TABLE}.name: a name must be printable and not empty, got {shown}"


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, second_table("name: user\nfeature_names: [other]"))
    assert "large_embeddings" in message
    assert message.endswith("duplicate table name 'user'")


def test_one_feature_of_two_tables_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, second_table("name: item\nfeature_names: [item, user]"))
    assert "large_embeddings" in message
    assert message.endswith(
        "duplicate feature name 'user' in tables 'user' and 'item'; a feature looks rows up in one table: give the other one "
        "a name of its own, and send ids twice"
    )


def test_one_feature_twice_in_a_table_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, table_with("feature_names: [a, b, a]"))
    assert message.endswith("duplicate feature name 'a' in table 'user'")


@pytest.mark.parametrize(
    ("lines", "line"), [("name: user\nfeature_names: [x]", 10), ("name: item\nfeature_names: [user]", 11)]
)
def test_a_duplicate_name_is_reported_in_its_own_table(tmp_path: Path, lines: str, line: int) -> None:
    message = refusal(tmp_path, second_table(lines))
    reported = int(message.split(":")[1])
    assert 7 <= reported <= line, f"the second name stands in line {line}, the table begins in line 7: {message}"


# --- What contradicts itself, or is not built yet ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "chosen"),
    [("{}", "[]"), ("{learning_rate: {constant: 1}}", "[]"), ("{sgd: {lr: 1}, adam: {lr: 1}}", "['adam', 'sgd']")],
)
def test_a_table_has_exactly_one_optimizer(tmp_path: Path, optimizer: str, chosen: str) -> None:
    message = refusal(tmp_path, table_with(f"optimizer: {optimizer}"))
    assert message == (
        f"release.yaml:7: {TABLE}.optimizer: exactly one of adam, sgd, adagrad is required, got {chosen}"
    )


def test_weights_with_mean_pooling_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, table_with("weighted: true\npooling: mean"))
    assert message.startswith("release.yaml:3: ")
    assert f"{TABLE}: per-sample weights need pooling: sum" in message


@pytest.mark.parametrize(
    ("text", "line", "key", "value", "built"),
    [
        (release_with("serving:\n  targets:\n    - cpu\n    - cuda"), 12, "serving.targets[1]", "cuda", "cpu"),
    ],
    ids=label,
)
def test_what_this_version_does_not_build_is_refused_with_what_it_does(
    tmp_path: Path, text: str, line: int, key: str, value: str, built: str
) -> None:
    assert refusal(tmp_path, text) == (
        f"release.yaml:{line}: {key}: '{value}' is not supported by this version, which has: {built}"
    )


@pytest.mark.parametrize(
    ("precision", "dim", "divisor"),
    [("int8", 3, 2), ("int4", 2, 4), ("int4", 10, 4), ("int2", 4, 8), ("int2", 100, 8)],
)
def test_rows_that_would_not_fill_whole_16_bit_units_are_refused(
    tmp_path: Path, precision: str, dim: int, divisor: int
) -> None:
    expected = (
        f"table 'user': {precision} needs an embedding_dim that is a multiple of {divisor} (FBGEMM's rows are whole "
        f"16-bit units), got {dim}; choose another precision for this table"
    )
    own = replaced("embedding_dim: 4", f"embedding_dim: {dim}\n      serving_precision: {precision}")
    assert refusal(tmp_path, own).endswith(f": {TABLE}.serving_precision: {expected}")
    for_all = replaced("embedding_dim: 4", f"embedding_dim: {dim}") + f"serving: {{precision: {precision}}}\n"
    assert refusal(tmp_path, for_all).endswith(f": {TABLE}.serving_precision: {expected}")


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int16", "INT8", "8"])
def test_an_unknown_precision_is_refused_with_those_that_there_are(tmp_path: Path, precision: str) -> None:
    message = refusal(tmp_path, table_with(f"serving_precision: '{precision}'"))
    assert_matches(f"'fp32', 'fp16', 'int8', 'int4', 'int2' or 'auto', got '{precision}'", message)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (
            table_with("serving_precision: auto"),
            f"{TABLE}.serving_precision",
            "table 'user': 'auto' needs something to keep to; add serving.auto with max_relative_l2, min_cosine or max_bytes",
        ),
        (
            release_with("serving: {precision: auto}"),
            "serving.precision",
            "table 'user': 'auto' needs something to keep to; add serving.auto with max_relative_l2, min_cosine or max_bytes",
        ),
        (
            release_with("serving: {precision: auto, auto: {}}"),
            "serving.auto",
            "a limit is required: max_relative_l2, min_cosine or max_bytes",
        ),
        (
            release_with("serving: {auto: {min_cosine: 0.9}}"),
            "serving.auto",
            "no table is left to 'auto'; remove the key, or say serving_precision: auto",
        ),
        (
            release_with("serving: {precision: auto, auto: {min_cosine: 0.9, precisions: [int2]}}"),
            TABLE,
            "table 'user': no rows of 4 values in int2",
        ),
        (
            release_with("serving: {precision: auto, auto: {min_cosine: 0.9, precisions: [auto]}}"),
            "serving.auto.precisions[0]",
            "'auto' is no type of rows; expected one of fp32, fp16, int8, int4, int2",
        ),
    ],
    ids=label,
)
def test_auto_without_what_it_needs_is_refused(tmp_path: Path, text: str, key: str, message: str) -> None:
    refused = refusal(tmp_path, text)
    assert refused.endswith(f": {key}: {message}"), refused


@pytest.mark.parametrize("size", ["'twenty'", "0", "-5", "'10 lightyears'", "true", "1.5", "'1.5'"])
def test_a_byte_budget_that_is_no_size_is_refused(tmp_path: Path, size: str) -> None:
    message = refusal(tmp_path, release_with(f"serving: {{precision: auto, auto: {{max_bytes: {size}}}}}"))
    assert ": serving.auto.max_bytes: " in message


def test_torchscript_is_among_the_graphs_since_loaders_run_it_by_default(tmp_path: Path) -> None:
    message = refusal(tmp_path, release_with("serving: {graphs: [aot_inductor, onnx]}"))
    assert message.endswith(
        ": serving.graphs: expected torchscript among the graphs: it is what the loader runs by default"
    )
    config = load(tmp_path, release_with("serving: {graphs: [torchscript, aot_inductor], isa: x86-64-v4}"))
    assert config.serving.isa == "x86-64-v4"
    assert "'x86-64-v3' or 'x86-64-v4'" in refusal(tmp_path, release_with("serving: {isa: native}"))
    assert refusal(tmp_path, release_with("serving: {isa: x86-64-v4}")).endswith(
        ": serving.isa: is for a compiled graph: add aot_inductor to graphs, or leave isa out"
    )


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_release_is_built_in_inference_mode_only(tmp_path: Path, mode: str) -> None:
    message = refusal(tmp_path, release_with(f"mode: {mode}"))
    assert message.endswith(f"a release is built in mode 'inference', got '{mode}'")


def test_a_surgery_names_a_class_and_its_arguments(tmp_path: Path) -> None:
    config = load(tmp_path, release_with('surgery: {module: "a.b:C", kwargs: {keys: [user], eps: 1.0e-6}}'))
    assert config.surgery is not None
    assert (config.surgery.module, config.surgery.prefix) == ("a.b:C", None)
    assert config.surgery.kwargs == {"keys": ["user"], "eps": 1e-6}


@pytest.mark.parametrize(
    ("surgery", "key", "problem"),
    [
        ("{kwargs: {}}", "surgery.module", "Field required"),
        ("{module: a.b.C}", "surgery.module", "expected 'package.module:Class', got 'a.b.C'"),
        ('{module: "a b:C"}', "surgery.module", "expected 'package.module:Class', got 'a b:C'"),
        ('{module: "a:C", kwarg: {}}', "surgery.kwarg", "unknown key; did you mean 'kwargs'?"),
        ('{module: "a:C", kwargs: {x: .inf}}', "surgery.kwargs", "finite numbers"),
        ('{module: "a:C", kwargs: {x: 2026-11-25}}', "surgery.kwargs", "expected text, finite numbers, booleans, null"),
        ('{module: "a:C", prefix: ""}', "surgery.prefix", "at least 1 character"),
        (
            f'{{module: "a:C", kwargs: {{x: {2**63}}}}}',
            "surgery.kwargs.x",
            f"fits in signed 64 bits, got {2**63}; write",
        ),
        (
            f'{{module: "a:C", kwargs: {{x: [1, {{y: {-(2**70)}}}]}}}}',
            "surgery.kwargs.x[1].y",
            "fits in signed 64 bits",
        ),
        (
            '{module: "a:C", kwargs: {x: ["s3://key:hush@bucket/x"]}}',
            "surgery.kwargs.x[0]",
            "a URL with a user, a pass",
        ),
        (
            '{module: "a:C", kwargs: {x: "read https://host/x?token=hush"}}',
            "surgery.kwargs.x",
            "would publish; write it",
        ),
        ('{module: "a:C", kwargs: {x: {"s3://hush@b/": 1}}}', "surgery.kwargs.x", "the manifest would publish"),
    ],
)
def test_a_surgery_that_is_not_well_formed_is_refused_by_key(
    tmp_path: Path, surgery: str, key: str, problem: str
) -> None:
    message = refusal(tmp_path, release_with(f"surgery: {surgery}"))
    assert message.startswith(f"release.yaml:9: {key}: ")
    assert problem in message
    assert "hush" not in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (release_with("parity: {seed: NUMBER}"), "parity.seed"),
        (release_with("parity: {budgets: {int8: {max_outlier_rows: NUMBER}}}"), "parity.budgets.int8.max_outlier_rows"),
        (release_with("serving: {precision: auto, auto: {max_bytes: NUMBER}}"), "serving.auto.max_bytes"),
        (replaced("  uri: snapshots/demo\n", "  uri: snapshots/demo\n  step: NUMBER\n"), "snapshot.step"),
    ],
)
def test_an_integer_that_the_manifest_has_no_place_for_is_refused(tmp_path: Path, text: str, key: str) -> None:
    load(tmp_path, text.replace("NUMBER", str(2**63 - 1)))
    message = refusal(tmp_path, text.replace("NUMBER", str(2**63)))
    assert re.search(rf": {re.escape(key)}: Input should be less than 92233720368547\d+, got {2**63}$", message)


def test_arguments_may_be_urls_and_integers_of_64_bits(tmp_path: Path) -> None:
    given = {"x": ["s3://bucket/x", {"low": -(2**63), "high": 2**63 - 1}], "s3://bucket/": "why? # 1", "large": 2.0**70}
    config = load(tmp_path, release_with(f'surgery: {{module: "a:C", kwargs: {json.dumps(given)}}}'))
    assert config.surgery is not None
    assert config.surgery.kwargs == given


def test_a_budget_of_no_table_is_refused_with_the_tables_that_there_are(tmp_path: Path) -> None:
    message = refusal(tmp_path, release_with("parity: {table_budgets: {usr: {min_cosine: 0.9}}}"))
    assert message.endswith("parity.table_budgets names 'usr', which is no table; tables: user")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (release_with("mode: train"), 9, "mode"),
        (release_with("parity:\n  table_budgets:\n    usr: {}"), 11, "parity.table_budgets.usr"),
    ],
    ids=["mode", "table_budgets"],
)
def test_a_refusal_of_the_whole_release_says_which_line_and_key_it_is_about(
    tmp_path: Path, text: str, line: int, key: str
) -> None:
    assert refusal(tmp_path, text).startswith(f"release.yaml:{line}: {key}: ")


# --- Several problems ----------------------------------------------------------------------------------------------


def test_every_problem_is_one_line(tmp_path: Path) -> None:
    text = BASE.replace("num_embeddings: 10", "num_embeddings: -1").replace("fp32", "fp64") + "  stepp: 3\n"
    lines = refusal(tmp_path, text).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["release.yaml:4", "release.yaml:6", "release.yaml:9"]
    assert "num_embeddings" in lines[0]
    assert "data_type" in lines[1]
    assert lines[2].endswith("snapshot.stepp: unknown key; did you mean 'step'?")


def test_an_unknown_key_does_not_hide_the_other_problems_of_its_section(tmp_path: Path) -> None:
    text = table_with("poling: sum\nweigthed: true").replace("num_embeddings: 10", "num_embeddings: -1")
    message = refusal(tmp_path, text)
    for key in ("num_embeddings", "poling", "weigthed"):
        assert f"{TABLE}.{key}: " in message, f"{key} is missing:\n{message}"


# --- Files that are no configuration -------------------------------------------------------------------------------

EXPECTED_MAPPING = "expected a mapping with the keys large_embeddings, mode, snapshot, serving, surgery, parity"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "- large_embeddings\n", "hello\n", "7\n"])
def test_a_file_that_is_no_mapping_is_refused_with_the_expected_keys(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == f"release.yaml: {EXPECTED_MAPPING}"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("large_embeddings: [user\n", 2, r"expected ',' or '\]'"),
        ("large_embeddings: a: b\n", 1, "mapping values are not allowed"),
        ("large_embeddings:\n\ttables: []\n", 2, r"'\\t' that cannot start any token"),
        ("snapshot: *nowhere\n", 1, "undefined alias 'nowhere'"),
        (BASE + "snapshot: {uri: other}\n", LAST_LINE + 1, 'duplicate key "snapshot"'),
        (table_with("data_type: fp16"), 7, 'duplicate key "data_type"'),
        (BASE + "---\n" + BASE, LAST_LINE + 1, "single document"),
    ],
    ids=["unclosed", "nested", "tab", "alias", "duplicate section", "duplicate key", "two documents"],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"release.yaml:{line}: not valid YAML: ")
    assert_matches(problem, message)
    assert "\n" not in message


def test_a_control_character_is_not_valid_yaml(tmp_path: Path) -> None:
    assert_matches(r"^release\.yaml: not valid YAML: .*x0000", refusal(tmp_path, b"mode: \x00\n"))


def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    assert_matches(
        r"^release\.yaml", refusal(tmp_path, replaced("num_embeddings: 10", f"num_embeddings: {'9' * 5000}"))
    )


def test_yaml_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    assert_matches(r"^release\.yaml", refusal(tmp_path, "large_embeddings: " + "[" * 500))


def test_a_tag_that_would_make_a_python_object_makes_none(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    message = refusal(tmp_path, release_with(f"mode: !!python/object/apply:os.system ['touch {witness}']"))
    assert message.startswith("release.yaml:9: ")
    assert not witness.exists()


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    assert_matches(r"^release\.yaml: cannot be read: .*utf-8", refusal(tmp_path, "mode: caf\xe9\n".encode("latin-1")))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    cases: dict[Any, str] = {tmp_path / "absent.yaml": "No such file or directory", tmp_path: "Is a directory"}
    for path, problem in cases.items():
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: cannot be read: ")
        assert problem in str(caught.value)


def test_an_anchor_changes_no_boolean(tmp_path: Path) -> None:
    """ruamel.yaml makes a number of one."""
    text = BASE + "surgery: {module: 'a:B', kwargs: {one: &yes true, two: *yes, three: &no false}}\n"
    (tmp_path / "release.yaml").write_text(text)
    kwargs = load_config(tmp_path / "release.yaml").surgery.kwargs
    assert [(type(value), value) for value in kwargs.values()] == [(bool, True), (bool, True), (bool, False)]


def test_a_number_and_a_text_that_become_one_key_are_refused(tmp_path: Path) -> None:
    (tmp_path / "release.yaml").write_text(BASE + "surgery: {module: 'a:B', kwargs: {2: a, '2': b}}\n")
    with pytest.raises(ConfigError, match=r"release.yaml: the key '2' is given twice, once as text$"):
        load_config(tmp_path / "release.yaml")
