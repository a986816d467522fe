"""Twenty JSON Schemas as applications send them, for tests and bench. Texts and lists are bounded: all outputs end."""

from typing import Any

Schema = dict[str, Any]


def text(most: int = 24, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def closed(properties: dict[str, Any], optional: tuple[str, ...] = (), **more: Any) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def number(low: float, high: float) -> Schema:
    """With two decimals at most: else a small model writes digits for ever."""
    return {"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.01}


NAME = text(16, minLength=1, pattern="^[A-Za-z ]+$")
DATE = {"type": "string", "format": "date"}
POINT = closed(
    {
        "latitude": number(-90, 90),
        "longitude": number(-180, 180),
    }
)

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
LEAF = {"$ref": "#/$defs/leaf"}

SCHEMAS: dict[str, Schema] = {
    "person": closed({"name": NAME, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "email": text(32)}),
    "sentiment": closed(
        {
            "label": {"enum": ["positive", "negative", "neutral"]},
            "score": number(0, 1),
        }
    ),
    "address": closed(
        {"street": text(), "city": NAME, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "country": text(2)}
    ),
    "nested_order": closed(
        {
            "id": {"type": "integer", "minimum": 1, "maximum": 99999},
            "customer": closed({"name": NAME, "vip": {"type": "boolean"}}),
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": closed({"sku": text(8), "count": {"type": "integer", "minimum": 1, "maximum": 20}}),
            },
        }
    ),
    "tags": {"type": "array", "minItems": 1, "maxItems": 5, "items": {"enum": ["red", "green", "blue", "other"]}},
    "optional_fields": closed(
        {"title": text(), "subtitle": text(), "year": {"type": "integer", "minimum": 1900, "maximum": 2100}},
        optional=("subtitle", "year"),
    ),
    "nullable": closed({"name": text(12), "nickname": {"anyOf": [text(12), {"type": "null"}]}}),
    "any_of": {
        "anyOf": [
            closed({"kind": {"const": "circle"}, "radius": number(0, 100)}),
            closed({"kind": {"const": "square"}, "side": number(0, 100)}),
        ]
    },
    "reference": {
        "$defs": {"point": POINT},
        **closed({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "tree": {
        "$ref": "#/$defs/branch",
        "$defs": {
            "branch": closed({"value": DIGIT, "children": {"type": "array", "maxItems": 2, "items": LEAF}}),
            "leaf": closed({"value": DIGIT}),
        },
    },
    "function_call": closed(
        {
            "name": {"const": "get_weather"},
            "arguments": closed({"city": NAME, "unit": {"enum": ["celsius", "fahrenheit"]}}),
        }
    ),
    "dates": closed({"start": DATE, "end": DATE, "all_day": {"type": "boolean"}}),
    "uuid": closed({"id": {"type": "string", "format": "uuid"}, "version": {"type": "integer", "enum": [1, 4, 7]}}),
    "string_lengths": closed({"code": text(6, minLength=6), "note": text(40, minLength=4)}),
    "number_bounds": closed(
        {
            "percent": {"type": "integer", "minimum": 0, "maximum": 100},
            "ratio": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.01},
            "offset": {"type": "integer", "minimum": -50, "maximum": 50},
        }
    ),
    "patterns": closed(
        {
            "phone": {"type": "string", "pattern": r"^\+[1-9][0-9]{6,11}$"},
            "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
        }
    ),
    "matrix": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "enum": [0, 1]}},
    },
    "mixed_tuple": {
        "type": "array",
        "prefixItems": [NAME, {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": text(8)}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "review": closed(
        {
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
            "pros": {"type": "array", "maxItems": 3, "items": text(20)},
            "cons": {"type": "array", "maxItems": 3, "items": text(20)},
            "summary": text(60, minLength=5),
            "recommended": {"type": "boolean"},
        }
    ),
}
