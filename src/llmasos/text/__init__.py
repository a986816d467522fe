"""Text: tokenizers from any model's files, streaming detokenisation, chat templates. Never imports torch."""

from llmasos.text.detokenize import StreamDecoder
from llmasos.text.load import load_tokenizer, read_chat_template, tokenizer_from_gguf
from llmasos.text.schema import json_schema
from llmasos.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "json_schema", "load_tokenizer", "read_chat_template", "tokenizer_from_gguf"]
