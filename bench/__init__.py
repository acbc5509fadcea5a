"""Benchmarks of fusednn beside its peers, and the counts that need no GPU: memory traffic and resources."""
