"""Losses R on the outputs: value, gradient, Hessian, and the metric of the output space F."""
