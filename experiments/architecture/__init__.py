"""Architecture and decoding: what textbooks say of the parts of a Transformer."""
