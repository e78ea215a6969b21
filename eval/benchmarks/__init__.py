"""The benchmarks, one record each, and where their data lie."""
