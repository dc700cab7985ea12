"""LSH v2: a notebook-based lab for long-context transformers with LSH attention.

Data flows one way: config -> data -> hashing/attention -> model -> train -> benchmark -> report.
Importing this package imports neither torch nor a notebook library: the dashboard and a rerun that
skips everything stay light. Import what you need from its modules, for instance

    from lshv2.model import create_lsh_v2_model
    from lshv2.attention import lsh_attention
"""

__version__ = "0.1.0"
