"""Compare runs: group them over seeds, draw them, and write a page that explains itself."""
