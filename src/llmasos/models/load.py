"""A path -> a model on a device; and back to a folder that transformers loads.

Weights go from the mapped file to their place a few modules at a time, so loading needs little more memory than the
model. Without a checkpoint they can be made up on the device, for measurements.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmasos.devices import Placement, place, set_threads
from llmasos.errors import FormatError, InvalidInputError, NotFoundError, UnsupportedError
from llmasos.formats import Checkpoint, open_checkpoint, save_safetensors, sync
from llmasos.formats.checkpoint import gguf_in as gguf_in
from llmasos.formats.quants import BLOCK, dequantize
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder
from llmasos.models.families import config_from_hf, config_to_hf, family_of
from llmasos.models.families.gguf import GGUF_IGNORED, config_from_gguf, gguf_join, gguf_weights
from llmasos.models.families.mapping import source_of, spellings, to_hf
from llmasos.models.lowbit import FOUR_BIT, BlockEmbedding, Blocks, Int4Linear, Int8Linear, PackedLinear
from llmasos.models.parallel import Group, RowParallel, Shard, parallelize, shard_config
from llmasos.models.weights import Upload, fill_with_noise, is_tied, own_part, tie
from llmasos.settings import settings

if TYPE_CHECKING:
    from llmasos.text import Tokenizer

_log = logging.getLogger("llmasos")
MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]
"""Weight [N, K] and bias [N] -> a layer that computes with them."""
Ready = Callable[["LoadedModel", str], None]
"""Gets a model that is being loaded and the name of the part that is there now: a block, or "" for the whole."""
Quantization = Literal["auto", "none", "int8", "int4"]
QUANTIZATIONS = ("auto", "none", "int8", "int4")
LOAD_FORMATS = ("auto", "dummy")
READERS = 4
"""Threads that read a checkpoint for a GPU: one alone copies out of the page cache slower than a disk array reads."""
ROUNDED_ROWS = 4096
"""Rows of a matrix that are rounded at a time."""
_LAYER = re.compile(r"(?<=layers\.)\d+")


@dataclass
class LoadedModel:
    """A model in memory and what belongs to it."""

    module: Any
    config: ModelConfig
    """The whole model's; `module.config` is what this process computes of it."""
    tokenizer: Tokenizer | None
    path: Path
    generation: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults of generation_config.json."""
    pooling: dict[str, Any] = field(default_factory=dict)
    """How an encoder's vectors are pooled: see `encoder.pooling_defaults`. Empty for decoders."""

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, safetensors and tokenizer as Hugging Face keeps them, and how an encoder's vectors are
        pooled as sentence-transformers does; transformers loads the folder.

        Raises UnsupportedError for a model whose weights are low-bit in memory (load it with quantization="none"), and
        for one born from GGUF that its Hugging Face class can't express."""
        folder = Path(folder)
        if any(hasattr(m, "dequantize") for m in self.module.modules()):
            raise UnsupportedError(
                "This model's weights are low-bit in memory and can't be saved at full precision.",
                hint='Load it with quantization="none" first.',
            )
        if any(isinstance(m, RowParallel) for m in self.module.modules()):
            raise UnsupportedError(
                "This process holds only a part of the model's weights.", hint="Load it with tensor_parallel_size=1."
            )
        check_expressible(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.module.state_dict())
        config = config_to_hf(self.config) | {"dtype": str(self.module.dtype).removeprefix("torch.")}
        write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_safetensors(dict(to_hf(family_of(self.config), self.config, state)), folder, metadata={"format": "pt"})
        if self.generation:
            write_atomically(folder / "generation_config.json", json.dumps(self.generation, indent=2) + "\n")
        if self.pooling:
            from llmasos.models.encoder import pooling_files

            for name, content in pooling_files(self.pooling, self.config.hidden_size).items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def check_expressible(config: ModelConfig) -> None:
    """What the config.json says, read again, is the same model. Free: layout (the weights' names undo it) and a pooler
    that a class has and the checkpoint had not."""
    again = replace(
        config_from_hf(config_to_hf(config)), rope_interleaved=config.rope_interleaved, pooler=config.pooler
    )
    if again != config:
        names = [f.name for f in fields(config) if f.compare and getattr(again, f.name) != getattr(config, f.name)]
        raise UnsupportedError(
            f"A config.json of {config.architecture} can't say what this model is: {', '.join(names)} would change.",
            hint="Keep the file that it was loaded from.",
        )


