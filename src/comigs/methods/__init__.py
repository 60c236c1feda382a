"""This room holds the methods: one small file each, found by its name."""
