from app import PHRASES, app, examples


def test_paragraphs_stay_where_they_are() -> None:
    with app.test_client() as client:
        found = client.post("/translate", json={"text": "Hello.\n\nGoodbye.", "to": "French"})
    assert found.status_code == 200 and len(found.json().split("\n\n")) >= 2


def test_what_is_in_that_language_already_stays_as_it_is() -> None:
    with app.test_client() as client:
        asked = {"text": "Hello.", "to": "English", "source": "English"}
        assert client.post("/translate", json=asked).json() == "Hello."


def test_examples_are_there_for_every_language() -> None:
    for to in PHRASES:
        for source in (None, *PHRASES):
            if source != to:
                shown = examples(to, source)
                assert [one["translation"] for one in shown] == list(PHRASES[to])
                assert not {one["text"] for one in shown} & set(PHRASES[to])


def test_other_languages_are_refused() -> None:
    with app.test_client() as client:
        assert client.post("/translate", json={"text": "Hello.", "to": "Klingon"}).status_code == 422
