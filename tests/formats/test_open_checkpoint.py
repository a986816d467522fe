"""What a path holds is decided by bytes and names; what could run code is refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmasos.errors import FormatError, NotFoundError, PickleRefusedError, StoreError
from llmasos.formats import GGUFCheckpoint, SafetensorsCheckpoint, open_checkpoint


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path) -> Path:
    save_file({"w": torch.ones(4)}, path)
    return path


@pytest.mark.parametrize("name", ["m.gguf", "m.GGUF", "ggml-model.bin", "0123abcd"])
def test_a_gguf_file_opens_under_any_name(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / name))
    assert isinstance(checkpoint, GGUFCheckpoint) and checkpoint.tensor("w").tolist() == [1] * 4


@pytest.mark.parametrize("name", ["m.safetensors", "0123abcd"])
def test_a_safetensors_file_opens_with_and_without_its_suffix(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_safetensors(tmp_path / name))
    assert isinstance(checkpoint, SafetensorsCheckpoint) and checkpoint.tensor("w").tolist() == [1] * 4


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    for name in ("m.safetensors", "0123abcd"):
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + b"\5")
        assert open_checkpoint(tmp_path / name).tensor("w").tolist() == [5]


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_folder_with_one_safetensors_file_opens(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).tensor("w").tolist() == [1] * 4


def test_a_folder_with_one_gguf_model_opens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)


def test_a_folder_with_two_gguf_models_asks_which(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(FormatError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    for i in (1, 2):
        write_safetensors(tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(FormatError, match="no index of them: model-00001-of-00002"):
        open_checkpoint(tmp_path)


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl", "m.safetensors", "noname", "folder"])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_pickle_is_refused_unread_with_the_reason_and_the_way_out(tmp_path: Path, name: str, how: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        path = path / "pytorch_model.bin"
    trap = {"w": Trap(str(tmp_path / "sprung"))}
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(PickleRefusedError, match="runs any code") as caught:
        open_checkpoint(tmp_path / name)
    assert "safetensors" in caught.value.hint and "save_pretrained" in caught.value.hint
    assert not (tmp_path / "sprung").exists()


def test_training_leftovers_are_not_taken_for_a_pickle_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FormatError, match=r"no model that can be loaded; it holds training_args\.bin") as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, PickleRefusedError)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="it holds nothing"):
        open_checkpoint(tmp_path)
    for i in range(20):
        (tmp_path / f"file{i:02d}.txt").touch()
    with pytest.raises(FormatError, match=r"file00\.txt, .*file07\.txt and 12 more"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>404</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (bytes(1000), "begins with zeros"),
        (b"tjgg" + bytes(90), "before GGUF"),
    ],
)
def test_a_file_that_is_no_model_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path / "model")


def test_a_path_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_checkpoint(tmp_path / "nothing.gguf")


def test_a_path_that_the_system_refuses_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="could not be read"):
        open_checkpoint(tmp_path / ("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "m.gguf")


def test_reading_headers_loads_no_torch(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_safetensors(tmp_path / "m.safetensors")
    code = (
        "import sys; from pathlib import Path; from llmasos.formats import open_checkpoint\n"
        "for p in sys.argv[1:]: assert open_checkpoint(Path(p)).tensors['w'].shape == (4,)\n"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "m.gguf"), str(tmp_path / "m.safetensors")]
    assert subprocess.run(arguments).returncode == 0
