"""Weights of few bits: `blocks.py` what they stand for, `making.py` how they are made. C++: `native/matrix.h`."""
