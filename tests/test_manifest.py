"""The manifest: its round trip, and one named refusal for everything that a reader does not understand."""

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TABLES, with_vocabularies

from runtime_py import ManifestError, UnknownFieldError, UnknownFormatVersionError
from runtime_py.manifest import Manifest, compute_artifact_id
from runtime_py.manifest_reader import parse_manifest, read_manifest

Document = dict[str, Any]
Edit = Callable[[Document], object]
Step = str | int
ZEROS = "0" * 64
WEIGHTS = "weights/tables.safetensors"
# Of `support.TABLES`: fp16 rows, but for the last table.
HEADER_BYTES = 4096
DATA_BYTES = 300 * 16 + 41 * 6 + 7 * 32 + 1 * 16
FILE_BYTES = HEADER_BYTES + DATA_BYTES


def seal(document: Document) -> bytes:
    """The document as a manifest with a fresh `sha256-zeroed` digest, as `artifacts/FORMAT.md` describes it.

    A document whose manifest digest cannot be made right, since it is what the test has broken, stays as it is.
    """
    document = copy.deepcopy(document)
    digest = document.get("manifest_digest")
    if not isinstance(digest, dict) or not isinstance(digest.get("value"), str):
        return json.dumps(document).encode()
    digest["value"] = ZEROS
    text = json.dumps(document)
    assert text.count(ZEROS) == 1
    return text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest()).encode()


def seal_text(text: str) -> bytes:
    """As `seal`, for a text that no Python object gives."""
    head, start, rest = text.rpartition('"value": "')
    zeroed = head + start + ZEROS + rest[64:]
    return zeroed.replace(ZEROS, hashlib.sha256(zeroed.encode()).hexdigest()).encode()


