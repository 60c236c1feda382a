"""One file per format of an export, found by its name."""
