from .registry import METHODS as METHODS
