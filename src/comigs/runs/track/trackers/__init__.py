"""Each file of this folder is one tracker, which goes by the file's name."""
