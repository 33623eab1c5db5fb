"""Triton as the type checker sees it: what stands in a kernel is not Python, and nothing is known of it."""

from typing import Any

def __getattr__(name: str) -> Any: ...
