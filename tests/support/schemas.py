"""The part of JSON Schema that our OpenAPI documents use, and no more: another keyword is an error, not passed over."""

import json
import re
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
        if isinstance(value, str) and "pattern" in schema and re.search(schema["pattern"], value) is None:
            found.append(f"{where} is {value!r:.60}, not of its pattern")
        if isinstance(value, int | float) and value < schema.get("minimum", value):
            found.append(f"{where} is {value}, too small")
        if isinstance(value, list):
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
