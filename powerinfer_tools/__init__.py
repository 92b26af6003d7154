"""Stages and engine of powerinfer: everything between the files and the command line.

Importing this package imports nothing heavy; each stage is imported by name where it is used.
"""

__version__ = "0.1.0"
