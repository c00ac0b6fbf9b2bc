"""Data sets: teachers and students, digits, images on disk, and the exact population risk."""