def identify(document: Document) -> str:
    """The artifact id, as `artifacts/FORMAT.md` describes it."""
    digests = {table["name"]: table["digest"] for table in document["tables"]}
    content = {
        "features": document["features"],
        "graphs": sorted({graph["backend"] for graph in document["graphs"]}),
        "outputs": document["outputs"],
        "tables": [
            {key: table[key] for key in ("name", "num_embeddings", "embedding_dim", "serving_precision")}
            | {"digest": "{algorithm}:{value}".format(**digests[table["name"]])}
            for table in document["tables"]
        ],
        "vocabularies": [
            {key: vocabulary[key] for key in ("table", "entities")}
            | {"digest": "{algorithm}:{value}".format(**vocabulary["digest"])}
            for vocabulary in document["vocabularies"]
        ],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def refusal(data: bytes, what: str = "this manifest") -> ManifestError:
    """The error that `parse_manifest` raises, of whatever kind of `ManifestError`."""
    try:
        parse_manifest(data)
    except ManifestError as error:
        return error
    pytest.fail(f"{what} was not refused")


@pytest.fixture(scope="module")
def built_artifact(vocabulary_artifact: Path) -> Path:
    return vocabulary_artifact


@pytest.fixture(scope="module")
def original(built_artifact: Path) -> bytes:
    return (built_artifact / "manifest.json").read_bytes()


@pytest.fixture
def document(original: bytes) -> Document:
    """A manifest to break."""
    return json.loads(original)


@pytest.fixture(scope="module")
def manifest(built_artifact: Path) -> Manifest:
    return read_manifest(built_artifact)


# --- Walking the real manifest ---------------------------------------------------------------------------------------

# What the build was asked: a JSON object that version 1 does not define further.
OPEN = [("provenance", "configuration")]
# Objects whose keys are free, with values of a given type.
MAPS = [("provenance", "tools")]


def walk(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Every value of the manifest with its path, but nothing inside of what is free."""
    yield path, value
    if path not in OPEN:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from walk(value[key], (*path, key))


def at(document: Document, path: tuple[Step, ...]) -> Any:
    value: Any = document
    for step in path:
        value = value[step]
    return value


def spell(path: tuple[Step, ...]) -> str:
    """A path as messages spell it: `tables[0].digest.value`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


# --- Round trip ------------------------------------------------------------------------------------------------------


def test_a_manifest_is_written_again_as_the_very_bytes_that_were_read(original: bytes) -> None:
    assert parse_manifest(original).to_bytes() == original


def test_the_walk_reaches_every_part_of_the_manifest(document: Document) -> None:
    paths = [spell(path) for path, _ in walk(document)]
    for path in (
        "tables[3].digest.value",
        "vocabularies[1].capacity",
        "provenance.snapshots[0].step",
        "graphs[0].operator_libraries[1]",
    ):
        assert path in paths
    assert len(paths) > 100


def test_a_manifest_that_is_sealed_again_is_accepted_whatever_its_spacing(document: Document) -> None:
    assert parse_manifest(seal(document)).artifact_id == document["artifact_id"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    configuration=st.dictionaries(st.text(), JSON),
    tools=st.dictionaries(st.text(), st.text()),
    built_at=st.one_of(st.text(), st.just(ZEROS)),
)
@settings(deadline=None)
def test_writing_and_reading_give_the_same_manifest(
    manifest: Manifest, configuration: Document, tools: dict[str, str], built_at: str
) -> None:
    provenance = replace(manifest.provenance, configuration=configuration, tools=tools, built_at=built_at)
    data = replace(manifest, provenance=provenance).to_bytes()
    parsed = parse_manifest(data)
    assert parsed.provenance == provenance
    assert parsed.to_bytes() == data


def test_tables_and_files_are_found_by_name(manifest: Manifest) -> None:
    assert {name: table.name for name, table in manifest.table.items()} == {t["name"]: t["name"] for t in TABLES}
    assert manifest.file[WEIGHTS].path == WEIGHTS
    assert manifest.table["user"].bytes == 300 * 8 * 2


# --- The version -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 0, -1, "1", True, 1.0, None, [1]])
def test_an_unknown_format_version_is_refused(document: Document, version: object) -> None:
    document["format_version"] = version
    with pytest.raises(
        UnknownFormatVersionError, match=re.escape(f"format_version is {version!r}, this reader knows 1")
    ):
        parse_manifest(seal(document))


def test_a_missing_format_version_is_refused(document: Document) -> None:
    del document["format_version"]
    with pytest.raises(UnknownFormatVersionError, match="format_version is None, this reader knows 1"):
        parse_manifest(seal(document))


def test_the_version_is_judged_before_fields_that_another_version_may_have(document: Document) -> None:
    document |= {"format_version": 2, "caches": [], "manifest_digest": "blake3:…"}
    assert type(refusal(seal(document))) is UnknownFormatVersionError


# --- Fields and types, at every level --------------------------------------------------------------------------------


def test_an_unknown_field_is_refused_at_every_level(document: Document) -> None:
    for path, value in walk(document):
        if not isinstance(value, dict) or path in [*OPEN, *MAPS]:
            continue
        edited = copy.deepcopy(document)
        at(edited, path)["surprise"] = 1
        name = spell((*path, "surprise"))
        error = refusal(seal(edited), name)
        assert type(error) is UnknownFieldError
        assert str(error) == f"unknown field '{name}'; format version 1 does not define it"


def test_a_missing_field_is_refused_at_every_level(document: Document) -> None:
    for path, _ in walk(document):
        if not path or isinstance(path[-1], int) or path[:-1] in MAPS or path == ("format_version",):
            continue
        edited = copy.deepcopy(document)
        del at(edited, path[:-1])[path[-1]]
        error = refusal(seal(edited), f"a manifest without {spell(path)}")
        assert type(error) is ManifestError
        assert str(error) == f"field '{spell(path)}' is missing"


NULLABLE = (
    "step",
    "isa",
    "opset",
    "surgery",
    "relative_l2",
    "row_relative_l2",
    "mean_cosine",
    "worst_cosine",
    "worst_cosine_row",
    "lookup_relative_l2",
    "lookup_mean_cosine",
)
WRONG: Mapping[type, list[object]] = {
    str: [7, None, True, [], {}],
    int: ["7", None, True, 7.0, []],
    float: ["0.5", None, True, 1, []],
    bool: [0, 1, "true", None],
    list: [{}, "", None, 0],
    dict: [[], "", None, 0],
}


def test_a_wrong_type_is_refused_at_every_level(document: Document) -> None:
    for path, value in walk(document):
        if not path or path == ("format_version",):
            continue
        kind = {"step": int, "opset": int, "isa": str, "surgery": dict}.get(str(path[-1]), type(value))
        for wrong in WRONG[kind]:
            if path[-1] in NULLABLE and wrong is None:
                continue
            edited = copy.deepcopy(document)
            at(edited, path[:-1])[path[-1]] = wrong
            error = refusal(seal(edited), f"{spell(path)} = {wrong!r}")
            assert type(error) is ManifestError
            literal = path[-1] in ("serving_precision", "pooling", "backend", "target")
            expected = "one of " if literal else kind.__name__
            assert str(error).startswith(f"{spell(path)}: expected {expected}")
            assert str(error).endswith(f"got {wrong!r}")


def test_a_step_may_be_a_number_or_null(document: Document) -> None:
    for step in (None, 0, 1200):
        document["provenance"]["snapshots"][0]["step"] = step
        assert parse_manifest(seal(document)).provenance.snapshots[0].step == step


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        (("tables", 0, "serving_precision"), "fp8", "['fp32', 'fp16', 'int8', 'int4', 'int2']"),
        (("features", 0, "pooling"), "max", "['sum', 'mean']"),
        (("graphs", 0, "backend"), "TorchScript", "['torchscript', 'aot_inductor', 'onnx']"),
        (("graphs", 0, "target"), "tpu", "['cpu']"),
    ],
)
def test_a_word_that_version_1_does_not_know_is_refused(
    document: Document, path: tuple[Step, ...], value: str, allowed: str
) -> None:
    at(document, path[:-1])[path[-1]] = value
    assert str(refusal(seal(document))) == f"{spell(path)}: expected one of {allowed}, got '{value}'"


