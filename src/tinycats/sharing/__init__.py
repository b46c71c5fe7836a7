"""Finished models in the formats of others: ONNX, safetensors."""
