"""GGUF: equal to the gguf package on files it writes, and deaf to lies, on headers written by hand."""

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmasos.errors import FormatError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.formats import GGUFCheckpoint, NeedMoreBytes, TensorInfo, parse_gguf_header, read_gguf_header, split_parts
from llmasos.formats.quants import BLOCK

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def entry(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def parse(data: bytes) -> Any:
    return parse_gguf_header(data, name="test.gguf", file_size=len(data))


def touch_everything(path: Path) -> None:
    checkpoint = GGUFCheckpoint(path)
    for name, info in checkpoint.tensors.items():
        checkpoint.raw(name)
        assert tuple(checkpoint.tensor(name).shape) == info.shape
    checkpoint.close()


VALUES: list[tuple[str, int, str, Any]] = [
    ("a.u8", U8, "<B", 255),
    ("a.i8", I8, "<b", -128),
    ("a.u16", U16, "<H", 65535),
    ("a.i16", I16, "<h", -32768),
    ("a.u32", U32, "<I", 2**32 - 1),
    ("a.i32", I32, "<i", -(2**31)),
    ("a.f32", F32, "<f", 0.5),
    ("a.u64", U64, "<Q", 2**64 - 1),
    ("a.i64", I64, "<q", -(2**63)),
    ("a.f64", F64, "<d", 0.1),
]


def small_file() -> bytes:
    """One file with every kind of value, nested arrays and three tensors, for mutation."""
    keys = [key(name, kind, struct.pack(code, value)) for name, kind, code, value in VALUES]
    keys += [
        key("a.bool", BOOL, b"\1"),
        key("general.architecture", STRING, text("llama")),
        key("general.alignment", U32, struct.pack("<I", 32)),
        key("tokens", ARRAY, array(STRING, 3, text("a") + text("Ġthe") + text(""))),
        key("scores", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
        key("flags", ARRAY, array(BOOL, 2, b"\0\1")),
        key("nested", ARRAY, array(ARRAY, 2, array(U8, 2, b"\1\2") + array(STRING, 1, text("x")))),
    ]
    tensors = [entry("w", (32, 2), 8, 0), entry("b", (3,), 0, 96), entry("h", (2, 2), 30, 128)]
    return build(keys, tensors, bytes(range(68)) + bytes(28) + struct.pack("<3f", 1, 2, 3) + bytes(20) + bytes(8))


def write_reference(path: Path, **writer_options: Any) -> dict[str, tuple[np.ndarray, str]]:
    """A model written by the gguf package with every type it can quantise to: name -> (what was stored, type)."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", **writer_options)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "Ġhello", "猫", ""])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.25])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 6])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    written: dict[str, tuple[np.ndarray, str]] = {}
    for kind in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        data = (rng.standard_normal((3, 5)) * 50).astype(kind)
        code = np.dtype(kind).str[1:]
        written[f"plain.{code}"] = (data, f"{code[0].upper()}{int(code[1:]) * 8}")
        writer.add_tensor(f"plain.{code}", data)
    for dtype in ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]:
        kind = gguf.GGMLQuantizationType[dtype]
        blocks = gguf.quants.quantize(rng.standard_normal((2, 4, 64), dtype=np.float32), kind)
        written[f"blocks.{dtype}"] = (blocks, dtype)
        writer.add_tensor(f"blocks.{dtype}", blocks, raw_dtype=kind)
    for dtype in ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]:
        blocks = rng.integers(0, 60, (3, 2 * BLOCK[dtype][1]), dtype=np.uint8)  # below 0x7C: no scale is infinite
        written[f"blocks.{dtype}"] = (blocks, dtype)
        writer.add_tensor(f"blocks.{dtype}", blocks, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def expected(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in BLOCK or dtype == "BF16":
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[dtype])
    return stored


def assert_holds(checkpoint: GGUFCheckpoint, written: dict[str, tuple[np.ndarray, str]]) -> None:
    assert set(checkpoint.tensors) == set(written)
    for name, (stored, dtype) in written.items():
        tensor, want = checkpoint.tensor(name), expected(stored, dtype)
        assert checkpoint.tensors[name] == TensorInfo(name, dtype, want.shape, stored.nbytes)
        assert tensor.dtype == (torch.bfloat16 if dtype == "BF16" else torch.from_numpy(want.copy()).dtype)
        assert np.array_equal(tensor.float().numpy() if dtype == "BF16" else tensor.numpy(), want)
        assert checkpoint.raw(name).numpy().tobytes() == stored.tobytes()


def test_a_file_of_the_gguf_package_reads_back_as_written(tmp_path: Path) -> None:
    written = write_reference(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert_holds(checkpoint, written)
    metadata = checkpoint.metadata
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġhello", "猫", ""]
    assert metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.5, 2.25]
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert metadata["tokenizer.ggml.add_bos_token"] is False and metadata["llama.rope.freq_base"] == 10000.0


def test_a_raw_tensor_has_one_row_of_bytes_per_row_of_weights(tmp_path: Path) -> None:
    write_reference(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.raw("blocks.Q4_1").shape == (8, 40)
    assert checkpoint.raw("plain.f4").shape == (3, 20)


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_is_read(version: int) -> None:
    metadata = parse(build([key(n, t, struct.pack(c, v)) for n, t, c, v in VALUES], version=version)).metadata
    assert metadata == {name: value for name, _, _, value in VALUES}


@pytest.mark.parametrize(("name", "kind", "code", "value"), VALUES)
def test_arrays_of_every_number_type_become_numpy(name: str, kind: int, code: str, value: float) -> None:
    metadata = parse(build([key(name, ARRAY, array(kind, 3, struct.pack(f"<3{code[1]}", value, 0, 1)))])).metadata
    assert metadata[name].dtype == np.dtype(code)
    assert metadata[name].tolist() == [value, 0, 1]


def test_strings_booleans_and_nested_arrays_are_read() -> None:
    metadata = parse(small_file()).metadata
    assert metadata["tokens"] == ["a", "Ġthe", ""]
    assert metadata["flags"].tolist() == [False, True] and metadata["a.bool"] is True
    assert metadata["nested"][0].tolist() == [1, 2] and metadata["nested"][1] == ["x"]


@pytest.mark.parametrize("kind", [F32, BOOL, STRING, ARRAY])
def test_empty_arrays_are_read(kind: int) -> None:
    value = parse(build([key("empty", ARRAY, array(kind, 0))])).metadata["empty"]
    assert len(value) == 0


def test_tensors_are_views_of_the_map_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_file())
    checkpoint = GGUFCheckpoint(path)
    first, second = checkpoint.tensor("b"), checkpoint.tensor("b")
    assert first.data_ptr() == second.data_ptr()
    first.fill_(7)
    assert path.read_bytes() == small_file()


def test_tensors_outlive_the_checkpoint_and_a_closed_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_file())
    checkpoint = GGUFCheckpoint(path)
    tensor = checkpoint.tensor("b")
    checkpoint.close()
    assert tensor.tolist() == [1, 2, 3]
    with pytest.raises(LLMasOSError, match="closed"):
        checkpoint.tensor("b")


def test_a_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [entry("a", (3,), 24, 0), entry("b", (2,), 0, 3)]
    for pad in range(4):  # three of four lengths of a key put the floats at an address that is no multiple of 4
        keys = [key("general.alignment", U32, struct.pack("<I", 1)), key("k" * (pad + 1), U8, b"\0")]
        path.write_bytes(build(keys, tensors, b"\1\2\3" + struct.pack("<2f", 4, 5), alignment=1))
        tensor = GGUFCheckpoint(path).tensor("b")
        assert tensor.tolist() == [4, 5] and tensor.data_ptr() % 4 == 0


def test_scalars_and_empty_tensors_have_their_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [entry("s", (), 0, 0), entry("e", (0, 4), 0, 32)], struct.pack("<f", 2) + bytes(28)))
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.tensor("s").shape == () and checkpoint.tensor("s").item() == 2
    assert checkpoint.tensor("e").shape == (4, 0) and checkpoint.raw("e").shape == (4, 0)


def test_a_vocabulary_file_without_tensors_opens(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(build([key("a", U8, b"\1")], alignment=1))
    assert GGUFCheckpoint(path).metadata == {"a": 1}


@pytest.mark.parametrize(("kind", "name"), [(16, "IQ2_XXS"), (15, "Q8_K"), (99, "GGML_TYPE_99")])
def test_a_type_without_a_decoder_opens_and_is_named_when_touched(tmp_path: Path, kind: int, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [entry("w", (256,), kind, 0)], bytes(512)))
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.tensors["w"].dtype == name
    with pytest.raises(UnsupportedError, match=name):
        checkpoint.tensor("w")


def test_a_missing_tensor_is_not_found_and_its_neighbours_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build([], [entry("blk.0.attn_q.weight", (8,), 0, 0)], bytes(32)))
    with pytest.raises(NotFoundError, match=r"Similar names: blk\.0\.attn_q\.weight"):
        GGUFCheckpoint(path).tensor("blk.0.attn_k.weight")


# Files in parts


def split_model(folder: Path, **changes: Any) -> list[Path]:
    """Three parts with one tensor each; `changes` replace values in the second part's or the first part's header."""
    said = {"no": 1, "count": 3, "tensors": 3, "name": "t1"} | changes
    paths = []
    for i in range(3):
        no, count = (said["no"], said["count"]) if i == 1 else (i, 3)
        keys = [
            key("split.no", U16, struct.pack("<H", no)),
            key("split.count", U16, struct.pack("<H", count)),
            key("split.tensors.count", I32, struct.pack("<i", said["tensors"])),
        ]
        if i == 0:
            keys.append(key("general.name", STRING, text("whole")))
        paths.append(folder / f"m-{i + 1:05d}-of-00003.gguf")
        name = said["name"] if i == 1 else f"t{i}"
        paths[-1].write_bytes(build(keys, [entry(name, (2,), 0, 0)], struct.pack("<2f", i, i)))
    return paths


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_opens_the_whole_model(tmp_path: Path, part: int) -> None:
    paths = split_model(tmp_path)
    assert split_parts(paths[part]) == paths
    checkpoint = GGUFCheckpoint(paths[part])
    assert checkpoint.metadata["general.name"] == "whole"
    assert [checkpoint.tensor(f"t{i}").tolist() for i in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_parts_written_by_the_gguf_package_read_back_as_written(tmp_path: Path) -> None:
    written = write_reference(tmp_path / "m.gguf", split_max_tensors=7)
    assert_holds(GGUFCheckpoint(tmp_path / "m-00001-of-00003.gguf"), written)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    paths[2].unlink()
    with pytest.raises(FormatError, match=r"m-00003-of-00003\.gguf is missing"):
        GGUFCheckpoint(paths[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no": 0}, "split.no is 0"),
        ({"count": 2}, "split.count 2"),
        ({"tensors": 4}, "split.tensors.count is 4"),
        ({"name": "t0"}, "t0 also in an earlier part"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        GGUFCheckpoint(split_model(tmp_path, **changes)[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not named as a part"):
        GGUFCheckpoint(split_model(tmp_path)[0].rename(tmp_path / "model.gguf"))


# Headers from a prefix


def test_a_header_can_be_read_by_asking_for_more_bytes() -> None:
    data = small_file()
    given = 0
    for _ in range(200):
        try:
            header = parse_gguf_header(data[:given], name="remote")
            break
        except NeedMoreBytes as more:
            assert given < more.needed <= len(data)
            given = more.needed
    assert header.tensors == parse(data).tensors and header.offsets == parse(data).offsets
    assert given <= header.data_start


def test_every_prefix_asks_for_more_and_every_truncation_is_an_error() -> None:
    data = small_file()
    header = parse(data)
    table_end = data.index(text("h")) + len(entry("h", (2, 2)))
    for cut in range(table_end):
        with pytest.raises(NeedMoreBytes):
            parse_gguf_header(data[:cut], name="remote")
    for cut in range(len(data)):
        with pytest.raises(FormatError) as caught:
            parse(data[:cut])
        assert not isinstance(caught.value, NeedMoreBytes)
    assert parse_gguf_header(data[:table_end], name="remote").tensors == header.tensors


# Lies

LIES = {
    "empty": (b"", "it is empty"),
    "another file": (b"PK\x03\x04" + bytes(60), "ZIP archive"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "tensor count": (build(num_tensors=2**60), "tensor count is 1152921504606846976"),
    "many tensors": (build(num_tensors=100_000), "the tensor table takes 2400000 bytes"),
    "key count": (build(num_keys=2**60), "key count is 1152921504606846976"),
    "more keys than there are": (build([key("a", U8, b"\1")], num_keys=2), "key 1"),
    "key length": (build([struct.pack("<Q", 2**60)]), "the length of key 0 is 1152921504606846976"),
    "string length": (build([key("a", STRING, struct.pack("<Q", 2**40))]), "value of a is 1099511627776"),
    "string past the end": (build([key("a", STRING, struct.pack("<Q", 999))]), "value of a takes 999 bytes"),
    "array length": (build([key("a", ARRAY, array(U64, 2**61))]), "value of a takes 18446744073709551616 bytes"),
    "string array length": (build([key("a", ARRAY, array(STRING, 2**60))]), "value of a has 1152921504606846976"),
    "string array past the end": (build([key("a", ARRAY, array(STRING, 99))]), "value of a takes 792 bytes"),
    "string in an array": (
        build([key("a", ARRAY, array(STRING, 2, text("") + struct.pack("<Q", 77)))]),
        r"a\[1\] takes 77",
    ),
    "nested array length": (build([key("a", ARRAY, array(ARRAY, 2**50))]), "value of a has 1125899906842624"),
    "deep arrays": (build([key("a", ARRAY, array(ARRAY, 1) * 50)]), "deeper than 8"),
    "value type": (build([key("a", 13, bytes(8))]), "type of the value of a is 13"),
    "element type": (build([key("a", ARRAY, array(77, 1))]), "element type of the value of a is 77"),
    "boolean": (build([key("a", BOOL, b"\2")]), "the boolean 2"),
    "not UTF-8": (build([key("a", STRING, text(b"ab\xff"))]), "not UTF-8"),
    "not UTF-8 in an array": (
        build([key("a", ARRAY, array(STRING, 2, text("b") + text(b"\xff")))]),
        r"a\[1\] is not UTF-8",
    ),
    "key not UTF-8": (build([key(b"\xff", U8, b"\1")]), "key 0 is not UTF-8"),
    "key twice": (build([key("a", U8, b"\1")] * 2), "'a', occurs twice"),
    "alignment 0": (build([key("general.alignment", U32, bytes(4))]), "general.alignment is 0"),
    "alignment -32": (build([key("general.alignment", I32, struct.pack("<i", -32))]), "general.alignment is -32"),
    "alignment 24": (build([key("general.alignment", U32, struct.pack("<I", 24))]), "general.alignment is 24"),
    "alignment of text": (build([key("general.alignment", STRING, text("big"))]), "general.alignment is 'big'"),
    "huge alignment": (
        build([key("general.alignment", U64, struct.pack("<Q", 2**62))]),
        "alignment is 4611686018427387904",
    ),
    "tensor twice": (build([], [entry("w", (8,))] * 2, bytes(64)), "'w' occurs twice"),
    "dimensions": (build([], [entry("w", (1, 1, 1, 1, 1))], bytes(64)), "dimension count of w is 5"),
    "dimension count": (
        build([], [entry("w", (8,), num_dims=2**32 - 1)], bytes(64)),
        "dimension count of w is 4294967295",
    ),
    "overflow": (build([], [entry("w", (2**32, 2**32))], bytes(64)), "over 2\\^63 elements"),
    "overflow behind a zero": (build([], [entry("w", (0, 2**62, 2**62))], bytes(64)), "over 2\\^63 elements"),
    "size": (build([], [entry("w", (2**50,))], bytes(64)), "w takes 4503599627370496 bytes"),
    "offset": (build([], [entry("w", (8,), offset=2**63)], bytes(64)), "past the file's end"),
    "offset alignment": (build([], [entry("w", (1,), offset=8)], bytes(64)), "offset of w is 8, not a multiple"),
    "overlap": (
        build([], [entry("w", (16,)), entry("v", (8,), offset=32)], bytes(64)),
        "v begins at offset .*, inside w",
    ),
    "row of part blocks": (
        build([], [entry("w", (33, 32), 8)], bytes(4096)),
        "33 elements, not a multiple of Q8_0's 32",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_by_field_and_value_without_allocating(lie: str) -> None:
    data, message = LIES[lie]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message) as caught:
            parse(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "test.gguf" in caught.value.message and caught.value.hint
    assert not isinstance(caught.value, NeedMoreBytes)


@pytest.mark.parametrize("lie", ["tensor count", "key count", "key length", "string length", "array length"])
def test_a_prefix_with_absurd_counts_is_refused_rather_than_asking_for_them(lie: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_gguf_header(LIES[lie][0], name="remote")
    assert not isinstance(caught.value, NeedMoreBytes)


def test_big_endian_and_other_versions_are_named() -> None:
    with pytest.raises(UnsupportedError, match="big-endian"):
        parse(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedError, match="version 1;"):
        parse(build(version=1))


def test_a_sparse_file_of_empty_strings_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(build([key("a", ARRAY, array(STRING, 2**27))], alignment=1))
        file.truncate(2**31)
    with pytest.raises(FormatError, match="134217728 elements"):
        read_gguf_header(path)


def test_a_sparse_file_of_long_strings_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(build([key("a", ARRAY, array(STRING, 99, text("x") + struct.pack("<Q", 2**28 - 9)))], alignment=1))
        file.truncate(2**31)
    with pytest.raises(FormatError, match=r"a\[1\] takes 268435447 bytes .* headers over 268435456 are refused"):
        read_gguf_header(path)


# Fuzz


@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_reader(data: bytes) -> None:
    for start in (b"", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + bytes([1, *bytes(7), 1, *bytes(7)])):
        for size in (None, len(start + data)):
            with contextlib.suppress(LLMasOSError):
                parse_gguf_header(start + data, name="fuzz", file_size=size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
@given(st.data())
def test_mutated_files_never_crash_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["byte", "integer", "delete", "insert"]))
        if kind == "byte":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "integer":
            whole[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        elif kind == "delete":
            del whole[at : at + data.draw(st.integers(1, 40))]
            whole = whole or bytearray(1)
        else:
            whole[at:at] = data.draw(st.binary(max_size=40))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(whole)
    try:
        touch_everything(path)
    except LLMasOSError as error:
        assert error.message


def test_a_file_cut_at_any_byte_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    data = small_file()
    for cut in range(0, len(data), 3):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            touch_everything(path)


# A real model


@pytest.mark.shared
def test_smollm2_reads_as_the_gguf_package_reads_it() -> None:
    folder = Path(os.environ.get("LLMASOS_TEST_DATA", "/nonexistent"))
    found = sorted(folder.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not found:
        pytest.skip("LLMASOS_TEST_DATA names no folder with SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs, ours = gguf.GGUFReader(found[0]), GGUFCheckpoint(found[0])
    for name, field in theirs.fields.items():
        if name.startswith("GGUF."):
            continue
        value, want = ours.metadata[name], field.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == want, name
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.tensor(tensor.name).numpy(), want), tensor.name
