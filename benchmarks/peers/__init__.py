"""What runs in the peers' environments, a module a peer; it imports the peer, the standard library and `benchmarks.pairs`."""