# --- The text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"weighted": false,\n  "weights_offset', '"weighted": false, "weighted": true,\n  "weights_offset'),
        ('"row_bytes": 16', '"row_bytes": 16, "row_bytes": 16'),
        ('"mode": "inference"', '"mode": "inference", "mode": "inference"'),
    ],
    ids=["weighted", "row_bytes", "mode"],
)
def test_a_key_that_is_given_twice_is_refused_at_every_level(
    original: bytes, request: pytest.FixtureRequest, before: str, after: str
) -> None:
    text = original.decode()
    assert before in text
    error = refusal(seal_text(text.replace(before, after, 1)))
    assert type(error) is ManifestError
    assert re.search(f"is damaged: the key '{request.node.callspec.id}' is given twice", str(error))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_constant_that_is_no_json_is_refused(original: bytes, constant: str) -> None:
    text = re.sub(r'"cases": \d+', f'"cases": {constant}', original.decode())
    assert str(refusal(seal_text(text))) == f"is damaged: {constant} is no JSON number"


def test_a_number_beyond_float64_is_refused(original: bytes) -> None:
    """JSON allows it, Python reads it as infinity, and `to_bytes` could not write that again."""
    text = re.sub(r'"cases": \d+', '"cases": 1e999', original.decode())
    assert "1e999" in str(refusal(seal_text(text)))


def test_an_integer_of_absurd_length_is_refused(original: bytes) -> None:
    """Python's own limit on such integers is a ValueError, not a JSONDecodeError."""
    text = re.sub(r'"weights_bytes": \d+', '"weights_bytes": ' + "9" * 5000, original.decode())
    assert "is damaged" in str(refusal(seal_text(text)))


def test_a_manifest_digest_that_is_no_unicode_is_refused(document: Document) -> None:
    document["manifest_digest"]["value"] = "\ud800"
    assert "is damaged" in str(refusal(json.dumps(document).encode()))


def test_a_name_that_is_no_unicode_is_refused(original: bytes) -> None:
    r"""`"\ud800"`, half of a surrogate pair, is legal JSON and has no UTF-8."""
    text = original.decode().replace('"tag"', r'"\ud800"')
    refusal(seal_text(text))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged: not UTF-8 JSON: Expecting value"),
        (b"{", "is damaged: not UTF-8 JSON: "),
        (b'{"a": "\xff"}', "is damaged: not UTF-8 JSON: 'utf-8' codec can't decode byte 0xff"),
        ("{}".encode("utf-16"), "is damaged: not UTF-8 JSON: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "is damaged: not UTF-8 JSON: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "is damaged: not UTF-8 JSON: maximum recursion depth exceeded"),
        (b"[]", "is damaged: expected an object, got list"),
        (b"null", "is damaged: expected an object, got NoneType"),
        (b"1", "is damaged: expected an object, got int"),
    ],
)
def test_what_is_no_utf8_json_object_is_refused(data: bytes, message: str) -> None:
    error = refusal(data)
    assert type(error) is ManifestError
    assert str(error).startswith(message)


