"""A personal model as what other programs load: one file per format in `formats/`."""
