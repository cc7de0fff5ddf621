"""Fine-tuning on few rows, many short runs at once on one GPU: see the README one folder up."""
