"""The part of JSON Schema that our OpenAPI documents use, and no more: another keyword is an error, not passed over."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Final

_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_KNOWN: Final = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "anyOf", "pattern", "minimum",
    "exclusiveMinimum", "minItems", "minLength", "maxLength", "format", "description", "$ref",
}  # fmt: skip
_DATE_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)


def _is_date_time(text: str) -> bool:
    """As RFC 3339 has it."""
    try:
        return _DATE_TIME.fullmatch(text) is not None and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:  # the 13th month
        return False


_FORMATS: Final = {"date-time": _is_date_time}


class Described:
    """An OpenAPI document."""

    def __init__(self, path: Path) -> None:
        self.document: dict[str, Any] = json.loads(path.read_text())

    def routes(self) -> set[tuple[str, str]]:
        """Methods and paths."""
        return {(method.upper(), path) for path, methods in self.document["paths"].items() for method in methods}

    def resolved(self, value: dict[str, Any]) -> dict[str, Any]:
        """What a reference stands for."""
        while "$ref" in value:
            found: Any = self.document
            for step in value["$ref"].removeprefix("#/").split("/"):
                found = found[step]
            value = found
        return value

    def schema_of(self, method: str, path: str, status: int, content_type: str) -> dict[str, Any] | None:
        """What an answer must be; None where it has no body. Raises KeyError: there is no such answer."""
        responses = self.document["paths"][path][method.lower()]["responses"]
        response = self.resolved(responses.get(str(status)) or responses["default"])
        if "content" not in response:
            return None
        schema: dict[str, Any] = response["content"][content_type.partition(";")[0]]["schema"]
        return schema

    def complaints(self, value: Any, schema: dict[str, Any], where: str = "it") -> list[str]:
        """What is wrong with `value`, in words."""
        schema = self.resolved(schema)
        assert schema.keys() <= _KNOWN, f"not understood here: {schema.keys() - _KNOWN}"
        kinds = schema.get("type")
        if kinds is not None:
            names = [kinds] if isinstance(kinds, str) else kinds
            fits = any(isinstance(value, _KINDS[name]) for name in names)
            if not fits or (isinstance(value, bool) and "boolean" not in names):
                return [f"{where} is {value!r:.60} and not {kinds}"]
        found = []
        if "enum" in schema and value not in schema["enum"]:
            found.append(f"{where} is {value!r:.60}, none of those described")
        if "anyOf" in schema and all(self.complaints(value, each, where) for each in schema["anyOf"]):
            found.append(f"{where} is none of several")
        if isinstance(value, str):
            if "pattern" in schema and re.search(schema["pattern"], value) is None:
                found.append(f"{where} is {value!r:.60}, not of its pattern")
            if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
                found.append(f"{where} has {len(value)} characters, too few or too many")
            if "format" in schema and not _FORMATS[schema["format"]](value):
                found.append(f"{where} is {value!r:.60}, no {schema['format']}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value < schema.get("minimum", value):
                found.append(f"{where} is {value}, too small")
            if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
                found.append(f"{where} is {value}, too small")
        if isinstance(value, list):
            if len(value) < schema.get("minItems", 0):
                found.append(f"{where} has {len(value)} items, too few")
            for index, item in enumerate(value):
                found += self.complaints(item, schema.get("items", {}), f"{where}[{index}]")
        if isinstance(value, dict):
            known = schema.get("properties", {})
            found += [f"{where} has no {name}" for name in schema.get("required", ()) if name not in value]
            for name, item in value.items():
                if name in known:
                    found += self.complaints(item, known[name], f"{where}.{name}")
                elif schema.get("additionalProperties", True) is False:
                    found.append(f"{where} has {name}, which is not described")
        return found