def test_a_truncated_manifest_is_refused_wherever_it_ends(original: bytes) -> None:
    for end in [*range(0, len(original), 97), len(original) - 2, len(original) - 1]:
        assert str(refusal(original[:end])).startswith("is damaged: "), end


def test_every_bit_of_the_manifest_matters(original: bytes) -> None:
    seed = 20261123
    generator = random.Random(seed)
    for _ in range(600):
        position, bit = generator.randrange(len(original)), generator.randrange(8)
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        try:
            parse_manifest(bytes(damaged))
        except ManifestError:
            continue
        pytest.fail(f"seed {seed}: bit {bit} of byte {position} was flipped and not noticed")


def test_a_change_that_keeps_the_manifest_valid_is_noticed_by_its_digest(original: bytes) -> None:
    error = refusal(re.sub(rb'"cases": \d+', b'"cases": 999', original))
    assert type(error) is ManifestError
    assert re.fullmatch("is damaged: its digest is [0-9a-f]{64}, and it says [0-9a-f]{64}", str(error))


@pytest.mark.parametrize(
    ("algorithm", "value"), [("sha256", None), ("sha256-zeroed", "ab"), ("sha256-zeroed", ""), ("md5", "0" * 32)]
)
def test_the_manifest_digest_has_one_algorithm_and_64_digits(
    document: Document, algorithm: str, value: str | None
) -> None:
    document["manifest_digest"]["algorithm"] = algorithm
    if value is not None:
        document["manifest_digest"]["value"] = value
    data = seal(document) if value is None else json.dumps(document).encode()
    assert f"is damaged: manifest_digest must be sha256-zeroed with 64 digits, got {algorithm}:" in str(refusal(data))


def test_a_manifest_that_holds_its_digest_twice_is_refused(original: bytes, document: Document) -> None:
    """Zeroing both places would hide a second one from the digest."""
    value = document["manifest_digest"]["value"]
    text = original.decode().replace('"built_at": "', f'"built_at": "{value}')
    assert "is damaged: manifest_digest must be" in str(refusal(text.encode()))


# --- Paths, names and figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "reports/../../x", "a/../b", "..", ".", "", "./a", "a//b", "a/", "a\\b", "..\\b", "a\0b"],
)
def test_a_path_that_leaves_the_artifact_or_has_two_spellings_is_refused(document: Document, path: str) -> None:
    document["files"][2]["path"] = path
    assert str(refusal(seal(document))) == f"files: path {path!r} must be relative, POSIX and inside the artifact"


def test_a_manifest_that_lists_itself_is_refused(document: Document) -> None:
    document["files"][2]["path"] = "manifest.json"
    assert str(refusal(seal(document))) == "files: 'manifest.json' must not list itself"


@pytest.mark.parametrize(
    ("where", "twice"),
    [
        ("tables", "user"),
        ("features", "user"),
        ("outputs", "user"),
        ("graphs", "torchscript for cpu"),
        ("files", WEIGHTS),
        ("vocabularies", "user"),
    ],
)
def test_what_is_listed_twice_is_refused(document: Document, where: str, twice: str) -> None:
    document[where].append(document[where][0])
    assert str(refusal(seal(document))) == f"{where}: '{twice}' is listed 2 times"


def test_a_feature_of_an_unknown_table_is_refused(document: Document) -> None:
    document["features"][2]["table"] = "items"
    assert str(refusal(seal(document))) == "feature 'last_item': table 'items' is not in the manifest"


@pytest.mark.parametrize("field", ["features", "tables"])
def test_an_artifact_without_features_or_without_tables_is_refused(document: Document, field: str) -> None:
    document |= {"features": [], "outputs": []}
    if field == "tables":
        drop_vocabularies(document)
        document |= {"tables": [], "weights_bytes": 0, "accuracy": []}
        document["files"][0]["bytes"] = HEADER_BYTES
    document["artifact_id"] = identify(document)
    assert re.fullmatch("(features|tables): an artifact has at least one", str(refusal(seal(document))))


def put(*path: Step, value: Any) -> Edit:
    """An edit that sets one field."""
    return lambda document: at(document, path[:-1]).__setitem__(path[-1], value)


def drop_vocabularies(document: Document) -> None:
    document["vocabularies"] = []
    for file in document["files"]:
        if file["path"] in ("vocab/user.safetensors", "vocab/item.safetensors"):
            file["digest"]["algorithm"] = "sha256"


