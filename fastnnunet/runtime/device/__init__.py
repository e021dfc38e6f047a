"""A prediction whose every step is on a GPU: the image goes there once, the label map comes back once."""
