"""The job server: HTTP in front, an engine behind, and a store between them, which is all that they share."""