CONTRADICTIONS: list[tuple[str, Edit, str]] = [
    (
        "row bytes",
        put("tables", 0, "row_bytes", value=17),
        "table 'user': row_bytes is 17, expected 16 (fp16, embedding_dim 8)",
    ),
    (
        "precision",
        put("tables", 0, "serving_precision", value="fp32"),
        "table 'user': row_bytes is 16, expected 32 (fp32, embedding_dim 8)",
    ),
    ("no rows", put("tables", 0, "num_embeddings", value=0), "table 'user': shape [0, 8] is empty"),
    ("negative rows", put("tables", 0, "num_embeddings", value=-1), "table 'user': shape [-1, 8] is empty"),
    ("no dims", put("tables", 2, "embedding_dim", value=0), "table 'tag': shape [7, 0] is empty"),
    (
        "weights_bytes",
        put("weights_bytes", value=DATA_BYTES + 4),
        f"{WEIGHTS}: {FILE_BYTES} bytes, expected {FILE_BYTES + 4} (header and data)",
    ),
    (
        "weights_offset_bytes",
        put("weights_offset_bytes", value=0),
        f"{WEIGHTS}: {FILE_BYTES} bytes, expected {DATA_BYTES} (header and data)",
    ),
    ("size of the weight file", put("files", 0, "bytes", value=1), f"{WEIGHTS}: 1 bytes, expected {FILE_BYTES}"),
    (
        "output dim",
        put("outputs", 0, "dim", value=9),
        "outputs do not follow from the features, whose dims are {'user'",
    ),
    ("output key", put("outputs", 0, "key", value="users"), "outputs do not follow from the features"),
    ("missing output", lambda document: document["outputs"].pop(), "outputs do not follow from the features"),
    ("order of outputs", lambda document: document["outputs"].reverse(), "outputs do not follow from the features"),
    (
        "isa of a graph that is not compiled",
        put("graphs", 0, "isa", value="x86-64-v3"),
        "graph 'torchscript': isa is 'x86-64-v3'; aot_inductor graphs have one, others none",
    ),
    (
        "opset of a graph that is not ONNX",
        put("graphs", 0, "opset", value=18),
        "graph 'torchscript': opset is 18; onnx graphs have one, others none",
    ),
    (
        "folder of a compiled graph",
        put("graphs", 0, "backend", value="aot_inductor"),
        "graph 'aot_inductor': 'graphs/lookup.torchscript.pt/data/aotinductor/model/lookup.wrapper.so' is not among",
    ),
    ("integer beyond 64 bits", put("weights_bytes", value=2**63), f"weights_bytes: {2**63} is beyond 64 bits"),
    ("weighted", put("weighted", value=True), "weighted is True, and the features say otherwise"),
    (
        "weighted feature",
        put("features", 0, "weighted", value=True),
        "weighted is False, and the features say otherwise",
    ),
    ("artifact id", put("artifact_id", value="f" * 64), f"artifact_id is {'f' * 64}, computed "),
    ("number of rows", put("tables", 3, "num_embeddings", value=2), "artifact_id is "),
    ("pooling", put("features", 0, "pooling", value="mean"), "artifact_id is "),
    ("rows' digest", put("tables", 0, "digest", "value", value="a" * 64), "artifact_id is "),
    (
        "accuracy of another precision",
        put("accuracy", 0, "serving_precision", value="int8"),
        "table 'user': is stored as fp16, and elsewhere said to be int8",
    ),
    (
        "choice of an unknown table",
        put("choices", value=[{"table": "users", "serving_precision": "fp16", "reason": ""}]),
        "choices: expected tables of the manifest, in their order, got ['users']",
    ),
    (
        "choice of another precision",
        put("choices", value=[{"table": "user", "serving_precision": "int8", "reason": ""}]),
        "table 'user': is stored as fp16, and elsewhere said to be int8",
    ),
    (
        "accuracy of an unknown table",
        put("accuracy", 0, "table", value="users"),
        "accuracy: expected one entry a table, in their order, got ['users', ",
    ),
    ("table without accuracy", lambda document: document["accuracy"].pop(), "accuracy: expected one entry a table"),
    ("order of accuracy", lambda document: document["accuracy"].reverse(), "accuracy: expected one entry a table"),
    (
        "accuracy given twice",
        lambda document: document["accuracy"].append(document["accuracy"][-1]),
        "accuracy: expected one entry a table",
    ),
    (
        "snapshot's digest",
        put("provenance", "snapshots", 0, "digest", "value", value="ab"),
        "snapshot '",
    ),
    (
        "nameless table",
        put("tables", 0, "name", value=""),
        "'' cannot name a table or a feature: it is empty, or has control characters",
    ),
    (
        "feature with a line feed",
        put("features", 0, "name", value="us\ner"),
        "'us\\ner' cannot name a table or a feature: it is empty, or has control characters",
    ),
    ("table with a C1 control", put("tables", 0, "name", value="us\x85er"), "'us\\x85er' cannot name a table"),
    ("nameless feature", put("features", 0, "name", value=""), "'' cannot name a table or a feature"),
    (
        "vocabulary of an unknown table",
        put("vocabularies", 0, "table", value="users"),
        "vocabulary of table 'users': the table is not in the manifest",
    ),
    (
        "vocabulary that is not listed",
        put("vocabularies", 0, "path", value="vocab/users.safetensors"),
        "vocab/user.safetensors: digest algorithm 'sha256-tables', expected 'sha256'",
    ),
    (
        "vocabulary whose file is missing",
        lambda document: document["files"].pop(3),
        "vocabulary of table 'item': 'vocab/item.safetensors' is not among the files",
    ),
    (
        "vocabularies that share a file",
        put("vocabularies", 1, "path", value="vocab/user.safetensors"),
        "vocab/item.safetensors: digest algorithm 'sha256-tables', expected 'sha256'",
    ),
    (
        "vocabularies in another order",
        lambda document: document["vocabularies"].reverse(),
        "vocabularies are not in the order of the tables",
    ),
    (
        "vocabulary of nobody",
        put("vocabularies", 0, "entities", value=0),
        "vocabulary of table 'user': 0 entities, expected 1 to 300, the table's rows",
    ),
    (
        "vocabulary of more entities than rows",
        put("vocabularies", 0, "entities", value=301),
        "vocabulary of table 'user': 301 entities, expected 1 to 300, the table's rows",
    ),
    (
        "vocabulary without an empty slot",
        put("vocabularies", 0, "capacity", value=250),
        "vocabulary of table 'user': capacity is 250, expected more than its 250 entities",
    ),
    (
        "capacity beyond any file",
        put("vocabularies", 0, "capacity", value=2**59),
        f"vocabulary of table 'user': capacity is {2**59}, expected more than its 250 entities, and less than 2**59",
    ),
    (
        "largest capacity of another file",
        put("vocabularies", 0, "capacity", value=2**59 - 1),
        f"vocab/user.safetensors: 12096 bytes, expected {4096 + 16 * (2**59 - 1)} ",
    ),
    (
        "capacity of another file",
        put("vocabularies", 0, "capacity", value=501),
        "vocab/user.safetensors: 12096 bytes, expected 12112 (header and 501 slots)",
    ),
    (
        "algorithm of a vocabulary",
        put("vocabularies", 0, "digest", "algorithm", value="sha256"),
        "vocabulary of table 'user': digest algorithm 'sha256', expected 'sha256-rows-1048576'",
    ),
    (
        "algorithm of a vocabulary's file",
        put("files", 2, "digest", "algorithm", value="sha256"),
        "vocab/user.safetensors: digest algorithm 'sha256', expected 'sha256-tables'",
    ),
    (
        "short digest of a vocabulary",
        put("vocabularies", 0, "digest", "value", value="ab"),
        "vocabulary of table 'user': digest value must be 64 lower-case hexadecimal digits, got 'ab'",
    ),
    ("entities", put("vocabularies", 0, "entities", value=249), "artifact_id is "),
    ("vocabulary's digest", put("vocabularies", 0, "digest", "value", value="a" * 64), "artifact_id is "),
    ("no vocabulary", lambda document: drop_vocabularies(document), "artifact_id is "),
    (
        "vocabulary as a graph",
        put("graphs", 0, "path", value="vocab/user.safetensors"),
        "graph 'torchscript': 'vocab/user.safetensors' is not among the files",
    ),
    ("no graph", lambda document: document["graphs"].clear(), "graphs: an artifact has at least one"),
    (
        "graph that is not listed",
        put("graphs", 0, "path", value="graphs/other.pt"),
        "graph 'torchscript': 'graphs/other.pt' is not among the files",
    ),
    (
        "weights as a graph",
        put("graphs", 0, "path", value=WEIGHTS),
        f"graph 'torchscript': '{WEIGHTS}' is not among the files",
    ),
    ("no weights", lambda document: document["files"].pop(0), f"files: '{WEIGHTS}' is not listed"),
    (
        "library with a folder",
        put("graphs", 0, "operator_libraries", 0, value="../evil"),
        "graph 'torchscript': '../evil' is no library name",
    ),
    (
        "library with a slash",
        put("graphs", 0, "operator_libraries", 1, value="/tmp/evil"),
        "graph 'torchscript': '/tmp/evil' is no library name",
    ),
    (
        "library with a newline",
        put("graphs", 0, "operator_libraries", 1, value="evil\n"),
        "graph 'torchscript': 'evil\\n' is no library name",
    ),
    ("nameless library", put("graphs", 0, "operator_libraries", 0, value=""), "graph 'torchscript': '' is no library"),
    (
        "algorithm of the weights",
        put("files", 0, "digest", "algorithm", value="sha256"),
        f"{WEIGHTS}: digest algorithm 'sha256', expected 'sha256-tables'",
    ),
    (
        "algorithm of a file",
        put("files", 1, "digest", "algorithm", value="sha256-tables"),
        "graphs/lookup.torchscript.pt: digest algorithm 'sha256-tables', expected 'sha256'",
    ),
    (
        "algorithm of a table",
        put("tables", 1, "digest", "algorithm", value="sha256-rows-4096"),
        "table 'item': digest algorithm 'sha256-rows-4096', expected 'sha256-rows-1048576'",
    ),
    (
        "short digest",
        put("files", -2, "digest", "value", value="ab"),
        "reports/report.html: digest value must be 64 lower-case hexadecimal digits, got 'ab'",
    ),
    (
        "upper-case digest",
        put("tables", 1, "digest", "value", value="A" * 64),
        "table 'item': digest value must be 64 lower-case hexadecimal digits, got 'AAAA",
    ),
    (
        "digest with a newline",
        put("files", -1, "digest", "value", value="a" * 64 + "\n"),
        "reports/summary.md: digest value must be 64 lower-case hexadecimal digits",
    ),
]


