"""What a chosen plan takes: its jaxpr partitioned, and what compilers made of it."""
