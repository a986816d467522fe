"""Data for training: read, checked, tokenised with masks, mixed, packed. torch comes in with the batches."""

from llmasos.data.bpe import train_tokenizer
from llmasos.data.inspect import show_batch
from llmasos.data.loader import IGNORED, Batch, Batches, Stats
from llmasos.data.masks import Masker, Sample
from llmasos.data.mix import Source, parse_sources
from llmasos.data.pieces import Totals
from llmasos.data.readers import DataFile, open_dataset, parse_columns
from llmasos.data.report import Problem, Report, validate
from llmasos.data.schemas import SCHEMAS, Example, RowError
from llmasos.data.tokens import TokenCache

__all__ = [
    "IGNORED",
    "SCHEMAS",
    "Batch",
    "Batches",
    "DataFile",
    "Example",
    "Masker",
    "Problem",
    "Report",
    "RowError",
    "Sample",
    "Source",
    "Stats",
    "TokenCache",
    "Totals",
    "open_dataset",
    "parse_columns",
    "parse_sources",
    "show_batch",
    "train_tokenizer",
    "validate",
]
