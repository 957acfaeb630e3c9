"""Layer redundancy and dynamic slicing of causal language models.

The modules, in the order in which data flows through them: assets and models and corpora
-> redundancy -> plan -> slicing (-> sliced) -> evaluation -> results -> study -> report.
"""

__version__ = "0.1.0"
