"""Private names of other libraries, one module per library, each verified at start; import the module, not the room."""
