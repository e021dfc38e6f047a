"""TensorRT for export and runtime alike: which library is there, where its engines lie, memory and streams of the GPU."""
