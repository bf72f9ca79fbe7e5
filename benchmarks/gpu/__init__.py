"""`make gpu`: the gpu tests, then finemoe beside transformers on a CUDA device. See benchmarks/README.md."""
