"""Snapshots in containerd's sense, and the view of the store that those of Nix images get. See ``interface``."""
