from app import app

TEA = b"# Tea\n\nSteep green tea at 70 degrees.\n\n## Black tea\n\nBoil the water first.\n"
MINE = "test-of-document-chat.md"


def test_an_answer_names_its_sources_and_documents_come_and_go() -> None:
    with app.test_client() as client:
        before = client.get("/documents").json()
        assert client.post("/documents", files={"document": (MINE, TEA)}).json() == len(before) + 1
        found = client.post("/ask", json={"question": "How hot should green tea be?"}).json()
        asked = {"model": "document-chat", "messages": [{"role": "user", "content": "How hot is green tea?"}]}
        said = client.post("/v1/chat/completions", json=asked).json()
        assert client.delete(f"/documents/{MINE}").json() == before
    assert found["text"] and all(isinstance(source, str) for source in found["sources"])
    assert said["choices"][0]["message"]["content"]


def test_no_answer_without_documents() -> None:
    with app.test_client() as client:
        if not client.get("/documents").json():
            assert client.post("/ask", json={"question": "How hot?"}).status_code == 404
