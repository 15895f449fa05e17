"""The Llama 3 pre-training recipe in JAX: model, data, training, one timeline."""
