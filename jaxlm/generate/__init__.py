"""Generation: decoding with a cache, and how a token is chosen."""
