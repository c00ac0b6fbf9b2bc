"""The gradient flow of F_alpha, its solvers, gradient descent, and the flow of the tangent model in closed form."""
