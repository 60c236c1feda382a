"""An OpenAI-compatible server for the personal models of many clients on one base in memory."""
