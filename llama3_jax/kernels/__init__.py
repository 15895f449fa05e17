"""Operations with more than one implementation: the plain-JAX reference is the definition."""
