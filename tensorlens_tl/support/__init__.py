"""Tiny models of every family, and the table of what works where."""
