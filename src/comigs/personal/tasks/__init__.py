"""This room says what a client's own model gets right: answers, choices, and other tasks."""
