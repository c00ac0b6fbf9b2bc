"""How lazily a model trains: gaps between the two flows, displacement, kappa, and Lipschitz constants."""
