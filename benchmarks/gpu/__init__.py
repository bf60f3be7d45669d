"""The parts of `benchmarks/gpu_suite.py`. What imports torch runs in a process of its own."""
