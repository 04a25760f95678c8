"""Processes: generation engine, gRPC servers, coordinator, Ray actors, metrics."""
