"""What benchmarks/noise.py is made of."""
