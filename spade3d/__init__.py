"""spade3d knows volumes, where to look in them, which places are the same, and how to learn from that."""

__version__ = "0.1.0"
