"""Document chat: add documents, ask about them, see where the answer stands. All of it stays in the app's folder."""

from collections.abc import Iterator
from functools import cache
from typing import Annotated

from pydantic import BaseModel, Field

from llmasos import Application, tasks
from llmasos.apps import File, Message, Upload, report_progress
from llmasos.apps.knowledge import KnowledgeBase
from llmasos.errors import NotFoundError

app = Application(title="Document chat")

Document = Annotated[File, Upload(max_size="20MB", accept=(".txt", ".md", ".html", ".csv", ".pdf", ".docx"))]
Question = Annotated[str, Field(min_length=2, max_length=2000)]


class Answer(BaseModel):
    text: str
    sources: list[str]


@cache
def base() -> KnowledgeBase:
    return KnowledgeBase.open(app.data / "documents", model=app.get_llm("encoder"))


@app.route("/documents", methods=["POST"])
def add(document: Document) -> int:
    """Add a document, or replace the one of its name; gives the number of documents.

    Args:
        document: Plain text, Markdown, HTML, CSV, PDF or Word.
    """
    base().add_bytes(document.name, document.data, on_progress=lambda p: report_progress(p.done / max(1, p.total)))
    return len(base().files())


@app.route("/documents", methods=["GET"], read_only=True)
def documents() -> list[str]:
    """List the documents."""
    return [file.path for file in base().files()]


@app.route("/documents/{name}", methods=["DELETE"], destructive=True)
def remove(name: str) -> list[str]:
    """Remove a document; gives those that are left."""
    base().remove_document(name)
    return documents()


@app.route("/ask", tool=True, read_only=True, examples=[{"question": "How hot should green tea be?"}])
def ask(question: Question) -> Answer:
    """Answer a question from the documents. Use it for anything that they may say; `sources` tells where it stands."""
    passages = base().search(question, k=3)
    if not passages:
        raise NotFoundError("There is no document yet.", hint="Add one: POST /documents.")
    found = tasks.answer(question, context=[passage.text for passage in passages], words=60, model=app.llm)
    return Answer(text=found.text, sources=[passages[number - 1].citation for number in found.citations])


@app.chat
def chat(messages: list[Message]) -> Iterator[str]:
    """Answer the last message from the documents, and name the sources."""
    found = ask(str(messages[-1]["content"]))
    yield found.text
    yield "".join(f"\n- {source}" for source in found.sources)


if __name__ == "__main__":
    app.run()
