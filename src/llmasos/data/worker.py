"""A process that tokenises: `python -m llmasos.data.worker` reads a recipe and then pieces of rows from its standard
input, writes each piece's file, and answers with a line: empty, or what was wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import sys

from llmasos.data.masks import Masker
from llmasos.data.pieces import Recipe, write_piece
from llmasos.errors import LLMasOSError, StoreError, error_facts


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one such process for every core
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # so that nothing else is taken for an answer
    recipe: Recipe = pickle.load(source)
    masker = Masker(recipe.tokenizer, template=recipe.template)
    while True:
        try:
            rows, path = pickle.load(source)
        except EOFError:
            return
        facts: object = None
        try:
            write_piece(masker, recipe, rows, path)
        except LLMasOSError as e:
            facts = error_facts(e)
        except OSError as e:
            facts = error_facts(StoreError(f"{path} could not be written: {e}.", hint="Is the disk full?"))
        except Exception as e:
            lines = f"{recipe.file.name}, lines {rows[0][0]} to {rows[-1][0]}"
            facts = error_facts(StoreError(f"{lines}, could not be tokenised: {type(e).__name__}: {e}."))
        answers.write(json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    main()
