"""Translator: texts of any length, paragraph by paragraph. Small models see a few translations first."""

from typing import Annotated, Literal

from pydantic import Field

from llmasos import Application, tasks
from llmasos.apps import report_progress

app = Application(title="Translator")

Language = Literal["English", "Chinese", "French", "German", "Spanish", "Italian", "Portuguese", "Japanese"]

PHRASES: dict[str, tuple[str, str, str]] = {
    "English": ("Good morning.", "Thank you very much.", "Where is the station?"),
    "Chinese": ("早上好。", "非常感谢。", "车站在哪里？"),
    "French": ("Bonjour.", "Merci beaucoup.", "Où est la gare ?"),
    "German": ("Guten Morgen.", "Vielen Dank.", "Wo ist der Bahnhof?"),
    "Spanish": ("Buenos días.", "Muchas gracias.", "¿Dónde está la estación?"),
    "Italian": ("Buongiorno.", "Grazie mille.", "Dov'è la stazione?"),
    "Portuguese": ("Bom dia.", "Muito obrigado.", "Onde fica a estação?"),
    "Japanese": ("おはようございます。", "どうもありがとうございます。", "駅はどこですか。"),
}
"""The same in every language."""


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
    if source == to:
        return text
    done = tasks.translate(
        text,
        to=to,
        source=source,
        examples=examples(to, source),
        model=app.llm,
        on_progress=lambda p: report_progress(p.done / p.total),
    )
    return done.text


def examples(to: Language, source: Language | None) -> list[dict[str, str]]:
    """From the text's language; where that isn't known, each from another."""
    others = [source] * 3 if source else [name for name in PHRASES if name != to]
    return [{"text": PHRASES[others[i]][i], "translation": PHRASES[to][i]} for i in range(3)]


if __name__ == "__main__":
    app.run()
