"""The command `lazyjax`."""
