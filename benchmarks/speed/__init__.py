"""`make bench`: finemoe beside its peers, in one run on one machine. See benchmarks/README.md."""