def write_atomically(path: Path, text: str) -> None:
    """All of the text or nothing, also after a power cut: written beside its place, to the disk, then moved over it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # where its name is
    finally:
        temporary.unlink(missing_ok=True)


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of an HF folder or a GGUF file, without loading weights."""
    if path.suffix == ".gguf":
        with closing(open_checkpoint(path)) as checkpoint:
            return _gguf_config(checkpoint)
    file = path / "config.json"
    if not file.is_file():
        raise NotFoundError(f"{path} has no config.json.", hint="Give a Hugging Face model folder or a .gguf file.")
    return config_from_hf(read_json(file))


def _gguf_config(checkpoint: Checkpoint) -> ModelConfig:
    return config_from_gguf(checkpoint.metadata, checkpoint.tensors, checkpoint.tensor)


def _open(path: Path) -> tuple[ModelConfig, Checkpoint]:
    """Config and checkpoint; a folder's config is read first, so that an unknown architecture is what is said of it."""
    if path.suffix == ".gguf":
        checkpoint = open_checkpoint(path)
        return _gguf_config(checkpoint), checkpoint
    config = read_config(path)
    checkpoint = open_checkpoint(path)
    return _as_stored(config, checkpoint), checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FormatError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise FormatError(f"{path} is not valid JSON: {e}.", hint="Fetch the file again.") from e
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a {type(data).__name__}, not an object.", hint="Fetch the file again.")
    return data


def load_model(
    path: Path | str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str = "auto",
    with_tokenizer: bool = True,
    load_format: str = "auto",
    group: Group | None = None,
    linear: MakeLinear | None = None,
    ready: Ready | None = None,
    layers: Sequence[int] | None = None,
) -> LoadedModel:
    """Load an HF folder (config.json + safetensors) or a GGUF file.

    `device`, `dtype`: see `llmasos.devices`; "auto" also reads LLMASOS_DEVICE and LLMASOS_DTYPE (encoders on a
    CPU: float32). `quantization`: "auto" keeps GGUF's low-bit weights low-bit where that is faster (CPU) and
    leaves others alone; "none" computes with full weights; "int8" and "int4" round the linear layers but the head on
    loading (CPU, bfloat16; int4 falls back to int8, and int8 to none, for a layer whose size has no kernel).
    `load_format`: "dummy" takes a folder with a config.json alone and makes random weights, always the same ones on the
    same kind of device. `group`: this process loads its share of a tensor-parallel model. `linear`: makes the blocks'
    linear layers, out of weight and bias on the device, one after the other; for weights that are kept in another form.
    `ready`: called as soon as a block of a checkpoint's decoder is there, before the next one is read, and last for the
    whole; so it may keep a part of each, and a model is not in memory as a whole at any time. `layers`: numbers from 0,
    ascending, of a decoder's blocks: the model has only these, and the others are not read; see `some_layers`.
    Raises NotFoundError, FormatError, UnknownArchitectureError, UnsupportedError, DeviceError, InvalidInputError.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no model at {path}.", hint="See `llmasos ls`.")
    _check_choice("quantization", quantization, QUANTIZATIONS)
    _check_choice("load_format", load_format, LOAD_FORMATS)
    own = group, linear, ready, layers
    if load_format == "dummy":
        return _load(path, read_config(path), None, device, dtype, quantization, with_tokenizer, *own)
    path = gguf_in(path)
    config, checkpoint = _open(path)
    with closing(checkpoint):
        return _load(path, config, checkpoint, device, dtype, quantization, with_tokenizer, *own)


def some_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The config of a decoder that has only these layers, numbered anew. Raises InvalidInputError, UnsupportedError."""
    if config.is_encoder:
        raise UnsupportedError("Some layers alone can be loaded of a decoder; this is an encoder.", param="layers")
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= config.num_layers:
        raise InvalidInputError(
            f"layers={list(layers)} are not some of the {config.num_layers} layers of this model, in their order.",
            hint=f"Name some of 0 to {config.num_layers - 1}, each once, e.g. 0,2,4.",
            param="layers",
        )
    if config.scale_by_layer and layers[-1] != len(layers) - 1:
        raise UnsupportedError(
            "This model divides the scores of each layer by its number, and without all before it "
            f"layer {layers[-1]} has another one.",
            hint=f"Take the first ones: {','.join(map(str, range(len(layers))))}.",
            param="layers",
        )
    return replace(
        config,
        num_layers=len(layers),
        layer_types=tuple(config.layer_types[i] for i in layers) if config.layer_types else (),
        nope_layers=tuple(new for new, old in enumerate(layers) if old in config.nope_layers),
    )


