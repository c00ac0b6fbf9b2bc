"""The tangent kernel Dh Dh^T by layers, its spectrum, and the kernels of infinitely wide networks."""
