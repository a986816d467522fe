from app import app

SAID = "Anna: The launch moves to May.\nBen: I will tell the printers today.\nAnna: Good, then we are done.\n"


def test_notes_have_their_parts() -> None:
    with app.test_client() as client:
        found = client.post("/notes", json={"transcript": SAID}).json()
    assert found["people"] == ["Anna", "Ben"] and found["summary"]
    sentences = ["The launch moves to May.", "I will tell the printers today.", "Good, then we are done."]
    noted = [*found["decisions"], *found["tasks"]]
    assert all(one["what"] in sentences and one["who"] in found["people"] for one in noted)
