from app import app


def test_paragraphs_stay_where_they_are() -> None:
    with app.test_client() as client:
        found = client.post("/translate", json={"text": "Hello.\n\nGoodbye.", "to": "French"})
    assert found.status_code == 200 and len(found.json().split("\n\n")) >= 2


def test_other_languages_are_refused() -> None:
    with app.test_client() as client:
        assert client.post("/translate", json={"text": "Hello.", "to": "Klingon"}).status_code == 422
