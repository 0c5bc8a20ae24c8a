"""The test bed: real Nix closures, a real binary cache, a slow link, a registry and a private containerd.

It serves the demo and the end-to-end tests. Everything that it starts is a context manager that ends what it started;
everything that it builds is kept below one work directory and reused.
"""
