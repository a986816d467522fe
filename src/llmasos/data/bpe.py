"""A tokenizer of one's own: byte-level BPE, trained on any dataset, written as Hugging Face files.

Words are cut by the pattern of GPT-4's family (numbers in groups of up to three digits), every text begins with
`<|bos|>`, documents end with `<|endoftext|>`, and chats are ChatML with `<|im_end|>` after every turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from llmasos.data.readers import Columns, open_dataset
from llmasos.data.schemas import read, schema_of
from llmasos.errors import FormatError, InvalidInputError
from llmasos.text import Tokenizer
from llmasos.text.pretokenizers import PRE_TOKENIZERS

BOS, END, TURN, END_OF_TURN = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, BOS, TURN, END_OF_TURN)
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""With marks, so that what is trained is known from the template itself."""
_LEAST = 256 + len(SPECIAL)


def train_tokenizer(
    data: str | Path | Iterable[str | Path],
    *,
    vocab_size: int = 32_768,
    schema: str | None = None,
    columns: Columns = None,
    most_bytes: int = 2_000_000_000,
) -> Tokenizer:
    """Learns from the first `most_bytes` of text; `save_pretrained` of the result writes its files.

    Raises InvalidInputError for a size that cannot hold all bytes, FormatError for data without text or with a wrong
    row.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < _LEAST:
        raise InvalidInputError(
            f"A vocabulary of {vocab_size} cannot hold all bytes and special tokens.",
            hint=f"It needs at least {_LEAST}.",
            param="vocab_size",
        )
    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS["llama-bpe"].patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    refs = [data] if isinstance(data, str | Path) else list(data)
    backend.train_from_iterator(_texts(refs, schema, columns, most_bytes), trainer)
    ids = {token: backend.get_vocab()[token] for token in SPECIAL}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    if backend.get_vocab_size() == _LEAST:
        raise FormatError("The data has no text to learn words from.", hint="Use more data.")
    return Tokenizer(
        backend,
        special={"bos": ids[BOS], "eos": ids[END]},
        eos_token_ids=[ids[END_OF_TURN]],
        chat_templates={"default": CHATML},
    )


def _texts(refs: list[str | Path], schema: str | None, columns: Columns, most_bytes: int) -> Iterator[str]:
    for ref in refs:
        for file in open_dataset(ref, columns=columns):
            its = schema_of(file, schema)
            for line, fields in file.rows():
                example = read(its, fields, f"{file.name}:{line}")
                contents = (message.get("content") for message in [*example.messages, *example.rejected[-1:]])
                for text in (example.text, *(content for content in contents if isinstance(content, str))):
                    if most_bytes <= 0:
                        return
                    most_bytes -= len(text.encode(errors="replace"))
                    yield text
