"""Binary caches: asking them for narinfos and NARs, one or several, far or near, well or badly kept.

What is in here: the protocol of one cache (:mod:`.base`) and its implementations over HTTP, in a
directory and in memory; retries; the memory of narinfos on disk; and the pool, which asks several
caches in order and fails over. What is not: decompression, verification of NARs and the local
store. Whatever leaves this room as a narinfo has been parsed, is of the path that was asked for,
and, where the pool gives it, is trusted; the bytes of a NAR are as the cache sent them.

httpx is known in :mod:`.transport`, :mod:`.http` and :mod:`.client` only, and its exceptions are
translated in :mod:`.transport`.
"""
