"""The network: config and presets, layers, transformer, loss, decoding, Hugging Face weights."""
