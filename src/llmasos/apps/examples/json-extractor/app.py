"""JSON extractor: the facts of a text in the form that you want them in."""

from typing import Annotated, Any

from pydantic import Field, JsonValue

from llmasos import Application, tasks

app = Application(title="JSON extractor")

Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Name = Annotated[str, Field(min_length=1, max_length=40)]


@app.route(
    "/fields",
    tool=True,
    read_only=True,
    output="json",
    examples=[{"text": "John Smith from Boston turns 40 in May.", "fields": ["name", "city", "age"]}],
)
def fields(text: Text, fields: Annotated[list[Name], Field(min_length=1, max_length=20)]) -> dict[str, str]:
    """Find fields in a text; each is a text, empty where nothing is said.

    Args:
        text: What is looked through.
        fields: The names of what you want to know.
    """
    found: dict[str, str] = tasks.extract(text, into=fields, model=app.llm).data
    return found


@app.route(
    "/schema",
    methods=["POST"],
    read_only=True,
    output="json",
    examples=[
        {
            "text": "Two coffees and a cake, please.",
            "json_schema": {
                "type": "object",
                "properties": {
                    "coffees": {"type": "integer", "minimum": 0, "maximum": 99},
                    "cakes": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["coffees", "cakes"],
                "additionalProperties": False,
            },
        }
    ],
)
def schema(
    text: Text, json_schema: dict[str, Any], max_tokens: Annotated[int, Field(ge=16, le=4000)] = 400
) -> JsonValue:
    """Extract JSON that follows a JSON Schema of yours.

    Args:
        text: What is looked through.
        json_schema: What the JSON looks like; bound texts, lists and numbers: maxLength, maxItems, maximum.
        max_tokens: Length of the JSON, at most.
    """
    found: JsonValue = tasks.extract(text, into=json_schema, max_tokens=max_tokens, model=app.llm).data
    return found


if __name__ == "__main__":
    app.run()
