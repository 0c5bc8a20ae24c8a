"""What happened, for people and for their machines: the journal of fetches and waits, start reports, metrics, spans.

Rooms below tell what happens to observers that are passed in; here it is given times, kept and counted. Nothing rests
on it: where it cannot be written, readers are served as ever.
"""
