"""What we serve over gRPC; the only room that knows it."""
