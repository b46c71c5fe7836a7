"""The finished models, `classifier` and `generator`, and in the folders what the scripts share, one idea a module.

The package imports neither script, and nothing in it imports torch before a model or a batch is needed:
`modal run` works where only the Modal client is installed.
"""
