"""Startup traces: recording what a start reads, keeping it, and fetching in its order before the next start asks.

It knows store paths and their entries, and what containers there are by the keys that it is given; it knows no FUSE and
no containerd.
"""
