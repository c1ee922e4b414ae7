"""Tiny random models of every family, and the table of what works under which host.

Key concepts:
    Family: A block shape under a name; its tiny model has random weights and odd sizes.
    Host class: A way that TransformerLens offers to load it: HookedTransformer, or a Bridge.
    Row: The outcome of one family as one host class: an error, or why there is none.
"""
