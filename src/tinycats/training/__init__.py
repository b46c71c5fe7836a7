"""How a model is trained, on what, in which processes."""
