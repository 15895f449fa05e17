"""From small runs to a large one: compute-optimal fits, downstream forecasts, mix laws, probes."""
