from app import app


def test_a_story_is_streamed_and_the_same_seed_gives_the_same_one() -> None:
    asked = {"about": "a fox who learns to read", "words": 20, "seed": 7}
    with app.test_client() as client:
        events = client.get("/story", params=asked)
        again = client.post("/story", json=asked, headers={"Accept": "application/json"})
    assert events.headers["content-type"].startswith("text/event-stream")
    assert events.text.endswith("event: done\ndata: {}\n\n")
    assert isinstance(again.json(), str)


def test_a_title_is_one_line() -> None:
    with app.test_client() as client:
        found = client.post("/title", json={"about": "a fox who learns to read"}).json()
    assert "\n" not in found
