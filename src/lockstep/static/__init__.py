"""What classes take, read from their source: nothing is imported, not even the package that a class lies in."""
