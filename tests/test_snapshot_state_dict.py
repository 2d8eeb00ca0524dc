"""torch.save files: which bytes hold a tensor's values, and the files that are refused rather than guessed at."""

import contextlib
import os
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import state_dict

from export.errors import SnapshotError
from export.snapshots.rows import TableRows
from export.snapshots.state_dict import StateDictIndex

TABLE = torch.arange(24.0).reshape(6, 4)


def read(index: StateDictIndex, name: str) -> torch.Tensor:
    """A whole table."""
    rows = TableRows(index.tensors[name], index.locate(name))
    out = torch.empty(rows.num_embeddings, rows.embedding_dim, dtype=rows.dtype)
    rows.read(0, out)
    return out


def save(folder: Path, state: Any, **options: Any) -> Path:
    torch.save(state, folder / "model.pt", **options)
    return folder / "model.pt"


def refusal(path: Path, name: str | None = None) -> str:
    """What opening the file, or reading one of its tables, is refused with."""
    with pytest.raises(SnapshotError) as caught:
        index = StateDictIndex(path)
        if name is not None:
            read(index, name)
    return str(caught.value)


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """The same records in a new archive; `records` are replaced, by the last part of their names."""
    again = path.with_name("again.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, records.get(Path(info.filename).name, old.read(info)))
    return again


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_that_were_saved(tmp_path: Path, rows: dict[str, torch.Tensor]) -> None:
    index = StateDictIndex(save(tmp_path, state_dict(rows)))
    assert set(index.tensors) == set(state_dict(rows))
    assert index.format == "state_dict"
    for name, tensor in state_dict(rows).items():
        stored = read(index, name)
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored, tensor)
    assert {tensor.dtype for tensor in rows.values()} == {torch.float32, torch.float16}


def test_nested_dictionaries_are_joined_with_dots_and_other_values_are_left_out(tmp_path: Path) -> None:
    state = {
        "model": OrderedDict(ebc={"user": TABLE}, dense={"bias": torch.ones(3)}),
        "epochs": {3: {"loss": torch.tensor(0.5)}},
        "step": 7,
        "names": ["user"],
        "nothing": None,
    }
    index = StateDictIndex(save(tmp_path, state))
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == {
        "model.ebc.user": (6, 4),
        "model.dense.bias": (3,),
        "epochs.3.loss": (),
    }
    assert torch.equal(read(index, "model.ebc.user"), TABLE)


def test_a_models_own_state_dict_is_read(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(9, 5), torch.nn.Linear(5, 2))
    index = StateDictIndex(save(tmp_path, model.state_dict()))
    assert torch.equal(read(index, "0.weight"), model[0].weight.detach())
    assert torch.equal(read(index, "1.weight"), model[1].weight.detach())


def test_a_parameter_is_read_as_its_values(tmp_path: Path) -> None:
    index = StateDictIndex(save(tmp_path, {"user": torch.nn.Parameter(TABLE.clone())}))
    assert torch.equal(read(index, "user"), TABLE)


def test_views_that_share_one_storage_are_each_read_from_their_own_place(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float16).reshape(15, 4)
    state = {"all": whole, "first": whole[:2], "last": whole[11:], "flat": whole.view(-1)[7:37].view(10, 3)}
    index = StateDictIndex(save(tmp_path, state))
    places = {name: index.locate(name)[0].offset_bytes for name in state}
    assert places["last"] - places["all"] == 11 * 4 * 2
    assert places["flat"] - places["all"] == 7 * 2
    for name, tensor in state.items():
        assert torch.equal(read(index, name), tensor)


def test_the_same_tensor_under_two_names_is_read_under_both(tmp_path: Path) -> None:
    index = StateDictIndex(save(tmp_path, {"user": TABLE, "tied": TABLE}))
    assert index.locate("user") == index.locate("tied")
    assert torch.equal(read(index, "tied"), TABLE)


