"""Nix's formats: bytes in, values out.

What is in here: hashes, store paths, signatures and keys, narinfo and ``nix-cache-info``, content
addresses and trust, the NAR as a push parser and a writer, the tree of a NAR, its signed index, and
decompressors.
What is not: files, sockets, clocks, logging, environment. Parsers are fed (``receive_data``,
``decompress``) and never block; whatever they return is checked in full, so that no later room
checks it again.

Below this room are only the standard library, PyNaCl, zstandard, protobuf for the index (and brotli and lz4
where they are installed) and :mod:`fusesnap.errors`. Names are Nix's own, and each module says which text or
source defines its format.
"""
