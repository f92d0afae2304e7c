"""Generation: decoding with a key/value cache, and sampling."""
