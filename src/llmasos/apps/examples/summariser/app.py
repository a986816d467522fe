"""Summariser: texts and documents of any length; what does not fit into the model is read in pieces."""

from typing import Annotated, Literal

from pydantic import Field

from llmasos import Application, tasks
from llmasos.apps import File, Upload, report_progress
from llmasos.apps.knowledge.readers import read_document

app = Application(title="Summariser")

Words = Annotated[int, Field(ge=5, le=500)]
Style = Literal["paragraph", "bullets", "plain", "formal"]
Document = Annotated[File, Upload(max_size="20MB", accept=(".txt", ".md", ".html", ".csv", ".pdf", ".docx"))]


@app.route(
    "/summarise",
    tool=True,
    read_only=True,
    output="markdown",
    examples=[{"text": "The harbour road closes in spring. Shop owners fear for their trade.", "words": 12}],
)
def summarise(
    text: Annotated[str, Field(min_length=1, max_length=2_000_000)], words: Words = 60, style: Style = "paragraph"
) -> str:
    """Summarise a text of any length.

    Args:
        text: What is to be summarised.
        words: About how long the summary is.
        style: How it is written.
    """
    done = tasks.summarise(
        text, words=words, style=style, model=app.llm, on_progress=lambda p: report_progress(p.done / p.total)
    )
    return done.text


@app.route("/summarise-document", methods=["POST"], read_only=True, output="markdown")
def summarise_document(document: Document, words: Words = 60, style: Style = "paragraph") -> str:
    """Summarise a document: plain text, Markdown, HTML, CSV, PDF or Word.

    Args:
        document: The file.
        words: About how long the summary is.
        style: How it is written.
    """
    return summarise(read_document(document.name, document.data).text, words, style)


if __name__ == "__main__":
    app.run()
