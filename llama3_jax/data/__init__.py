"""Documents to tokens to packed, mixed, resumable batches."""
