"""Benchmarks of fastrnn against torch.nn: `python -m bench` in the repository's root, `--help` for options."""
