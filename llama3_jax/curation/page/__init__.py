"""A web page's bytes to its main content: encodings, bounds, blocks, features, extractor."""
