"""Translator: texts of any length, paragraph by paragraph."""

from typing import Annotated, Literal

from pydantic import Field

from llmasos import Application, tasks
from llmasos.apps import report_progress

app = Application(title="Translator")

Language = Literal["English", "Chinese", "French", "German", "Spanish", "Italian", "Portuguese", "Japanese"]


@app.route("/translate", tool=True, read_only=True, examples=[{"text": "Good morning. How are you?", "to": "French"}])
def translate(
    text: Annotated[str, Field(min_length=1, max_length=100_000)], to: Language, source: Language | None = None
) -> str:
    """Translate a text. Paragraphs stay where they are.

    Args:
        text: What is to be translated.
        to: The language that you want.
        source: The language of the text; left out, the model sees for itself.
    """
    done = tasks.translate(
        text, to=to, source=source, model=app.llm, on_progress=lambda p: report_progress(p.done / p.total)
    )
    return done.text


if __name__ == "__main__":
    app.run()
