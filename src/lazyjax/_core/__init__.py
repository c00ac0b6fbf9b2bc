"""Types, checks, pytrees, traced programs and Krylov methods that every other package uses."""