@pytest.mark.parametrize(("edit", "message"), [c[1:] for c in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS])
def test_a_contradiction_is_refused(document: Document, edit: Edit, message: str) -> None:
    edit(document)
    error = refusal(seal(document))
    assert type(error) is ManifestError
    assert str(error).startswith(message)


@pytest.mark.parametrize("name", ["us\u00ader", "us\u2028er", "\ue000", "\U000e0fff", " "])
def test_any_other_name_is_read_whatever_the_python_version_knows_of_unicode(document: Document, name: str) -> None:
    document["features"][0]["name"] = document["outputs"][0]["key"] = name
    document["artifact_id"] = identify(document)
    assert parse_manifest(seal(document)).features[0].name == name


# --- The file --------------------------------------------------------------------------------------------------------


def test_errors_of_a_file_name_it_and_keep_their_class(artifact_copy: Path, document: Document) -> None:
    path = artifact_copy / "manifest.json"
    cases: list[tuple[Edit, type[ManifestError], str]] = [
        (put("format_version", value=2), UnknownFormatVersionError, "format_version is 2"),
        (put("surprise", value=2), UnknownFieldError, "unknown field 'surprise'"),
        (put("weighted", value=2), ManifestError, "weighted: expected bool, got 2"),
    ]
    for edit, kind, message in cases:
        edited = copy.deepcopy(document)
        edit(edited)
        path.write_bytes(seal(edited))
        with pytest.raises(ManifestError, match=re.escape(f"{path}: {message}")) as caught:
            read_manifest(artifact_copy)
        assert caught.type is kind


