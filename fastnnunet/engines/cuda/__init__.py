"""What comes before and after the network, on a GPU: the kernels of `native/engine/cuda/` through cuda-python."""
