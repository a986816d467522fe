"""Classifier: sorts texts into labels of yours, one by one or a whole table."""

import csv
import io
from typing import Annotated

from pydantic import BaseModel, Field

from llmasos import Application, tasks
from llmasos.apps import File, Upload, report_progress
from llmasos.errors import InvalidInputError

app = Application(title="Classifier")

Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Label = Annotated[str, Field(min_length=1, max_length=60)]
Labels = Annotated[list[Label], Field(min_length=2, max_length=20)]
Table = Annotated[File, Upload(max_size="1MB", accept=(".csv", ".txt"))]


class Sorted(BaseModel):
    """`score`: how sure it is, from 0 to 1; null where the model does not tell."""

    text: str
    label: str
    score: float | None


@app.route(
    "/classify",
    tool=True,
    read_only=True,
    examples=[{"text": "The team won the final.", "labels": ["sports", "politics", "weather"]}],
)
def classify(text: Text, labels: Labels) -> Sorted:
    """Say which of the labels fits a text best.

    Args:
        text: What is to be sorted.
        labels: Single words or short phrases, two at least.
    """
    found = tasks.classify(text, labels=labels, model=app.llm)
    return Sorted(text=text, label=str(found.label), score=(found.scores or {}).get(str(found.label)))


@app.route("/classify-table", methods=["POST"], read_only=True, output="table")
def classify_table(table: Table, labels: Labels) -> list[Sorted]:
    """Sort every line of a file: the first column of a CSV table, or a text a line; 500 at most.

    Args:
        table: The file.
        labels: Single words or short phrases, two at least.
    """
    lines = [row[0].strip() for row in csv.reader(io.StringIO(table.text)) if row and row[0].strip()]
    if len(lines) > 500:
        raise InvalidInputError(f"The table has {len(lines)} lines; 500 are sorted at once.", param="table")
    found = []
    for number, line in enumerate(lines):
        report_progress(number / len(lines), line[:40])
        found.append(classify(line, labels))
    return found


if __name__ == "__main__":
    app.run()
