"""Minibatch training at any scale alpha."""
