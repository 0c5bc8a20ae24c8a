"""What readers see: inodes, their attributes and contents, through FUSE.

``operations`` and ``session`` are the only modules that know pyfuse3, and ``operations`` is the only place where an
error becomes an errno. Everything else here answers in our own values.
"""
