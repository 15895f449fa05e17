"""What a run will hold and take on H100s, before any is rented."""
