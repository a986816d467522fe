from app import app

from llmasos.tasks.texts import num_words

TEXT = "The harbour road closes in spring. Shop owners fear for their trade. Buses will go along the river."


def test_a_summary_is_about_as_long_as_it_should_be() -> None:
    with app.test_client() as client:
        found = client.post("/summarise", json={"text": TEXT, "words": 10}).json()
    assert isinstance(found, str) and num_words(found) <= 3 * 10 + 16


def test_points_are_a_list_and_a_document_is_read() -> None:
    with app.test_client() as client:
        files = {"document": ("news.md", f"# News\n\n{TEXT}".encode())}
        found = client.post("/summarise-document", files=files, data={"words": "10", "style": "bullets"})
        assert found.status_code == 200 and found.json().startswith("- ")
        assert client.post("/summarise-document", files={"document": ("a.exe", b"MZ")}).status_code == 422
