from app import app

LABELS = ["sports", "politics", "weather"]


def test_the_label_is_one_of_those_given() -> None:
    with app.test_client() as client:
        found = client.post("/classify", json={"text": "The team won the final.", "labels": LABELS}).json()
        assert client.post("/classify", json={"text": "Hello.", "labels": ["one"]}).status_code == 422
    assert found["label"] in LABELS and (found["score"] is None or 0 <= found["score"] <= 1)


def test_every_line_of_a_table_gets_a_label() -> None:
    table = b'"The team won, at last."\nRain tomorrow.\n'
    with app.test_client() as client:
        form = {"files": {"table": ("news.csv", table)}, "data": {"labels": LABELS}}
        rows = client.post("/classify-table", **form).json()
    assert [row["text"] for row in rows] == ["The team won, at last.", "Rain tomorrow."]
    assert all(row["label"] in LABELS for row in rows)
