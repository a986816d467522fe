from app import app

SAID = "Anna: The launch moves to May.\nBen: I will tell the printers today.\nAnna: Good, then we are done.\n"


def test_notes_have_their_parts() -> None:
    with app.test_client() as client:
        found = client.post("/notes", json={"transcript": SAID}).json()
    assert found["people"] == ["Anna", "Ben"] and found["summary"]
    assert all(isinstance(one, str) for one in found["decisions"])
    assert all(set(one) == {"who", "what"} for one in found["tasks"])
