from app import app


def test_all_fields_are_there_as_texts() -> None:
    asked = {"text": "John Smith from Boston turns 40 in May.", "fields": ["name", "city"]}
    with app.test_client() as client:
        found = client.post("/fields", json=asked).json()
    assert set(found) == {"name", "city"} and all(isinstance(value, str) for value in found.values())


def test_the_json_follows_the_schema() -> None:
    example = dict(app.find("schema").examples[0])
    with app.test_client() as client:
        found = client.post("/schema", json=example | {"max_tokens": 60}).json()
    assert set(found) == {"coffees", "cakes"} and all(isinstance(value, int) for value in found.values())
