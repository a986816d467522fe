"""Question answering: the first application that the specification of LLMasOS shows, with types and limits."""

from typing import Annotated

from pydantic import BaseModel, Field

from llmasos import Application, tasks

app = Application(title="Question answering")

Question = Annotated[str, Field(min_length=2, max_length=2000)]
Words = Annotated[int, Field(ge=5, le=200)]


class Found(BaseModel):
    """`passages`: numbers of those that the answer is from, counted from 1."""

    answer: str
    passages: list[int]


@app.route("/ask", tool=True, read_only=True, examples=[{"question": "Why is the sky blue?"}])
def ask(question: Question, words: Words = 40) -> str:
    """Answer a question from what the model knows. Use it for common knowledge, not for news.

    Args:
        question: What you want to know.
        words: About how long the answer is.
    """
    return tasks.answer(question, words=words, model=app.llm).text


@app.route(
    "/look-up",
    tool=True,
    read_only=True,
    examples=[{"question": "Who is the mayor?", "passages": ["Bread needs salt.", "The mayor is Anna Keller."]}],
)
def look_up(
    question: Question,
    passages: Annotated[list[Annotated[str, Field(min_length=1, max_length=20_000)]], Field(min_length=1)],
    words: Words = 40,
) -> Found:
    """Answer a question from passages and say which of them. Use it where the texts with the answer are at hand.

    Args:
        question: What you want to know.
        passages: Texts that may have the answer, any number.
        words: About how long the answer is.
    """
    found = tasks.answer(question, context=passages, words=words, model=app.llm)
    return Found(answer=found.text, passages=found.citations)


if __name__ == "__main__":
    app.run()
