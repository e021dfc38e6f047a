"""TensorRT for export and runtime alike: the library that is there, where its engines lie, the GPU's memory."""
