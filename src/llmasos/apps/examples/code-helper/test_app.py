from app import app, explain


def test_what_is_written_has_been_run() -> None:
    task = {"task": "A function add(a, b) that returns the sum", "tests": "assert add(2, 3) == 5", "max_tokens": 60}
    with app.test_client() as client:
        found = client.post("/write", json=task).json()
    assert found["language"] == "python" and found["code"].strip()
    assert found["check"] is None or found["check"]["tries"] in (1, 2)


def test_explanations_come_in_pieces() -> None:
    pieces = list(explain("print(1)", max_tokens=8))
    assert all(isinstance(piece, str) for piece in pieces)
    with app.test_client() as client:
        assert client.get("/explain", params={"code": "print(1)", "max_tokens": 16}).text.endswith("data: {}\n\n")
