"""README and docs: the pages that are generated, and the commands that are written in them."""
