"""What the model of the GPU kernels rests on, measured: `python -m bench.gpu_experiments`."""
