"""The one type of objects whose fields are known only when they are read."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""An object as JSON, YAML or a chat template has it: a row, a message, a tool's schema, a frame
between processes. Its values have any type; who reads a field checks it there, and turns what goes
on through the program into a dataclass. Where values are only passed on, `Mapping[str, object]`
says so."""
