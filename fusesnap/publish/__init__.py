"""Published caches: what writes a binary cache that any Nix reads, and of which a chunk can be had alone.

A NAR is compressed as independent zstd frames, a chunk each, and described by a signed NAR index. Below this room are
the formats of ``nix`` and, for what is published, ``store`` and ``substituter``.
"""
