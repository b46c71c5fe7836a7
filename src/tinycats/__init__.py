"""What the training scripts share: data, models, runs and Modal plumbing, one idea a module.

The package imports neither script, and nothing in it imports torch before a model or a batch is needed:
`modal run` works where only the Modal client is installed.
"""