# --- The artifact id -------------------------------------------------------------------------------------------------


def test_the_artifact_id_follows_from_its_description(document: Document) -> None:
    assert document["artifact_id"] == identify(document)


def test_the_artifact_id_ignores_provenance_reports_and_the_bytes_of_files(manifest: Manifest) -> None:
    digest = replace(manifest.files[1].digest, value="a" * 64)
    graph = replace(manifest.graphs[0], path="graphs/x.pt", torch="2.11", fbgemm_gpu="1.6", operator_libraries=[])
    other = replace(
        manifest,
        provenance=replace(manifest.provenance, built_at="1970", snapshots=[], tools={}, configuration={}),
        accuracy=[],
        choices=[],
        parity=replace(manifest.parity, seed=99),
        files=[replace(file, digest=digest, bytes=1) for file in manifest.files],
        graphs=[graph],
        manifest_digest=digest,
        artifact_id="",
    )
    assert compute_artifact_id(other) == manifest.artifact_id


def test_the_artifact_id_changes_with_all_that_the_artifact_does(manifest: Manifest, subtests: pytest.Subtests) -> None:
    table, feature, output = manifest.tables[0], manifest.features[0], manifest.outputs[0]
    vocabulary = manifest.vocabularies[0]

    def with_first(items: str, item: object) -> Manifest:
        return replace(manifest, **{items: [item, *getattr(manifest, items)[1:]]})

    seen = {manifest.artifact_id}
    for name, other in {
        "rows": with_first("tables", replace(table, digest=replace(table.digest, value="a" * 64))),
        "algorithm": with_first("tables", replace(table, digest=replace(table.digest, algorithm="sha256"))),
        "number of rows": with_first("tables", replace(table, num_embeddings=299)),
        "dim": with_first("tables", replace(table, embedding_dim=9)),
        "precision": with_first("tables", replace(table, serving_precision="fp32")),
        "table's name": with_first("tables", replace(table, name="users")),
        "feature's name": with_first("features", replace(feature, name="users")),
        "feature's table": with_first("features", replace(feature, table="item")),
        "pooling": with_first("features", replace(feature, pooling="mean")),
        "weighted": with_first("features", replace(feature, weighted=True)),
        "order of features": replace(manifest, features=manifest.features[::-1]),
        "output's key": with_first("outputs", replace(output, key="users")),
        "order of outputs": replace(manifest, outputs=manifest.outputs[::-1]),
        "kinds of graph": replace(manifest, graphs=[]),
        "a vocabulary": replace(manifest, vocabularies=manifest.vocabularies[:1]),
        "vocabulary's slots": with_first("vocabularies", replace(vocabulary, digest=table.digest)),
        "entities": with_first("vocabularies", replace(vocabulary, entities=249)),
        "vocabulary's table": with_first("vocabularies", replace(vocabulary, table="tag")),
    }.items():
        with subtests.test(change=name):
            artifact_id = compute_artifact_id(other)
            assert artifact_id == identify(asdict(other))
            assert artifact_id not in seen
            seen.add(artifact_id)


