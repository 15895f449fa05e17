"""Where a curation run's files lie. Imports nothing heavy: reports and explanations read them, too."""

from pathlib import Path

STAGES, DOCUMENTS, TOKENS = "stages", "documents", "tokens"
REPORT_FILE = "report.json"  # in a stage's folder
STAGE_FILE, FUNNEL_FILE, TIMES_FILE = "stage.json", "funnel.json", "times.json"
MIX_FILE = "mix.json"
# What the funnel counts of documents.
COUNTS = ("documents", "bytes", "characters", "tokens")


def files(folder: Path) -> list[str]:
    """The parquet files of a folder, in order."""
    return sorted(str(path) for path in folder.glob("*.parquet"))
