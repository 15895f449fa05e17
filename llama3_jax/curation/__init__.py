"""Web pages to clean, deduplicated, labelled documents: one file a stage or an idea."""
