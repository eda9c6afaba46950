"""The pictures of docs/concepts.md, two kinds: of weights, and of what is in memory."""
