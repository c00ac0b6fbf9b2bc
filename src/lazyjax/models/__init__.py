"""The paper's networks, maps from model to model, and the tangent model."""