def test_opening_a_file_reads_none_of_its_values(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": torch.zeros(1 << 17, 64, dtype=torch.float16)})
    assert path.stat().st_size > 16 << 20
    before = bytes_read()
    [blob] = StateDictIndex(path).locate("user")
    assert bytes_read() - before < 1 << 20
    assert (blob.rows, blob.columns) == (1 << 17, 64)


def bytes_read() -> int:
    """What this process has read so far, from files and elsewhere."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_tensors_of_other_kinds_stand_beside_a_table(tmp_path: Path) -> None:
    others = {"count": torch.tensor(3), "sparse": torch.eye(3).to_sparse(), "bf16": torch.ones(2, dtype=torch.bfloat16)}
    index = StateDictIndex(save(tmp_path, {**others, "user": TABLE}))
    assert index.tensors["bf16"].dtype == torch.bfloat16
    assert torch.equal(read(index, "user"), TABLE)


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    digest = StateDictIndex(save(tmp_path / "a", {"user": TABLE})).digest
    assert digest.algorithm == "sha256-zip-directory"
    assert StateDictIndex(save(tmp_path / "b", {"user": TABLE.clone()})).digest == digest
    changed = TABLE.clone()
    changed[5, 3] += 1
    assert StateDictIndex(save(tmp_path / "c", {"user": changed})).digest != digest


def test_an_archive_whose_records_were_stored_again_is_read(tmp_path: Path) -> None:
    again = rezip(save(tmp_path, {"user": TABLE}))
    assert torch.equal(read(StateDictIndex(again), "user"), TABLE)


# --- What is stored in another way than it looks -------------------------------------------------------------------


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["deflate", "bzip2", "lzma"]
)
def test_an_archive_with_compressed_records_is_refused(tmp_path: Path, compression: int) -> None:
    again = rezip(save(tmp_path, {"user": TABLE}), compression)
    message = refusal(again, "user")
    assert message.startswith(f"{again}: ")
    assert "compress" in message


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.arange(24.0).reshape(4, 6).t(), (1, 6)),
        (torch.arange(60.0).reshape(6, 10)[:, 2:6], (10, 1)),
        (torch.arange(48.0).reshape(12, 4)[::2], (8, 1)),
        (torch.arange(4.0).expand(6, 4), (0, 1)),
    ],
    ids=["transposed", "some columns", "every other row", "expanded"],
)
def test_a_table_that_is_not_contiguous_is_refused(
    tmp_path: Path, tensor: torch.Tensor, strides: tuple[int, int]
) -> None:
    path = save(tmp_path, {"user": tensor})
    assert torch.load(path, weights_only=True)["user"].stride() == strides
    assert refusal(path, "user") == f"{path}: 'user' is stored with strides {strides}; save a contiguous tensor"


def test_a_table_whose_stored_values_are_to_be_negated_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": torch._neg_view(TABLE.clone())})
    assert torch.equal(torch.load(path, weights_only=True)["user"], -TABLE)
    assert refusal(path, "user").startswith(f"{path}: 'user'")


def test_a_sparse_table_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": TABLE.to_sparse()})
    assert refusal(path, "user") == f"{path}: 'user' is stored as torch.sparse_coo; save a contiguous tensor"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
def test_a_tensor_that_torch_has_quantized_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": torch.quantize_per_tensor(TABLE, 0.1, 0, torch.qint8)})
    assert refusal(path, "user") == (
        f"{path}: holds a tensor that is not made of plain numbers, such as one that torch has quantized; save only "
        "the state dict of the trained model"
    )


def test_a_table_on_the_meta_device_is_refused_as_it_has_no_values(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": TABLE.to("meta")})
    assert refusal(path, "user").startswith(f"{path}: 'user' is stored without values")


def test_two_tensors_with_one_joined_name_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"model.user": TABLE, "model": {"user": TABLE + 1}})
    assert "model.user" in refusal(path, "model.user")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    again = rezip(save(tmp_path, {"user": TABLE}), byteorder=b"big")
    assert refusal(again) == f"{again}: was written on a big-endian machine; save it again on a little-endian one"


# --- What is no state dict -----------------------------------------------------------------------------------------


def test_an_object_in_the_file_is_refused_and_its_code_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {witness}",)

    path = save(tmp_path, {"user": TABLE, "extra": Command()})
    torch.load(path, weights_only=False)
    assert witness.exists()  # the file does run code where it is let
    witness.unlink()
    message = refusal(path)
    assert message.startswith(
        f"{path}: holds more than tensors and plain data, which is never unpickled; save only the state dict"
    )
    assert f"{os.system.__module__}.system" in message
    assert not witness.exists()


def test_a_whole_module_is_refused_with_its_class_and_without_advice_to_trust_it(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, torch.nn.Linear(2, 2)))
    assert "save only the state dict" in message
    assert "torch.nn.modules.linear.Linear" in message
    assert "add_safe_globals" not in message
    assert "\n" not in message
    assert "\t" not in message


def test_a_torchscript_file_is_refused_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "TorchScript" in message
    assert "damaged" not in message
    assert "weights_only` set to `False`" not in message


def test_the_old_form_of_torch_save_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": TABLE}, _use_new_zipfile_serialization=False)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "zip" in message


@pytest.mark.parametrize("records", [{"x": b"y"}, {"a/x": b"y"}], ids=["no folder", "no pickle"])
def test_another_zip_file_is_refused(tmp_path: Path, records: dict[str, bytes]) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize("state", [TABLE, [TABLE], "text", 7, None], ids=["tensor", "list", "text", "number", "None"])
def test_a_file_without_named_tensors_has_no_table(tmp_path: Path, state: Any) -> None:
    assert "user" not in StateDictIndex(save(tmp_path, state)).tensors


def test_a_dictionary_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"user": TABLE}
    for _ in range(2000):
        state = {"a": state}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # of the one who saves it
    try:
        path = save(tmp_path, state)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(SnapshotError) as caught:
        StateDictIndex(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"user": TABLE}
    state["again"] = state
    path = save(tmp_path, state)
    assert refusal(path).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.pt") == f"{tmp_path / 'absent.pt'}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


# --- Damage --------------------------------------------------------------------------------------------------------


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": TABLE})
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        assert refusal(path).startswith(f"{path}: is no torch.save file, or was truncated: ")


def test_a_damaged_pickle_in_a_sound_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"user": TABLE})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    for position in range(len(pickled)):
        for byte in (0x00, ord("t"), 0xFF):
            changed = pickled[:position] + bytes([byte]) + pickled[position + 1 :]
            again = rezip(path, **{"data.pkl": changed})
            with contextlib.suppress(SnapshotError):  # anything else is a defect; some changes leave it readable
                index = StateDictIndex(again)
                if "user" in index.tensors and len(index.tensors["user"].shape) == 2:
                    index.locate("user")


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    again = rezip(save(tmp_path, {"user": TABLE}), **{"0": struct.pack("<f", 1.0)})
    assert str(again) in refusal(again, "user")
