"""safetensors: equal to the library on what it writes, strict on headers and indexes, atomic when saving."""

import contextlib
import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmasos.errors import (
    DiskFullError,
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NotFoundError,
    StoreError,
    UnsupportedError,
)
from llmasos.formats import (
    NeedMoreBytes,
    SafetensorsCheckpoint,
    TensorInfo,
    open_checkpoint,
    parse_safetensors_header,
    parse_safetensors_index,
    read_safetensors_header,
    save_safetensors,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def of_every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.arange(6).view(2, 3)
    return {name: numbers.to(dtype) for name, dtype in DTYPES.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(data: bytes) -> Any:
    return parse_safetensors_header(data, name="test.safetensors", file_size=len(data))


def touch_everything(path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(path)
    for name, info in checkpoint.tensors.items():
        assert tuple(checkpoint.tensor(name).shape) == info.shape
    checkpoint.close()


# Reading


def test_every_dtype_of_the_library_reads_back_bit_for_bit(tmp_path: Path) -> None:
    written = of_every_dtype()
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt", "who": "me"})
    checkpoint = SafetensorsCheckpoint(tmp_path / "model.safetensors")
    assert checkpoint.metadata == {"format": "pt", "who": "me"}
    assert set(checkpoint.tensors) == set(written)
    for name, tensor in written.items():
        assert checkpoint.tensors[name] == TensorInfo(name, name, (2, 3), tensor.element_size() * 6)
        assert same(checkpoint.tensor(name), tensor)
        assert bits(checkpoint.raw(name)) == bits(tensor)
        assert checkpoint.raw(name).shape == (2, tensor.element_size() * 3)


def test_tensors_are_views_of_the_map_and_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    checkpoint = SafetensorsCheckpoint(tmp_path / "m.safetensors")
    first, second = checkpoint.tensor("w"), checkpoint.tensor("w")
    assert first.data_ptr() == second.data_ptr()
    checkpoint.close()
    first.fill_(2)
    assert second.sum() == 2000
    assert (tmp_path / "m.safetensors").read_bytes() == before
    with pytest.raises(InvalidInputError, match="closed"):
        checkpoint.tensor("w")


def test_misaligned_tensors_scalars_and_empty_ones_are_read(tmp_path: Path) -> None:
    header = {
        "byte": entry([1], [0, 1], "U8"),
        "two": entry([2], [1, 9]),
        "one": entry([], [9, 13]),
        "none": entry([0, 3], [13, 13]),
    }
    path = tmp_path / "m.safetensors"
    for pad in range(4):
        encoded = json.dumps(header).encode() + b" " * pad
        path.write_bytes(build(encoded, b"\7" + struct.pack("<3f", 1, 2, 3)))
        checkpoint = SafetensorsCheckpoint(path)
        assert checkpoint.tensor("byte").tolist() == [7] and checkpoint.tensor("two").tolist() == [1, 2]
        assert checkpoint.tensor("one").shape == () and checkpoint.tensor("one").item() == 3
        assert checkpoint.tensor("none").shape == (0, 3)


def test_a_header_is_read_without_opening_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(of_every_dtype(), tmp_path / "m.safetensors")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were opened")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert len(SafetensorsCheckpoint(tmp_path / "m.safetensors").tensors) == len(DTYPES)


def test_a_header_can_be_read_by_asking_for_more_bytes(tmp_path: Path) -> None:
    save_file({f"layer.{i}": torch.zeros(3, 4) for i in range(50)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(NeedMoreBytes) as caught:
        parse_safetensors_header(b"", name="remote")
    assert caught.value.needed == 8
    with pytest.raises(NeedMoreBytes) as caught:
        parse_safetensors_header(data[:100], name="remote")
    header = parse_safetensors_header(data[: caught.value.needed], name="remote", file_size=len(data))
    assert header == read_safetensors_header(tmp_path / "m.safetensors")
    assert header.data_start == caught.value.needed and header.data_size == 50 * 48


def test_a_missing_tensor_is_not_found(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(NotFoundError, match=r"Similar names: model\.norm\.weight"):
        SafetensorsCheckpoint(tmp_path / "m.safetensors").tensor("norm.weight")


def test_a_dtype_that_torch_lacks_opens_and_is_named_when_touched(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({"w": entry([4], [0, 3], "F6_E2M3")}, bytes(3)))
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        SafetensorsCheckpoint(path).tensor("w")


# Shards


def sharded(folder: Path, **index: Any) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.ones(2), "extra": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map} | index))
    return path


def test_the_index_says_where_tensors_are_and_which_there_are(tmp_path: Path) -> None:
    sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.tensor("a").tolist() == [0, 0] and checkpoint.tensor("b").tolist() == [1, 1]
    assert checkpoint.metadata == {"format": "pt", "total_size": 16}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"missing: model-00002-of-00002\.safetensors"):
        SafetensorsCheckpoint(index)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, weight_map={"b": "model-00001-of-00002.safetensors"})
    with pytest.raises(FormatError, match=r"'b' is not in model-00001-of-00002\.safetensors"):
        SafetensorsCheckpoint(index)


@pytest.mark.parametrize(
    "shard",
    [
        "../m.safetensors",
        "/etc/m.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:b.safetensors",
        "m.bin",
        "",
        7,
    ],
)
def test_a_shard_name_that_leaves_the_folder_is_refused(shard: Any) -> None:
    with pytest.raises(FormatError, match="not the name of a"):
        parse_safetensors_index(json.dumps({"weight_map": {"a": shard}}).encode(), name="index")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not an object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors"}, "metadata": 3}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_index_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_safetensors_index(data, name="index")


# Lies

LIES = {
    "empty": (b"", "too few"),
    "short": (b"\1\0\0", "too few"),
    "header length": (build({}, length=2**60), "header length is 1152921504606846976"),
    "header past the end": (build({}, length=99), "header length is 99"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a page": (b"<!DOCTYPE html><html></html>", "HTML page"),
    "no JSON": (build(b"{nope"), "not valid JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (build([]), "not an object"),
    "deep": (build(b'{"a":' * 20_000), "not valid JSON"),
    "many brackets": (build(b"[" * (1 << 20) + b"{"), "over 1048576 lists"),
    "a long number": (build(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a name twice": (build(b'{"a": 1, "b": 2, "a": 3}'), "'a' twice"),
    "half a character": (build(b'{"\\ud800": {}}'), "not Unicode"),
    "metadata": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "no entry": (build({"w": [1]}), "entry of 'w'"),
    "dtype": (build({"w": entry(dtype="F33")}, bytes(8)), "dtype of 'w' is F33"),
    "dtype number": (build({"w": entry(dtype=3)}, bytes(8)), "dtype of 'w' is 3"),
    "no shape": (build({"w": entry(shape=None)}, bytes(8)), "shape of 'w' is None"),
    "negative shape": (build({"w": entry(shape=[-2])}, bytes(8)), r"shape of 'w' is \[-2\]"),
    "fractional shape": (build({"w": entry(shape=[2.0])}, bytes(8)), r"shape of 'w' is \[2.0\]"),
    "true shape": (build({"w": entry(shape=[True])}, bytes(8)), r"shape of 'w' is \[True\]"),
    "overflow": (build({"w": entry(shape=[2**40, 2**40])}, bytes(8)), "2\\^63 elements"),
    "overflow behind a zero": (build({"w": entry([0, 2**40, 2**40], [0, 0])}), "2\\^63 elements"),
    "dimensions": (build({"w": entry(shape=[1] * 100)}, bytes(8)), "64 dimensions"),
    "offsets": (build({"w": entry(offsets=[8, 0])}, bytes(8)), r"data_offsets of 'w' are \[8, 0\]"),
    "three offsets": (build({"w": entry(offsets=[0, 4, 8])}, bytes(8)), "data_offsets of 'w'"),
    "size": (build({"w": entry(shape=[3])}, bytes(8)), "takes 96 bits, its offsets 8 bytes"),
    "overlap": (build({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)), "'w' begins at 4 and overlaps"),
    "hole": (build({"w": entry(offsets=[8, 16])}, bytes(16)), "'w' begins at 8 and leaves a hole"),
    "truncated": (build({"w": entry()}, bytes(7)), "but the file has"),
    "too long": (build({"w": entry()}, bytes(9)), "but the file has"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_by_field_and_value(lie: str) -> None:
    data, message = LIES[lie]
    with pytest.raises(FormatError, match=message) as caught:
        parse(data)
    assert "test.safetensors" in caught.value.message and caught.value.hint
    assert not isinstance(caught.value, NeedMoreBytes)


def test_a_prefix_with_an_absurd_length_is_refused_rather_than_asking_for_it() -> None:
    with pytest.raises(FormatError) as caught:
        parse_safetensors_header(struct.pack("<Q", 2**60), name="remote")
    assert not isinstance(caught.value, NeedMoreBytes)


# Fuzz


@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_reader(data: bytes) -> None:
    for whole in (data, build(data), build(b'{"w":' + data + b"}")):
        for size in (None, len(whole)):
            with contextlib.suppress(LLMasOSError):
                parse_safetensors_header(whole, name="fuzz", file_size=size)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_never_crashes_the_readers(value: Any) -> None:
    encoded = json.dumps(value).encode()
    with contextlib.suppress(LLMasOSError):
        parse(build(encoded, bytes(8)))
    with contextlib.suppress(LLMasOSError):
        parse_safetensors_index(encoded, name="index")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_mutated_files_never_crash_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    header = {"__metadata__": {"a": "b"}, "v": entry([2, 2], [0, 8], "BF16"), "w": entry([2], [8, 16])}
    whole = bytearray(build(header, bytes(range(16))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.sampled_from(list(b'0129",:[]{}FBU\xff\x00')))
        else:
            whole[at : at + data.draw(st.integers(0, 10))] = data.draw(st.binary(max_size=10))
            whole = whole or bytearray(1)
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(whole)
    try:
        touch_everything(path)
    except LLMasOSError as error:
        assert error.message


def test_a_file_cut_at_any_byte_is_an_error_of_ours(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"cut\.safetensors") as caught:
            touch_everything(path)
        assert not isinstance(caught.value, NeedMoreBytes)


# Saving


def test_a_saved_folder_is_read_alike_by_the_library_and_by_us(tmp_path: Path) -> None:
    written = of_every_dtype()
    assert save_safetensors(written, tmp_path / "new", metadata={"who": "me"}) == [tmp_path / "new/model.safetensors"]
    theirs, ours = load_file(tmp_path / "new/model.safetensors"), open_checkpoint(tmp_path / "new")
    assert ours.metadata == {"format": "pt", "who": "me"}
    for name, tensor in written.items():
        assert same(theirs[name], tensor) and same(ours.tensor(name), tensor)


def test_a_large_model_is_cut_into_shards_that_fit(tmp_path: Path) -> None:
    written = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(10)}
    paths = save_safetensors(written, tmp_path, max_shard_size=40)
    shards, index = paths[:-1], json.loads(paths[-1].read_text())
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert index["metadata"] == {"total_size": 55 * 4}
    for shard in shards:
        assert read_safetensors_header(shard).data_size <= 40
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in written.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    paths = save_safetensors(
        {"s": torch.zeros(1), "l": torch.zeros(100), "t": torch.zeros(1)}, tmp_path, max_shard_size=8
    )
    assert [list(read_safetensors_header(p).tensors) for p in paths[:-1]] == [["s"], ["l"], ["t"]]


def test_views_transposes_and_shared_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    written = {
        "base": base,
        "tied": base,
        "t": base.T,
        "row": base[1],
        "slice": base[:, 1:3],
        "none": torch.empty(0, 2),
    }
    save_safetensors(written, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in written.items())


def test_saving_again_leaves_no_file_of_the_earlier_save(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_safetensors({"a": torch.zeros(9), "b": torch.zeros(9), "c": torch.zeros(9)}, tmp_path, max_shard_size=40)
    assert len(list(tmp_path.iterdir())) == 5
    save_safetensors({"a": torch.ones(9)}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    save_safetensors({"a": torch.full((9,), 2.0), "b": torch.zeros(9)}, tmp_path, max_shard_size=40)
    assert open_checkpoint(tmp_path).tensor("a")[0] == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EIO, "Input/output error"), StoreError),
    ],
)
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[StoreError]
) -> None:
    save_safetensors({"a": torch.zeros(9)}, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls: list[Path] = []

    def fail_on_the_second(tensors: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        save_file(tensors, path, **options)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail_on_the_second)
    with pytest.raises(expected) as caught:
        save_safetensors({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path, max_shard_size=40)
    assert type(caught.value) is expected
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="could not be written"):
        save_safetensors({"a": torch.zeros(1)}, tmp_path / "file")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")]
)
def test_tensors_that_the_format_lacks_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError):
        save_safetensors({"a": tensor}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_safetensors({"a": torch.zeros(1)}, tmp_path)
    assert os.stat(tmp_path / "model.safetensors").st_mode == os.stat(tmp_path / "plain").st_mode
