"""One mesh, one sharding table."""
