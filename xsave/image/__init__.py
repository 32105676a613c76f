"""The image formats: bytes to records and back. Knows no file, socket, clock or guest."""
