"""Makes store paths present: finds them, fetches them, verifies them, commits them.

This room joins ``substituter`` (where bytes come from) and ``store`` (where they go). It decides what is fetched when
and for whom, and knows nothing of FUSE, containerd or views.
"""
