"""DataModules, one file each, over one base."""
