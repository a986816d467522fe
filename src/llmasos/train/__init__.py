"""Training: from a corpus to a better model, with the definition that serves it."""
