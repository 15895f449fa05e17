"""A run's metrics as one page: report.html, which opens without a network."""