def _in_passing_thread(work: Callable[[], None], stop: threading.Event) -> None:
    """Every thread that runs parallel kernels keeps helpers for them while it lives. With more helpers than processors
    all of them sleep between two kernels, and a decoded token takes twice as long: so those of loading are let go.

    `stop` is set when whoever waits is interrupted (Ctrl-C), and `work` is then to end soon: the thread is waited for
    in any case, as torch aborts where the interpreter ends before it."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as e:
            done.set_exception(e)
        else:
            done.set_result(None)

    thread = threading.Thread(target=run, name="llmasos-load")
    try:
        with _stopping(stop):
            thread.start()
            done.result()
    finally:
        if thread.is_alive():
            thread.join()


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` where anything goes wrong."""
    try:
        yield
    except BaseException:
        stop.set()
        raise


def check_stop(stop: threading.Event) -> None:
    """Raises CancelledError where nobody waits any more for what is being loaded."""
    if stop.is_set():
        raise CancelledError


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidInputError(f"{name}={value!r} is not known.", hint=f"Use {', '.join(known)}.", param=name)


def _load(
    path: Path,
    config: ModelConfig,
    checkpoint: Checkpoint | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantization: str,
    with_tokenizer: bool,
    group: Group | None,
    linear: MakeLinear | None,
    ready: Ready | None,
    layers: Sequence[int] | None,
) -> LoadedModel:
    stored = config
    if layers is not None:
        config = some_layers(stored, layers)
    placement = place(group.device if group is not None else device, dtype, encoder=config.is_encoder)
    if placement.device.type == "cpu":
        threads = set_threads(settings().threads)
        if group is not None:
            torch.set_num_threads(max(1, threads // group.size))
    _check_rounding(quantization, placement, exact=checkpoint is None or group is not None)
    whole = _build(config)
    shard, module = None, whole
    if group is not None and group.size > 1:
        shard = Shard(config, group.rank, group.size)
        module = _build(shard_config(config, group.size))
    module.eval().requires_grad_(False)
    model = LoadedModel(
        module=module,
        config=config,
        tokenizer=_tokenizer(path, checkpoint) if with_tokenizer else None,
        path=path,
        generation=_generation(path),
        pooling=_pooling(path) if config.is_encoder else {},
    )

    stop = threading.Event()

    def fill() -> None:
        if checkpoint is None:
            fill_with_noise(config, whole, module, shard, placement, lambda: check_stop(stop))
            if linear is not None:
                made_anew(module, linear)
        else:
            filler = _Filler(config, checkpoint, placement, quantization, whole, shard, linear, stop)
            if layers is not None:
                filler.take(stored, layers)
            filler.fill(module, partial(ready, model) if ready is not None else None)

    if placement.device.type == "cpu":
        _in_passing_thread(fill, stop)
    else:
        fill()
    if shard is not None and group is not None:
        assert isinstance(module, Decoder)
        parallelize(module, group)
    return model


def _check_rounding(quantization: str, placement: Placement, *, exact: bool) -> None:
    """`exact`: weights that are shared out or made up are not rounded."""
    if quantization not in ("int8", "int4"):
        return
    if exact:
        raise UnsupportedError(
            f"quantization={quantization!r} needs all weights of a checkpoint in one process.",
            hint='Use quantization="none", or tensor_parallel_size=1 and load_format="auto".',
            param="quantization",
        )
    if placement.device.type != "cpu" or placement.dtype == torch.float16:
        raise UnsupportedError(
            f"quantization={quantization!r} runs on a CPU with bfloat16 or float32; this is {placement.device} with "
            f"{placement.dtype}.",
            hint='Use quantization="none", or device="cpu" and dtype="bfloat16".',
            param="quantization",
        )


def _as_stored(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Encoders trained for embeddings are often saved without the pooler that their class has."""
    if config.pooler and not any(name.endswith("pooler.dense.weight") for name in checkpoint.tensors):
        return replace(config, pooler=False)
    return config


def _tokenizer(path: Path, checkpoint: Checkpoint | None) -> Tokenizer | None:
    from llmasos.text import load_tokenizer, tokenizer_from_gguf

    if checkpoint is None:  # a config.json is enough
        with suppress(NotFoundError):
            return load_tokenizer(path)
        return None
    return tokenizer_from_gguf(checkpoint.metadata) if path.suffix == ".gguf" else load_tokenizer(path)


def _generation(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_json(file) if path.is_dir() and file.is_file() else {}


def _pooling(path: Path) -> dict[str, Any]:
    from llmasos.models.encoder import pooling_defaults

    return pooling_defaults(path)


def _build(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        if config.is_encoder:
            from llmasos.models.encoder import Encoder

            return Encoder(config)
        return Decoder(config)


class _Filler:
    """Puts a checkpoint's tensors into a module made on the meta device. `whole` has the shapes of all weights; `shard`
    says which part of them the module holds."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        placement: Placement,
        quantization: str,
        whole: nn.Module,
        shard: Shard | None,
        linear: MakeLinear | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.stop = stop or threading.Event()
        """Once it is set, the next tensor raises CancelledError."""
        self.layers: Sequence[int] | None = None
        """Of the checkpoint, that the module's blocks are; None: all."""
        self.config, self.checkpoint, self.shard, self.linear = config, checkpoint, shard, linear
        self.device, self.dtype = placement.device, placement.dtype
        self.shapes = {name: p.shape for name, p in whole.named_parameters(remove_duplicate=False)}
        self.is_gguf = checkpoint.path.suffix == ".gguf"
        self.used: set[str] = set()
        self.keep_blocks = self.is_gguf and quantization == "auto" and placement.low_bit and shard is None
        self.round_to = quantization if quantization in ("int8", "int4") else None
        self.upload = Upload(self.device) if self.device.type == "cuda" else None

    def take(self, stored: ModelConfig, layers: Sequence[int]) -> None:
        """The blocks are these of the checkpoint's; tensors of the others are known and not read."""
        for name, _ in _build(stored).named_parameters(remove_duplicate=False):
            if (number := _LAYER.search(name)) and int(number.group()) not in layers:
                self._source(name)
        self.layers = layers

    def fill(self, module: nn.Module, ready: Callable[[str], None] | None = None) -> None:
        """Block by block, if somebody wants to know when each is there; else with reads that never pause."""
        modules = list(module.named_modules())
        if self.linear is not None and self.upload is not None:
            self.upload.begin()
        pool = ThreadPoolExecutor(READERS, "llmasos-load", self.upload.begin) if self.upload is not None else None
        with pool or nullcontext() as readers, _stopping(self.stop):  # readers are waited for, with all in their queue
            if ready is None:
                self._fill_modules(module, modules, readers)
            else:
                for block in (f"layers.{i}" for i in range(self.config.num_layers)):
                    self._fill_modules(module, [m for m in modules if m[0].startswith(f"{block}.")], readers)
                    ready(block)
                self._fill_modules(module, [m for m in modules if not m[0].startswith("layers.")], readers)
        tie(self.config, module, self.shard)
        if ready is not None:
            ready("")
        self._report_leftovers()

    def _fill_modules(
        self, root: nn.Module, modules: Sequence[tuple[str, nn.Module]], readers: ThreadPoolExecutor | None
    ) -> None:
        """A mapped file costs a CPU nothing to "read": there are no readers. The first error, in the order of the
        modules, is the one that is raised."""
        wanted: list[tuple[nn.Module, str, str]] = []
        for name, child in modules:
            check_stop(self.stop)
            if isinstance(child, nn.Linear) and self._replace_linear(root, name, child):
                continue
            if isinstance(child, nn.Embedding) and self._replace_embedding(root, name):
                continue
            for leaf, parameter in child._parameters.items():
                if parameter is not None and parameter.is_meta and not is_tied(self.config, f"{name}.{leaf}"):
                    wanted.append((child, leaf, f"{name}.{leaf}"))
        read = map if readers is None else readers.map
        found = read(self._parameter, [name for _, _, name in wanted])
        for (child, leaf, _), parameter in zip(wanted, found, strict=True):
            child._parameters[leaf] = parameter

    def _report_leftovers(self) -> None:
        """Weights that nothing here uses may belong to a variant that would be computed wrongly without a word. GGUF
        has one layout, so that is an error there; Hugging Face folders often carry heads and buffers of training."""
        ignored = GGUF_IGNORED if self.is_gguf else re.compile(family_of(self.config).ignored)
        known = self.used | self._tied_heads()
        left = [name for name in self.checkpoint.tensors if name not in known and not ignored.fullmatch(name)]
        if not left:
            return
        found = (
            f"{self.checkpoint.path} holds {len(left)} tensors that a {self.config.architecture} has no use for: "
            f"{', '.join(sorted(left)[:4])}{', ...' if len(left) > 4 else '.'}"
        )
        if self.is_gguf:
            raise UnsupportedError(found, hint="It is a variant of the architecture that is not supported.")
        _log.warning(found)

    def _tied_heads(self) -> set[str]:
        """Names under which a checkpoint may hold the embeddings a second time."""
        if self.is_gguf or self.config.is_encoder or not self.config.tie_embeddings:
            return set()
        family = family_of(self.config)
        names, _ = source_of(family, self.config, "head.weight")
        return {spelled for name in names for spelled in spellings(family, name)}

    def _parameter(self, name: str) -> nn.Parameter | None:
        names, join = self._source(name)
        whole = join([self._read(n) for n in names])
        check_stop(self.stop)
        self._check_shape(names, whole.shape, self.shapes[name])
        part = own_part(name, whole, self.shard)
        if part is None:
            return None
        return nn.Parameter(self._placed(part).to(self.dtype), requires_grad=False)

    def _placed(self, tensor: Tensor) -> Tensor:
        if self.upload is None:
            return tensor.to(self.device)
        if tensor.device.type != self.device.type:
            return self.upload(tensor)
        # decoded there; of a part, the rest must not stay in memory with it
        return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()

    def _check_shape(self, names: Sequence[str], found: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(found) != tuple(wanted):
            raise FormatError(
                f"{self.checkpoint.path}: {' + '.join(names)} has the shape {list(found)}; "
                f"the config asks for {list(wanted)}.",
                hint="config.json and weights belong to different models.",
            )

    def _read(self, name: str) -> Tensor:
        check_stop(self.stop)
        info = self.checkpoint.tensors[name]
        if self.upload is not None and info.dtype in BLOCK:
            # fewer bytes go to the GPU, which decodes them faster than a CPU
            return dequantize(info.dtype, self.upload(self.checkpoint.raw(name)), out=self.dtype).view(info.shape)
        tensor = self.checkpoint.tensor(name)
        if not tensor.is_floating_point():
            raise UnsupportedError(
                f"{self.checkpoint.path}: {name} holds {tensor.dtype} numbers, which need scales to be weights.",
                hint="Take the model's original weights or a GGUF file.",
            )
        return tensor

    def _source(self, parameter: str) -> tuple[tuple[str, ...], Callable[[list[Tensor]], Tensor]]:
        """Checkpoint names behind one of our parameters and how they join. Raises FormatError if one is missing."""
        if (layers := self.layers) is not None:
            parameter = _LAYER.sub(lambda number: str(layers[int(number.group())]), parameter, count=1)
        if self.is_gguf:
            stored = self._gguf_names(parameter)
            self.used.update(stored)
            return stored, gguf_join(self.config, parameter)
        names, how = source_of(family_of(self.config), self.config, parameter)
        found = tuple(self._stored(name) for name in names)
        self.used.update(found)
        return found, lambda parts: how.join(parts, self.config)

    def _stored(self, name: str) -> str:
        """The name as this checkpoint spells it: checkpoints of bare models leave the prefix out."""
        for spelled in spellings(family_of(self.config), name):
            if spelled in self.checkpoint.tensors:
                return spelled
        raise self._missing(name)

    def _gguf_names(self, parameter: str) -> tuple[str, ...]:
        module, leaf = parameter.rsplit(".", 1)
        layer = _LAYER.search(module)
        number = layer.group() if layer else ""
        ways = gguf_weights(self.config)[_LAYER.sub("{i}", module)]
        for way in ways:
            names = tuple(f"{part.replace('{i}', number)}.{leaf}" for part in way)
            if all(name in self.checkpoint.tensors for name in names):
                return names
        raise self._missing(f"{ways[0][0].replace('{i}', number)}.{leaf}")

    def _missing(self, name: str) -> FormatError:
        return FormatError(
            f"{self.checkpoint.path} has no tensor {name!r}, which a {self.config.architecture} needs.",
            hint="The checkpoint is incomplete, or its config.json belongs to another model.",
        )

    # low-bit

    def _replace_linear(self, root: nn.Module, name: str, linear: nn.Linear) -> bool:
        if self.linear is not None and name.startswith("layers."):
            weight = self._parameter(f"{name}.weight")
            bias = self._parameter(f"{name}.bias") if linear.bias is not None else None
            assert weight is not None
            _set_module(root, name, self.linear(weight.data, None if bias is None else bias.data))
            return True
        tied = name == "head" and self.config.tie_embeddings
        names, join = self._source("embed.weight" if tied else f"{name}.weight")
        layer = self._low_bit(names, join, linear, name)
        if layer is None:
            return False
        _set_module(root, name, layer)
        return True

    def _low_bit(
        self, names: tuple[str, ...], join: Callable[[list[Tensor]], Tensor], linear: nn.Linear, name: str
    ) -> nn.Module | None:
        kinds = {self.checkpoint.tensors[n].dtype for n in names}
        blocks = self.keep_blocks and kinds <= set(BLOCK)
        if not blocks and not (self.round_to and name != "head"):
            return None
        if not Int8Linear.fits(linear.in_features):
            return None
        fits = Int4Linear.fits(linear.out_features, linear.in_features)
        bias = self._parameter(f"{name}.bias") if linear.bias is not None else None
        if blocks and kinds <= set(FOUR_BIT) and fits:
            layer = Int4Linear([self._blocks(n) for n in names], bias)
            self._check_shape(names, (layer.out_features, layer.in_features), linear.weight.shape)
            return layer
        # decoded to the dtype that is rounded from: a vocabulary in float32 would be the peak of loading
        parts = [dequantize(*self._blocks(n), out=self.dtype) if blocks else self._read(n) for n in names]
        weight = join(parts).to(self.dtype)
        self._check_shape(names, weight.shape, linear.weight.shape)
        if self.round_to == "int4" and fits:
            return Int4Linear([self._rounded(weight)], bias)
        if name == "head" and PackedLinear.fits(linear.in_features, self.dtype):
            return PackedLinear(weight, bias)
        return Int8Linear(weight, bias)

    def _rounded(self, weight: Tensor) -> Blocks:
        """In pieces: a large matrix takes seconds."""
        parts = []
        for rows in weight.split(ROUNDED_ROWS):
            check_stop(self.stop)
            parts.append(round_q4(rows)[1])
        return "Q4_1", torch.cat(parts)

    def _blocks(self, name: str) -> Blocks:
        return self.checkpoint.tensors[name].dtype, self.checkpoint.raw(name)

    def _replace_embedding(self, root: nn.Module, name: str) -> bool:
        if not self.keep_blocks or name != "embed":
            return False
        names, _ = self._source("embed.weight")
        stored = self.checkpoint.tensors[names[0]]
        if stored.dtype not in BLOCK:
            return False
        width = self.config.embedding_size or self.config.hidden_size
        self._check_shape(names, stored.shape, (self.config.vocab_size, width))
        _set_module(root, name, BlockEmbedding(self._blocks(names[0]), self.dtype))
        return True


class WeightReader:
    """The weights of a model one by one, in float32 on the CPU; nothing else of it is in memory. Close it."""

    def __init__(self, path: Path | str) -> None:
        """Raises what `load_model` raises."""
        path = Path(path)
        if not path.exists():
            raise NotFoundError(f"There is no model at {path}.", hint="See `llmasos ls`.")
        self.path = gguf_in(path)
        self.config, self.checkpoint = _open(self.path)
        self.module = _build(self.config)
        """Without weights."""
        placement = Placement(torch.device("cpu"), torch.float32, low_bit=False)
        self._filler = _Filler(self.config, self.checkpoint, placement, "none", self.module, None)

    @property
    def names(self) -> list[str]:
        """Of our parameters, each once."""
        return [name for name, _ in self.module.named_parameters() if not is_tied(self.config, name)]

    def read(self, name: str) -> Tensor:
        found = self._filler._parameter(name)
        assert found is not None
        return found.data

    def close(self) -> None:
        self.checkpoint.close()


def made_anew(module: nn.Module, linear: MakeLinear) -> None:
    """`linear` in the place of the blocks' linear layers that are there already."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("layers."):
            bias = None if layer.bias is None else layer.bias.data
            _set_module(module, name, linear(layer.weight.data, bias))


def round_q4(weight: Tensor) -> Blocks:
    """Rows rounded to Q4_1 blocks (32 weights between their minimum and maximum in 15 steps), as GGML stores them."""
    groups = weight.float().view(weight.shape[0], -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    d = ((high - low) / 15).half()
    m = low.half()
    step = d.float().clamp_min(1e-12)
    q = ((groups - m.float()) / step).round_().clamp_(0, 15).to(torch.uint8)
    packed = q[..., :16] | (q[..., 16:] << 4)
    blocks = torch.cat([d.view(torch.uint8), m.view(torch.uint8), packed], -1)
    return "Q4_1", blocks.flatten(1)


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, leaf, module)


def hf_state(model: LoadedModel) -> Mapping[str, Tensor]:
    """The weights under Hugging Face's names."""
    return dict(to_hf(family_of(model.config), model.config, model.module.state_dict()))
