"""Run by `llmasos app test`, with whatever model is here: what can be promised of any is the form."""

from app import app

from llmasos.tasks.texts import num_words


def test_answers_are_texts_of_about_the_length_that_was_asked_for() -> None:
    with app.test_client() as client:
        answer = client.post("/ask", json={"question": "Why is the sky blue?", "words": 8}).json()
    assert isinstance(answer, str) and num_words(answer) <= 3 * 8 + 16


def test_only_given_passages_are_cited() -> None:
    passages = ["Bread needs salt.", "The mayor is Anna Keller."]
    with app.test_client() as client:
        found = client.post("/look-up", json={"question": "Who is the mayor?", "passages": passages, "words": 8}).json()
        assert client.post("/look-up", json={"question": "Who?", "passages": []}).status_code == 422
    assert found["answer"] and found["passages"] and set(found["passages"]) <= {1, 2}
