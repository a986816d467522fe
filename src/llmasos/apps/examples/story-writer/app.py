"""Story writer: a short story, piece by piece as it is written."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from llmasos import Application

app = Application(title="Story writer")

Mood = Literal["cheerful", "sad", "spooky", "funny", "adventurous"]


@app.route("/story", output="markdown", examples=[{"about": "a fox who learns to read", "mood": "cheerful"}])
def story(
    about: Annotated[str, Field(min_length=2, max_length=500)],
    mood: Mood = "cheerful",
    words: Annotated[int, Field(ge=20, le=800)] = 120,
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None,
) -> Iterator[str]:
    """Write a short story.

    Args:
        about: Who or what it is about.
        mood: How it feels.
        words: About how long it is.
        seed: The same number gives the same story.
    """
    wish = f"Write a {mood} short story for children about {about}. It has about {words} words and an ending."
    yield from pieces(wish, words, seed)


@app.route("/title", tool=True, read_only=True, examples=[{"about": "a fox who learns to read"}])
def title(about: Annotated[str, Field(min_length=2, max_length=4000)]) -> str:
    """Find a title for a story. Use it when somebody has a story, or an idea for one, and no title.

    Args:
        about: The story, or what it is about.
    """
    wish = f"{about}\n\nGive this story a title of at most six words. Answer with the title only."
    said = app.llm.chat(wish, max_tokens=16, temperature=0.0).strip()
    return said.splitlines()[0].strip("\"'*# ") if said else about


def pieces(wish: str, words: int, seed: int | None) -> Iterator[str]:
    asked = [{"role": "system", "content": "You are a writer of children's books."}, {"role": "user", "content": wish}]
    for chunk in app.llm.stream(asked, max_tokens=2 * words, temperature=0.7, top_p=0.9, seed=seed):
        yield chunk.text


if __name__ == "__main__":
    app.run()
