"""The command line, `fusednn train`; it needs the extra `app` and nothing in fusednn imports it."""
