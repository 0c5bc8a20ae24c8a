"""The local store: verified store paths on this machine's disk, in a form that real Nix accepts.

Two facts are kept apart. A path is *committed* when its verified bytes have been renamed into the
store directory; it is *valid*, in Nix's sense, when it has a row in Nix's database, which it gets as
soon as all its references are valid too. A path that was fetched alone, because one file of it was
read, is committed at once and becomes valid with its closure.

Everything in this room may be used by several processes at once on one state directory, and by
several threads of each. Calls are synchronous and may wait for the disk; asynchronous callers make
them from threads.
"""
