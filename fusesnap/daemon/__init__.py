"""Where objects are built and joined: the only room that constructs collaborators, and reads clock and environment."""
