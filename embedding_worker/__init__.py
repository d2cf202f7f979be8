"""Media in, embeddings out: decoding, preprocessing, batching, encoding, caching and sending of request media."""