def test_the_same_rows_from_another_snapshot_format_give_the_same_artifact_id(
    built_artifact: Path, rebuild: Callable[..., Path], rows: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """`built_artifact` comes from a DCP snapshot, this one from a state dict."""
    before, after = read_manifest(built_artifact), read_manifest(rebuild(with_vocabularies(tmp_path), rows))
    assert before.provenance != after.provenance
    assert before.artifact_id == after.artifact_id


def test_one_changed_value_gives_another_artifact_id(
    built_artifact: Path, rebuild: Callable[..., Path], rows: dict[str, torch.Tensor]
) -> None:
    changed = {**rows, "tag": rows["tag"].clone()}
    changed["tag"][6, 15] += 1
    assert read_manifest(built_artifact).artifact_id != read_manifest(rebuild(TABLES, changed)).artifact_id


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, int("7" * 400)])
def test_no_integer_is_beyond_64_bits_not_even_one_that_nobody_reads(built_artifact: Path, number: int) -> None:
    document = json.loads((built_artifact / "manifest.json").read_text())
    document["provenance"]["configuration"]["more"] = {"deep": [1, number]}
    with pytest.raises(
        ManifestError, match=rf"^provenance\.configuration\.more\.deep\[1\]: {number} is beyond 64 bits$"
    ):
        parse_manifest(seal(document))


def test_a_document_is_nested_at_most_100_deep(built_artifact: Path) -> None:
    document = json.loads((built_artifact / "manifest.json").read_text())
    inner: Any = 1
    for _ in range(97):
        inner = [inner]
    document["provenance"]["configuration"]["more"] = inner  # the fourth level
    parse_manifest(seal(document))
    document["provenance"]["configuration"]["more"] = [inner]
    with pytest.raises(ManifestError, match=r"^is damaged: nested deeper than 100$"):
        parse_manifest(seal(document))
