"""The types of JSON objects. Their values are `Any`: what they are is known only once they have been read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object."""

JsonFields: TypeAlias = Mapping[str, Any]
"""The fields of a JSON object, for reading only."""
