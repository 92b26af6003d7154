"""The files powerinfer reads and writes, each behind one strict reader and one atomic writer.

This package imports nothing else of the project, and no module here trusts a byte it has not checked:
everything is checked when a file is opened, so that later stages need not check again. ``SPEC.md`` beside
this package describes every file byte for byte.
"""
