"""Layer redundancy and dynamic slicing of language models; the map is docs/architecture.md."""

__version__ = "0.1.0"
