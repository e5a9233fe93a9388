"""The same work in other people's code, timed in an environment of its own."""
