"""The parts of benchmarks/step_cost.py, one idea a file."""
