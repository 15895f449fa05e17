"""The timeline of a run, and the config that declares it."""
