"""What is remembered about a stream of gradients, and how that memory rescales a step."""

from asgo.structures.base import Structure
from asgo.structures.one_sided import OneSided

__all__ = ["OneSided", "Structure"]
