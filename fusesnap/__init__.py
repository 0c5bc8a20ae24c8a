"""fusesnap: container images of Nix packages, started at once and fetched as they are read.

Nothing is imported here: the supervisor lives in this package too and stays small.
"""
