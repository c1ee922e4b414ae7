from .runner import evaluate as evaluate
