"""Web pages to a training mix: read, extract, filter, deduplicate, label, mix (paper, sec. 3.1)."""

import os

# Read when daft is imported: it reports no use, and draws no bars into logs.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
