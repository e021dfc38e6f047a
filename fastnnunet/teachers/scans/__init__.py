"""The work folder of a model and of scans without labels: a nnU-Net world in which they are an ordinary data set."""
