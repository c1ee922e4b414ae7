"""Tiny random models of every family, and the table of what works under which host."""
